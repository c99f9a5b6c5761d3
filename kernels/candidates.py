"""Which configurations are worth timing for a shape. Pure Python: needs neither Triton nor a GPU.

Chosen from compiled resource use and a cycle model, most promising first; nothing here was measured on a GPU.
"""

from collections.abc import Iterator

from .configs import SHARED_MEMORY, Config, default_config, get_config

# (block_m, block_n, block_k in 16 bits, warps, stages) by the rows they serve, most promising first.
Tile = tuple[int, int, int, int, int]

# Up to 64 rows the weight streams from memory, once: many narrow tiles, deep pipelines.
FEW_ROWS: dict[int, tuple[Tile, ...]] = {
    16: ((16, 32, 128, 4, 4), (16, 16, 128, 4, 4), (16, 64, 128, 4, 4), (16, 32, 256, 4, 3), (64, 32, 128, 4, 4)),
    32: ((32, 32, 128, 4, 4), (32, 64, 128, 4, 4), (16, 32, 128, 4, 4), (16, 64, 128, 4, 4), (64, 32, 128, 4, 4)),
    64: ((64, 32, 128, 4, 4), (64, 64, 128, 4, 3), (32, 64, 128, 4, 4), (64, 64, 64, 4, 4), (32, 32, 128, 4, 4)),
}
SOME_ROWS: tuple[Tile, ...] = (
    (64, 64, 64, 4, 4),
    (64, 64, 128, 4, 3),
    (64, 128, 64, 4, 4),
    (64, 128, 64, 4, 3),
    (32, 128, 64, 4, 4),
    (128, 64, 64, 4, 3),
)
MANY_ROWS: tuple[Tile, ...] = (
    (128, 128, 64, 4, 3),
    (128, 256, 64, 8, 3),
    (128, 128, 64, 8, 3),
    (64, 128, 64, 4, 4),
    (128, 256, 64, 8, 4),
    (256, 128, 64, 8, 3),
    (128, 128, 32, 4, 4),
    (128, 64, 64, 4, 3),
)


def candidates(M: int, N: int, K: int, dtype: str, arch: int) -> list[Config]:
    """Configurations of ``[M, K] @ [N, K].T`` to time on an architecture, most promising first.

    The configuration that lookup would choose comes first, the library is always among them, and all fit the chip's
    shared memory. The order is the same in every process.
    """
    library = Config("library", dtype)
    if arch != 0 and (dtype == "float32" or K == 0):
        return [library]
    chosen = get_config(M, N, K, dtype, arch, aligned=True)
    tiled = _interpreted(M, dtype) if arch == 0 else _tiled(M, N, K, dtype, arch)
    fitting = (config for config in tiled if arch == 0 or shared_bytes(config, arch) <= SHARED_MEMORY.get(arch, 101376))
    return list(dict.fromkeys((chosen, *fitting, library)))


def shared_bytes(config: Config, arch: int) -> int:
    """An upper estimate of what a block of a Triton configuration takes; tests/test_compile.py compares."""
    itemsize = 4 if config.dtype in ("tf32", "float32") else 2
    operands = (config.block_m + config.block_n) * config.block_k * itemsize
    return operands * config.num_stages + 1024


def _tiled(M: int, N: int, K: int, dtype: str, arch: int) -> Iterator[Config]:
    kernels = ("tma", "pointer") if arch in (90, 100, 103) else ("pointer",)
    if M <= 64:
        tiles, kernels = next(tiles for rows, tiles in FEW_ROWS.items() if rows >= M), ("pointer",)
    elif M <= 256:
        tiles, kernels = SOME_ROWS, ("pointer",)
    elif M <= 1024:
        tiles = (*SOME_ROWS, *MANY_ROWS)
    else:
        tiles = MANY_ROWS
    for kernel in kernels:
        for block_m, block_n, block_k, num_warps, num_stages in tiles:
            if kernel == "tma" and block_m < 64:
                continue
            block_k = block_k // 2 if dtype == "tf32" else block_k
            yield Config(kernel, dtype, block_m, block_n, block_k, num_warps, num_stages)


def _interpreted(M: int, dtype: str) -> Iterator[Config]:
    """A few that the interpreter runs in little time, so that tuning can be rehearsed without a GPU."""
    yield default_config(M, dtype, 0)
    yield Config("pointer", dtype, 32, 32, 32, num_warps=4, num_stages=1)
