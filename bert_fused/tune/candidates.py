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
POINTER_TILES: tuple[Tile, ...] = ((128, 128, 32, 8, 4),)
# Tiles that get 8 warps on these architectures: with 4 a thread gets too few registers (the second: with Triton 3.9).
MORE_WARPS: dict[Tile, tuple[int, ...]] = {(64, 64, 64, 4, 4): (86, 89), (64, 32, 128, 4, 4): (80, 86, 89)}


@dataclass(frozen=True)
class Chip:
    """A GPU in the cycle model.

    ghz: boost clock. matrix: 16-bit operations per SM and clock, two for a multiply-add. memory: bytes from the
    device's memory per SM and clock.
    """

    sms: int
    ghz: float
    matrix: int
    memory: float


# A100 80 GB, L40S, H100 SXM, B200; any other architecture is modelled as the nearest older one.
CHIPS = {
    80: Chip(108, 1.41, 2048, 13.4),
    89: Chip(142, 2.52, 1024, 2.4),
    90: Chip(132, 1.755, 4096, 14.4),
    100: Chip(148, 1.85, 8192, 28.0),
}
# Bytes per clock from L2 to an SM, and to and from its shared memory; clocks until a load arrives.
L2_BYTES, SHARED_BYTES, LATENCY = 64, 128, 800
# Instructions per element after the product, and how many lanes an SM issues per clock.
EPILOGUE, ISSUE = 12, 128


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
    fitting.sort(key=lambda config: modelled_clocks(config, M, N, K, arch))
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
    return pipeline + store + 1024


def resident_blocks(config: Config, arch: int) -> int:
    """Return how many blocks an SM holds, by shared memory and an estimate of registers; at least 1."""
    threads = 32 * config.num_warps
    sums = config.block_m * config.block_n // threads
    # Pointers, masks and, in TF32, converted operands come on top; fitted to kernels compiled for sm_80 to sm_120.
    held = {"tma": 1.0, "pointer": 3.0 if config.dtype == "tf32" else 1.6}[config.kernel]
    registers = min(255, int(sums * held) + 64)
    by_memory = SHARED_MEMORY.get(arch, 101376) // shared_bytes(config, arch)
    return max(1, min(by_memory, 65536 // (registers * threads), 16))


def step_clocks(config: Config, arch: int) -> float:
    """Return the modelled clocks of one step of the loop over K: the most of matrix product, L2 and shared memory."""
    chip = chip_of(arch)
    itemsize = _itemsize(config)
    rate = chip.matrix * 2 / itemsize
    if arch >= 90 and config.block_m < 64:
        rate /= 2
    loaded = (config.block_m + config.block_n) * config.block_k * itemsize
    if arch >= 90 and config.block_m >= 64:  # 64 rows at a time read all of the other operand
        readers_m, readers_n = config.block_m // 64, 1
    else:
        readers_m = min(2 if config.num_warps == 4 else 4, config.block_m // 16)
        readers_n = config.num_warps // readers_m
    read = (config.block_m * readers_n + config.block_n * readers_m) * config.block_k * itemsize
    return max(
        2 * config.block_m * config.block_n * config.block_k / rate,
        loaded / L2_BYTES,
        (loaded + read) / SHARED_BYTES,
    )


def modelled_clocks(config: Config, M: int, N: int, K: int, arch: int) -> float:
    """Return a launch's clocks, modelled by matrix rate, L2, memory, latency and overlap: to rank, not to report."""
    chip = chip_of(arch)
    itemsize = _itemsize(config)
    steps = math.ceil(K / config.block_k)
    step = step_clocks(config, arch)
    blocks = _tiles(config, M, N)
    per_sm = math.ceil(blocks / chip.sms)
    resident = min(per_sm, config.persistent or resident_blocks(config, arch))
    product = steps * step
    epilogue = config.block_m * config.block_n * EPILOGUE / ISSUE
    if resident > 1:  # one block's epilogue hides behind another's product
        busy = per_sm * max(product, epilogue) + min(product, epilogue)
    else:
        busy = per_sm * (product + epilogue) + (per_sm - 1) * LATENCY
    waiting = math.ceil(per_sm / resident) * math.ceil(steps / config.num_stages) * LATENCY
    memory = (M * K + N * K + M * N) * itemsize / (chip.memory * chip.sms)
    return max(busy, waiting, memory) + LATENCY
