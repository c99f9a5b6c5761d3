"""What is executed: every kernel that is shipped or offered to the tuner, in variants and shapes that meet its edges.

A tile is compiled three times. Together these have both 16-bit dtypes, three activations, the pre-activation stored and
not, a bias and none, K a multiple of the tile and not, and rows of each kind that Triton specialises for. Each is
executed for a K of at most one step and for one of more than twice the pipeline's stages. The tiles that serve gated
activations are compiled once more, each for one of these.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.static.sass import offered_configs
from bert_fused.kernels.configs import TMA_ARCHS, Config
from bert_fused.kernels.gated import gated, gated_configs
from bert_fused.kernels.lookup import shipped_configs

ARCHS = (80, 86, 89, 90, 100, 120)
ACTIVATIONS = ("gelu", "gelu_tanh", "tanh")
# Of each tile; the Hopper kernel, which no interpreter runs, is executed in more.
VARIANTS, HOPPER_VARIANTS = 3, 12


@dataclass(frozen=True)
class Linear:
    """A forward kernel and the shapes ``(M, N, K)`` to execute it for.

    rows: as in ``compile_linear``. first_row: rows before it are not in memory, and their blocks are not executed.
    """

    arch: int
    config: Config
    activation: str
    save_preact: bool
    bias: bool
    even_k: bool
    rows: int
    shapes: tuple[tuple[int, int, int], ...]
    first_row: int = 0

    def __str__(self) -> str:
        flags = f"{'' if self.save_preact else ' alone'}{'' if self.bias else ' no bias'}"
        flags += " far" if self.first_row else ""
        return f"sm_{self.arch} {self.config.dtype} {self.config} {self.activation}{flags}"


@dataclass(frozen=True)
class Elementwise:
    """``act_fwd_kernel``, or ``act_bwd_kernel`` if backward, and the shape ``(M, N)`` to execute it for.

    first_row: as in ``Linear``; for the backward kernel.
    """

    arch: int
    dtype: str
    activation: str
    backward: bool
    shape: tuple[int, int]
    first_row: int = 0

    def __str__(self) -> str:
        kernel = "act_bwd" if self.backward else "act_fwd"
        return f"sm_{self.arch} {self.dtype} {kernel} {self.activation}{' far' if self.first_row else ''}"


Case = Linear | Elementwise


def tiles(arch: int) -> list[Config]:
    """Return every configuration shipped for an architecture or offered to its tuner; one for both 16-bit dtypes."""
    every = dict.fromkeys((*shipped_configs(arch), *offered_configs(arch)))
    return list(dict.fromkeys(c if c.dtype == "tf32" else dataclasses.replace(c, dtype="float16") for c in every))


def linear_cases(arch: int) -> Iterator[Linear]:
    for index, tile in enumerate(tiles(arch)):
        for variant in range(HOPPER_VARIANTS if tile.kernel == "hopper" else VARIANTS):
            yield _linear(arch, tile, index, variant)


def gated_cases(arch: int) -> Iterator[Linear]:
    """Yield a case for each tile, half of them with the second half activated. TMA's tiles divide a half."""
    configs = dict.fromkeys(
        c if c.dtype == "tf32" else dataclasses.replace(c, dtype="float16") for c in gated_configs(arch)
    )
    for index, tile in enumerate(configs):
        case = _linear(arch, tile, index, index % VARIANTS)
        if tile.kernel == "tma":
            case = dataclasses.replace(case, shapes=tuple((M, 2 * tile.block_n, K) for M, _, K in case.shapes))
        yield dataclasses.replace(case, activation=gated(case.activation, ("first", "second")[index // 2 % 2]))


def _linear(arch: int, tile: Config, index: int, variant: int) -> Linear:
    # Divided by different numbers, so that each choice meets each other one over the tiles.
    dtype = tile.dtype if tile.dtype == "tf32" else ("float16", "bfloat16")[(index + variant) % 2]
    m, n, k = tile.block_m, tile.block_n, tile.block_k
    long_k = (2 * tile.num_stages + 1) * k
    ragged = variant % 3 == 2 and k >= 32
    rows = (17, 16, 1 if m <= 32 else 17)[variant % 3]
    tile = dataclasses.replace(tile, num_stages=tile.num_stages - variant // 6)
    M = {17: m + m // 2 + 5, 16: m + 16, 1: 1}[rows]
    shapes = ((M, n + 16, long_k + k // 2), (M, n, k // 2)) if ragged else ((M, n + 16, long_k), (M, n, k))
    return Linear(
        arch,
        dataclasses.replace(tile, dtype=dtype),
        ACTIVATIONS[(index + variant) % 3],
        save_preact=(index // 2 + variant + variant // 6) % 2 == 0,
        bias=(index // 3 + variant) % 3 != 0,
        even_k=not ragged,
        rows=rows,
        shapes=shapes,
    )


def elementwise_cases(arch: int) -> Iterator[Elementwise]:
    for dtype in ("float16", "bfloat16", "float32"):
        for activation in ACTIVATIONS:
            yield Elementwise(arch, dtype, activation, False, (13, 272))
            yield Elementwise(arch, dtype, activation, True, (141, 272))
        for backward in (False, True):
            yield Elementwise(arch, dtype, gated("gelu", "first"), backward, (141, 272))


def far_cases(arch: int) -> Iterator[Case]:
    """Yield cases whose matrices have more than 2^32 elements, of which only the last rows are in memory."""
    first_row, N, K = 2**24, 272, 256
    configs = [Config("pointer", "bfloat16", 64, 64, 64, num_warps=4, num_stages=3)]
    if arch in TMA_ARCHS:
        configs.append(Config("tma", "float16", 128, 128, 64, num_warps=4, num_stages=3))
    for config in configs:
        yield Linear(arch, config, "gelu", True, True, True, 16, ((first_row + 144, N, K),), first_row)
    shape = (first_row + 144, N, K)
    yield Linear(arch, configs[0], gated("gelu", "second"), True, True, True, 16, (shape,), first_row)
    for activation in ("gelu", gated("gelu", "first")):
        yield Elementwise(arch, "bfloat16", activation, True, (first_row + 141, N), first_row)


def cases(arch: int) -> list[Case]:
    return [*linear_cases(arch), *gated_cases(arch), *elementwise_cases(arch), *far_cases(arch)]


def choice(arch: int) -> list[Case]:
    """Return the cases that ``make test`` runs: some seven, evenly spread, and on some those of large tensors."""
    every = [*linear_cases(arch), *elementwise_cases(arch)]
    some = [*every[:: len(every) // 5], list(gated_cases(arch))[-1]]
    return [*some, *(far_cases(arch) if arch in (80, 90, 100) else ())]
