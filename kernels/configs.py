"""Configurations of the forward kernel, and which of them an architecture can launch.

Pure Python: needs neither Triton nor a GPU. Tables of configurations and the choice among them are in ``lookup.py``.
"""

import dataclasses
from dataclasses import dataclass

# Bytes of shared memory one block may use, by compute capability: CUDA C++ programming guide, technical specifications.
SHARED_MEMORY = {80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 120: 101376}
TMA_ARCHS = (90, 100, 103)


@dataclass(frozen=True)
class Config:
    """One way to compute ``act(x @ W.T + b)``.

    kernel: "pointer" and "tma" are one Triton launch that loads its tiles through pointers or through Hopper's tensor
    memory accelerator; "hopper" is one of sm_90's own, with warps that only load; "library" is cuBLAS (bias in its
    epilogue) and one activation pass.
    dtype: "float16", "bfloat16", "float32" (IEEE products) or "tf32" (fp32 tensors, TF32 products).
    The rest describes a Triton kernel's tile and is left out for "library".
    num_warps: those that multiply. persistent: blocks per SM, each of which computes tile after tile; 0 launches a
    block per tile.
    subtiles: column slices in which a persistent block stores its tile: smaller buffers, more blocks per SM.

    Raises ValueError for a combination that no kernel supports.
    """

    kernel: str
    dtype: str
    block_m: int = 0
    block_n: int = 0
    block_k: int = 0
    num_warps: int = 0
    num_stages: int = 0
    group_m: int = 8
    persistent: int = 0
    subtiles: int = 1

    def __post_init__(self) -> None:
        reason = invalid_reason(self)
        if reason is not None:
            raise ValueError(f"{self}: {reason}")

    @property
    def consumers(self) -> int:
        """How many groups of warps of the kernel "hopper" compute tiles of their own; those of a large tile share it.

        Four warps hold the sums of 64x256 elements, 128 a thread.
        """
        return 2 if self.block_m * self.block_n <= 64 * 256 else 1

    def __str__(self) -> str:
        if self.kernel == "library":
            return "cuBLAS + activation pass"
        parts = [
            f"{self.kernel} {self.block_m}x{self.block_n}x{self.block_k} {self.num_warps} warps "
            f"{self.num_stages} stages",
            f"groups of {self.group_m}" if self.group_m != 8 else "",
            f"persistent {self.persistent}/SM" if self.persistent else "",
            f"stored in {self.subtiles}" if self.subtiles != 1 else "",
        ]
        return " ".join(part for part in parts if part)


def invalid_reason(config: Config) -> str | None:
    """Return why no kernel supports this combination, or None. ``unlaunchable`` tells whether it fits a chip."""
    c = config
    if c.kernel not in ("pointer", "tma", "hopper", "library") or c.dtype not in (
        "float16",
        "bfloat16",
        "float32",
        "tf32",
    ):
        return "unknown kernel or dtype"
    if c.kernel == "library":
        return None if dataclasses.astuple(c)[2:] == _UNTILED else "cuBLAS chooses its own tiles"
    powers = (c.block_m, c.block_n, c.block_k, c.num_warps, c.subtiles)
    if min(powers) < 1 or any(size & (size - 1) for size in powers):
        return "blocks, warps and subtiles must be powers of two"
    if min(c.num_stages, c.group_m) < 1 or c.persistent < 0:
        return "stages and groups start at 1"
    if c.persistent and c.kernel == "pointer":
        return "the pointer kernel is not persistent"
    if c.kernel == "hopper" and ("16" not in c.dtype or (c.persistent, c.num_warps) != (1, 8)):
        return "the Hopper kernel is for 16 bits, with one block per SM and 8 warps"
    if c.kernel == "hopper" and (c.block_m < 128 // c.consumers or c.block_m * c.block_n > 128 * 256):
        return "a warp of the Hopper kernel takes 16 rows at least, and 128 sums a thread at most"
    if not c.persistent and c.subtiles > 1:
        return "only a persistent kernel has subtiles"
    if c.block_n // c.subtiles < 16:
        return "a subtile has at least 16 columns"
    return None


# The fields after kernel and dtype of a configuration that has no tile.
_UNTILED = (0, 0, 0, 0, 0, 8, 0, 1)


@dataclass(frozen=True)
class Measured:
    """Median microseconds of the chosen configuration, of cuBLAS with the activation pass, and of eager PyTorch.

    date and versions: when they were measured, and with which torch and Triton.
    """

    us: float
    library_us: float
    eager_us: float
    date: str
    versions: str


@dataclass(frozen=True)
class Entry:
    """A configuration and the shape it was chosen for; ``n`` and ``k`` are None if it serves any N and K."""

    m: int
    n: int | None
    k: int | None
    config: Config
    measured: Measured | None = None


def unlaunchable(config: Config, arch: int) -> str | None:
    """Return why an architecture cannot launch a configuration, or None. A quick check, for one read from a file."""
    if config.kernel == "library":
        return None
    if config.kernel == "tma" and arch not in TMA_ARCHS:
        return f"sm_{arch} has no tensor memory accelerator"
    if config.kernel == "hopper" and arch != 90:
        return f"sm_{arch} is not sm_90"
    blocks = (config.block_m, config.block_n, config.block_k)
    if min(blocks) < 16 or max(blocks) > 256 or max(config.num_warps, config.persistent) > 16:
        return "blocks are 16 to 256, warps and blocks per SM at most 16"
    # On sm_8x and sm_12x the pipeline keeps num_stages - 1 tiles in flight, on sm_9x and sm_10x num_stages.
    stages = config.num_stages - (arch < 90 or arch >= 120)
    operands = (config.block_m + config.block_n) * config.block_k * (2 if "16" in config.dtype else 4)
    return None if operands * stages <= SHARED_MEMORY.get(arch, 101376) else "more shared memory than a block may use"


def default_config(M: int, dtype: str, arch: int) -> Config:
    """Return the configuration for an architecture without a table: a tile that fits every architecture."""
    if arch == 0:  # the interpreter: small tiles, so that small tests have several blocks
        return Config("pointer", dtype, 16, 32, 32, num_warps=4, num_stages=1, group_m=2)
    # 8 warps for the small tile too: with 4 it spills on sm_86. TF32 takes twice the registers, and spills on sm_120
    # where a tile has 128 rows.
    block_k = 32 if dtype == "tf32" else 64
    if M <= 256:
        return Config("pointer", dtype, 64, 64, block_k, num_warps=8, num_stages=3)
    return Config("pointer", dtype, 64 if dtype == "tf32" else 128, 128, block_k, num_warps=8, num_stages=3)
