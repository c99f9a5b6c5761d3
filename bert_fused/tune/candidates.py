"""Propose the configurations worth timing for a shape. Pure Python: needs neither Triton nor a GPU.

The compiler does not spill with these tiles (tested for sm_80, 86, 89, 90, 100 and 120). A cycle model orders them;
nothing here was measured on a GPU.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

from ..kernels.configs import SHARED_MEMORY, TMA_ARCHS, Config, default_config
from ..kernels.lookup import get_config

# (block_m, block_n, block_k in 16 bits, warps, stages).
Tile = tuple[int, int, int, int, int]

# mma.sync serves tiles below 64 rows on every architecture. They are narrow, so that enough blocks stream the weight.
SMALL_TILES: tuple[Tile, ...] = (
    (16, 16, 128, 4, 4),
    (16, 32, 128, 4, 4),
    (16, 32, 256, 4, 3),
    (16, 64, 128, 4, 4),
    (32, 32, 128, 4, 4),
    (32, 64, 128, 4, 4),
    (32, 128, 64, 4, 4),
)
MIDDLE_TILES: tuple[Tile, ...] = (
    (64, 32, 128, 4, 4),
    (64, 64, 64, 4, 4),
    (64, 64, 128, 4, 3),
    (64, 128, 64, 4, 3),
    (64, 128, 64, 4, 4),
    (128, 128, 64, 8, 3),
)
# Through TMA these hold 128 accumulators a thread without spills, through pointers they do not.
TMA_TILES: tuple[Tile, ...] = (
    (64, 128, 64, 4, 4),
    (128, 64, 64, 4, 3),
    (128, 128, 32, 4, 4),
    (128, 128, 64, 4, 3),
    (128, 128, 64, 4, 4),
    (128, 256, 64, 8, 3),
    (128, 256, 64, 8, 4),
    (256, 128, 64, 8, 3),
)
# Of the Hopper kernel: (block_m, block_n, block_k, stages, slices of its stores). The second is shared by two groups of
# warps, the others are for one each.
HOPPER_TILES = ((128, 128, 64, 5, 2), (128, 256, 64, 4, 4), (64, 256, 64, 4, 4))
POINTER_TILES: tuple[Tile, ...] = ((128, 128, 32, 8, 4),)
# Tiles that get 8 warps on these architectures: with 4 a thread gets too few registers (the second: with Triton 3.9).
MORE_WARPS: dict[Tile, tuple[int, ...]] = {(64, 64, 64, 4, 4): (86, 89), (64, 32, 128, 4, 4): (80, 86, 89)}


# Clocks until a load arrives. Not measured.
LATENCY = 800


@dataclass(frozen=True)
class Chip:
    """A GPU in the cycle model.

    From the data sheet. ghz: boost clock. matrix: 16-bit operations per SM and clock, two for a multiply-add. memory:
    bytes from the device's memory per SM and clock.
    Measured by others. l2: bytes from L2 per SM and clock while all SMs read. sustained: share of the matrix rate that
    the power limit leaves on random data. start: clocks from a block's epilogue to the first product of the block that
    follows it on its SM.
    """

    sms: int
    ghz: float
    matrix: int
    memory: float
    l2: float = 64.0
    sustained: float = 1.0
    start: int = LATENCY


# A100 80 GB, L40S, H100 SXM, B200; any other architecture is modelled as the nearest older one. What has no source here
# is unmeasured: all of it for sm_89 (gpu-benches' kernel is bound by FP64 there, its issue 7) and sm_100.
# - l2: github.com/te42kyfo/gpu-benches, gpu-l2-cache/*.txt. A100: 5.4 TB/s. H200, which has the SMs of H100 SXM: 9.8 at
#   1.98 GHz, 37 bytes. H100 PCIe: 6.9 with 114 SMs at 1.755 GHz, 34 bytes. The kernel of #1065 below needed 34.
# - sustained: for sm_80 cuBLAS' 258 of 312 TFLOPS at 8192^3 (thonking.ai/p/strangely-matrix-multiplications). For sm_90
#   its 687 at (65536, 1024, 1024), github.com/facebookexperimental/triton/pull/1065. Cards differ: 584 in their #1038,
#   798 at 8192^3 in github.com/pranjalssh/fast.cu; the data sheet says 989.
# - start, sm_90: fitted to 0.86 of cuBLAS for a warp-specialized kernel with a block per tile, before #1038.
CHIPS = {
    80: Chip(108, 1.41, 2048, 13.4, l2=35.5, sustained=0.83),
    89: Chip(142, 2.52, 1024, 2.4),
    90: Chip(132, 1.755, 4096, 14.4, l2=37.0, sustained=0.75, start=3100),
    100: Chip(148, 1.85, 8192, 28.0),
}
# Share of the memory's rate that reads reach: 0.81 (H200) to 0.97 (H100 PCIe) in the same files.
MEMORY_SHARE = 0.9
# Bytes per clock to and from an SM's shared memory: 32 banks of 4 (CUDA C++ programming guide).
SHARED_BYTES = 128
# Instructions per element after the product, with GELU (compiled: docs/design/kernels.md), and how many lanes an SM
# issues per clock. STORE of them store, which slices hide behind the next slice's arithmetic: fitted to 0.97 of cuBLAS
# without slices (#1038) and 0.98 with two (#1065).
EPILOGUE, STORE, ISSUE = 12.0, 1.2, 128


def candidates(M: int, N: int, K: int, dtype: str, arch: int) -> list[Config]:
    """Return configurations of ``[M, K] @ [N, K].T`` to time on an architecture, most promising first.

    The configuration that lookup would choose comes first, the library is always among them, and all fit the chip's
    shared memory. The order is the same in every process.
    """
    library = Config("library", dtype)
    if K == 0 or (arch != 0 and dtype == "float32"):
        return [library]
    chosen = get_config(M, N, K, dtype, arch, aligned=True)
    if arch == 0:
        return list(dict.fromkeys((chosen, *_interpreted(M, dtype), library)))
    fitting = [c for c in _tiled(M, N, K, dtype, arch) if shared_bytes(c, arch) <= SHARED_MEMORY.get(arch, 101376)]
    # The Hopper kernel comes first: that it loads and stores beside its products is what published kernels gain by.
    fitting.sort(key=lambda config: (config.kernel != "hopper", modelled_clocks(config, M, N, K, arch)))
    return list(dict.fromkeys((chosen, *fitting, library)))


def _tiled(M: int, N: int, K: int, dtype: str, arch: int) -> Iterator[Config]:
    def config(kernel: str, tile: Tile) -> Config:
        block_m, block_n, block_k, num_warps, num_stages = tile
        block_k = block_k // 2 if dtype == "tf32" else block_k
        return Config(kernel, dtype, block_m, block_n, block_k, num_warps, num_stages)

    tma = arch in TMA_ARCHS
    rows = 2 * max(M, 16)  # most rows of a taller tile would be past the end
    pointer_tiles = (*SMALL_TILES, *MIDDLE_TILES) if M <= 256 else MIDDLE_TILES
    if not tma:
        pointer_tiles = (*pointer_tiles, *POINTER_TILES)
    for tile in pointer_tiles:
        if arch in MORE_WARPS.get(tile, ()):
            tile = (*tile[:3], 8, tile[4])
        if tile[0] >= rows or (tile[0] < 64 and tile[0] < M // 4):
            continue
        yield config("pointer", tile)
    if not tma or M <= 256 or dtype == "tf32":
        return
    if arch == 90 and M >= 1024:
        for block_m, block_n, block_k, stages, subtiles in HOPPER_TILES:
            yield Config("hopper", dtype, block_m, block_n, block_k, 8, stages, persistent=1, subtiles=subtiles)
    for tile in TMA_TILES:
        if tile[0] >= rows:
            continue
        plain = config("tma", tile)
        yield plain
        # Persistent blocks pay only if each has several tiles.
        if _tiles(plain, M, N) > 2 * chip_of(arch).sms:
            # In two slices the widest tile spills on sm_100 with Triton 3.8 and 3.9.
            in_two = tile[1] == 128 or (tile[1] == 256 and arch < 100)
            for subtiles in (1, 2) if in_two else (1,):
                looped = dataclasses.replace(plain, persistent=1, subtiles=subtiles)
                yield dataclasses.replace(looped, persistent=resident_blocks(looped, arch))


def _interpreted(M: int, dtype: str) -> Iterator[Config]:
    """Yield a few configurations that the interpreter runs quickly, to rehearse tuning without a GPU."""
    plain = default_config(M, dtype, 0)
    yield plain
    yield dataclasses.replace(plain, block_m=32)
    yield dataclasses.replace(plain, block_k=64)


def chip_of(arch: int) -> Chip:
    return CHIPS[max((known for known in CHIPS if known <= arch), default=80)]


def _tiles(config: Config, M: int, N: int) -> int:
    return math.ceil(M / config.block_m) * math.ceil(N / config.block_n)


def _itemsize(config: Config) -> int:
    return 4 if config.dtype in ("tf32", "float32") else 2


def shared_bytes(config: Config, arch: int) -> int:
    """Return the bytes of shared memory of a block, at most 1 KB too much; tests/kernel/test_compile.py checks it."""
    operands = (config.block_m + config.block_n) * config.block_k * _itemsize(config)
    # wgmma and its successor read their operands from shared memory; mma.sync keeps one set in registers.
    in_place = 90 <= arch < 120 and config.block_m >= 64
    pipeline = operands * (config.num_stages if in_place else max(config.num_stages - 1, 1))
    store = config.block_m * config.block_n // config.subtiles * _itemsize(config) if config.persistent else 0
    if config.kernel == "hopper":  # each group of warps has its own buffers for its stores and its bias
        return pipeline + config.consumers * (store + 4 * config.block_n) + 512
    return pipeline + store + 1024


def resident_blocks(config: Config, arch: int) -> int:
    """Return how many blocks an SM holds, by shared memory and an estimate of registers; at least 1."""
    if config.kernel == "hopper":
        return 1
    threads = 32 * config.num_warps
    sums = config.block_m * config.block_n // threads
    # Pointers, masks and, in TF32, converted operands come on top; fitted to kernels compiled for sm_80 to sm_120.
    held = {"tma": 1.0, "pointer": 3.0 if config.dtype == "tf32" else 1.6}[config.kernel]
    registers = min(255, int(sums * held) + 64)
    by_memory = SHARED_MEMORY.get(arch, 101376) // shared_bytes(config, arch)
    return max(1, min(by_memory, 65536 // (registers * threads), 16))


def step_clocks(config: Config, arch: int, cluster: int = 1) -> float:
    """Return the modelled clocks of one step of the loop over K: the most of matrix product, L2 and shared memory.

    cluster: blocks that load one tile of the weight together (multicast), each a part of it.
    """
    chip = chip_of(arch)
    itemsize = _itemsize(config)
    # mma.sync, which serves tiles below 64 rows, is slower on sm_90, but they wait for L2 all the same.
    rate = chip.matrix * (2 / itemsize) * chip.sustained
    loaded = (config.block_m + config.block_n) * config.block_k * itemsize
    asked = (config.block_m + config.block_n / cluster) * config.block_k * itemsize
    if arch >= 90 and config.block_m >= 64:  # 64 rows at a time read all of the other operand
        readers_m, readers_n = config.block_m // 64, 1
    else:
        readers_m = min(2 if config.num_warps == 4 else 4, config.block_m // 16)
        readers_n = config.num_warps // readers_m
    read = (config.block_m * readers_n + config.block_n * readers_m) * config.block_k * itemsize
    return max(
        2 * config.block_m * config.block_n * config.block_k / rate,
        asked / chip.l2,
        (loaded + read) / SHARED_BYTES,
    )


def modelled_clocks(
    config: Config, M: int, N: int, K: int, arch: int, *, epilogue: float = EPILOGUE, cluster: int = 1
) -> float:
    """Return a launch's clocks, modelled by matrix rate, L2, memory, latency and overlap: to rank, not to report.

    epilogue: instructions per element after the product. cluster: as in ``step_clocks``.
    """
    chip = chip_of(arch)
    steps = math.ceil(K / config.block_k)
    per_sm = math.ceil(_tiles(config, M, N) / chip.sms)
    specialized = config.kernel == "hopper"
    resident = 1 if specialized else min(per_sm, config.persistent or resident_blocks(config, arch))
    product = steps * step_clocks(config, arch, cluster)
    after = config.block_m * config.block_n * (epilogue - STORE + STORE / config.subtiles) / ISSUE
    if resident > 1 or (specialized and config.consumers == 2):  # one tile's epilogue hides behind another's product
        busy = per_sm * max(product, after) + min(product, after)
    else:
        # A persistent block starts its next tile with a load, unless a warp of its own has loaded ahead.
        gap = (0 if specialized else LATENCY) if config.persistent else chip.start
        busy = per_sm * (product + after) + (per_sm - 1) * gap
    waiting = math.ceil(per_sm / resident) * math.ceil(steps / config.num_stages) * LATENCY
    memory = (M * K + N * K + M * N) * _itemsize(config) / (chip.memory * MEMORY_SHARE * chip.sms)
    return max(busy, waiting, memory) + LATENCY
