"""Which configuration serves which shape. Pure Python: needs neither Triton nor a GPU.

A configuration is data. Each architecture has a table ``tables/sm_XX.json`` that says how its entries came to be; an
architecture without one gets ``default_config``. Lookup never measures anything.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TABLES = Path(__file__).parent / "tables"

# Offsets inside a tile are 32-bit (rows of a tile times N), those of whole tensors 64-bit.
MAX_N = 2**23
MAX_M = 2**31 - 2**10

# Bytes of shared memory one block may use, by compute capability: CUDA C++ programming guide, technical specifications.
SHARED_MEMORY = {80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 120: 101376}


@dataclass(frozen=True)
class Config:
    """One way to compute ``act(x @ W.T + b)``.

    kernel: "pointer" and "tma" are one Triton launch that loads its tiles through pointers or through Hopper's tensor
    memory accelerator; "library" is cuBLAS (bias in its epilogue) and one activation pass.
    dtype: "float16", "bfloat16", "float32" (IEEE products) or "tf32" (fp32 tensors, TF32 products).
    The rest describes a Triton kernel's tile, in powers of two, and is left out for "library".
    split_k: blocks that share the K range of one tile; the last to finish adds their partial sums.
    persistent: blocks per SM, each of which computes tile after tile; 0 launches a block per tile.
    subtiles: column slices in which a persistent block stores its tile: smaller buffers, more blocks per SM.
    flatten, warp_specialize: Triton's options of the persistent loop over tiles.

    Raises ValueError for a combination that no kernel has.
    """

    kernel: str
    dtype: str
    block_m: int = 0
    block_n: int = 0
    block_k: int = 0
    num_warps: int = 0
    num_stages: int = 0
    group_m: int = 8
    split_k: int = 1
    persistent: int = 0
    subtiles: int = 1
    flatten: bool = False
    warp_specialize: bool = False

    def __post_init__(self) -> None:
        reason = impossible(self)
        if reason is not None:
            raise ValueError(f"{self}: {reason}")

    def __str__(self) -> str:
        if self.kernel == "library":
            return "cuBLAS + activation pass"
        parts = [
            f"{self.kernel} {self.block_m}x{self.block_n}x{self.block_k} {self.num_warps} warps "
            f"{self.num_stages} stages",
            f"groups of {self.group_m}" if self.group_m != 8 else "",
            f"K in {self.split_k}" if self.split_k != 1 else "",
            f"persistent {self.persistent}/SM" if self.persistent else "",
            f"stored in {self.subtiles}" if self.subtiles != 1 else "",
            "flattened" if self.flatten else "",
            "warp-specialized" if self.warp_specialize else "",
        ]
        return " ".join(part for part in parts if part)


def impossible(config: Config) -> str | None:
    """Why no kernel has this combination, or None if one does. Whether it fits a chip is another question."""
    c = config
    if c.kernel not in ("pointer", "tma", "library") or c.dtype not in ("float16", "bfloat16", "float32", "tf32"):
        return "unknown kernel or dtype"
    if c.kernel == "library":
        return None if dataclasses.astuple(c)[2:] == _UNTILED else "cuBLAS chooses its own tiles"
    powers = (c.block_m, c.block_n, c.block_k, c.num_warps, c.subtiles)
    if min(powers) < 1 or any(size & (size - 1) for size in powers):
        return "blocks, warps and subtiles must be powers of two"
    if min(c.num_stages, c.group_m, c.split_k) < 1 or c.persistent < 0:
        return "stages, groups and splits start at 1"
    if c.split_k > 1 and c.kernel != "pointer":
        return "only the pointer kernel splits K"
    if c.persistent and c.kernel != "tma":
        return "only the TMA kernel is persistent"
    if not c.persistent and (c.subtiles > 1 or c.flatten or c.warp_specialize):
        return "only a persistent kernel has subtiles, flattening and warp specialization"
    if c.block_n // c.subtiles < 16:
        return "a subtile has at least 16 columns"
    return None


# The fields after kernel and dtype of a configuration that has no tile.
_UNTILED = (0, 0, 0, 0, 0, 8, 1, 0, 1, False, False)


@dataclass(frozen=True)
class Entry:
    """A configuration and the shape it was chosen for; ``n`` and ``k`` are None where any will do."""

    m: int
    n: int | None
    k: int | None
    config: Config


@functools.cache
def load_table(arch: int) -> tuple[Entry, ...]:
    """The table shipped for a compute capability (90 for sm_90); empty if there is none."""
    path = TABLES / f"sm_{arch}.json"
    if not path.exists():
        return ()
    entries = []
    for row in json.loads(path.read_text())["entries"]:
        dtypes, m, n, k = row.pop("dtypes"), row.pop("m"), row.pop("n", None), row.pop("k", None)
        entries += [Entry(m, n, k, Config(dtype=dtype, **row)) for dtype in dtypes]
    return tuple(entries)


def default_config(M: int, dtype: str, arch: int) -> Config:
    """The configuration for an architecture that has no table: tiles that fit everywhere, chosen by rows alone."""
    if arch == 0:  # the interpreter pays per block, and small tiles make small tests cross block borders
        return Config("pointer", dtype, 16, 32, 32, num_warps=4, num_stages=1, group_m=2)
    block_k = 32 if dtype == "tf32" else 64
    if M <= 256:
        return Config("pointer", dtype, 64, 64, block_k, num_warps=4, num_stages=3)
    return Config("pointer", dtype, 128, 128, block_k, num_warps=8, num_stages=3)


def get_config(M: int, N: int, K: int, dtype: str, arch: int, *, aligned: bool) -> Config:
    """The configuration for ``[M, K] @ [N, K].T``.

    aligned: whether every row of x, W and the output starts on a 16-byte boundary and is contiguous. Where it is not,
    loads are narrow and large tiles spill, so cuBLAS serves. It also serves IEEE fp32, which has no tensor cores, and
    K = 0, which no descriptor describes.
    """
    if N > MAX_N or M > MAX_M:
        return Config("library", dtype)
    if arch != 0 and (dtype == "float32" or not aligned or K == 0):
        return Config("library", dtype)
    entries = [entry for entry in load_table(arch) if entry.config.dtype == dtype]
    candidates = [entry for entry in entries if (entry.n, entry.k) == (N, K)]
    candidates = candidates or [entry for entry in entries if entry.n is None and entry.k is None]
    if not candidates:
        return default_config(M, dtype, arch)
    return min(candidates, key=lambda entry: abs(math.log2(max(M, 1) / entry.m))).config


def shipped_configs(arch: int) -> Iterator[Config]:
    """Every Triton configuration that ``get_config`` can return on an architecture, each once."""
    entries = [entry.config for entry in load_table(arch)]
    dtypes = ("float16", "bfloat16", "tf32")
    defaults = [default_config(M, dtype, arch) for dtype in dtypes for M in (1, 4096)]
    for config in dict.fromkeys(entries or defaults):
        if config.kernel != "library":
            yield config
