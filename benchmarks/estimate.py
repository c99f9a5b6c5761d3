"""What a configuration may take, by arithmetic. Nothing here was measured: every figure is modelled.

Two clocks of a multiprocessor run beside each other: matrix instructions, and the epilogue's other instructions (four a
cycle, 32 elements each). With two blocks on a multiprocessor one's epilogue hides behind the other's products.
"""

import math
from dataclasses import dataclass

# A launch, the first loads and the last stores: an assumption.
FIXED_US = 2.6


@dataclass(frozen=True)
class Card:
    """tflops: dense bf16 products with fp32 accumulation. Source: NVIDIA's data sheets, boost clocks."""

    name: str
    sms: int
    ghz: float
    tflops: float
    tb_per_s: float


CARDS = {
    80: Card("A100 SXM 80 GB", 108, 1.41, 312.0, 2.04),
    86: Card("A10", 72, 1.695, 125.0, 0.6),
    89: Card("L40S", 142, 2.52, 362.0, 0.864),
    90: Card("H100 SXM", 132, 1.83, 989.0, 3.35),
    100: Card("B200", 148, 1.85, 2250.0, 8.0),
    120: Card("RTX 5090", 170, 2.41, 209.5, 1.79),
}


def bytes_moved(M: int, N: int, K: int, itemsize: int) -> float:
    """x, W and the output, once each."""
    return float(itemsize * (M * K + N * K + M * N))


def roofline_us(arch: int, flops: float, bytes: float, dtype: str) -> float:
    """The least time that the card's data sheet allows."""
    card = CARDS[arch]
    return max(1e-6 * flops / (card.tflops * _rate(dtype)), 1e-6 * bytes / card.tb_per_s)


def linear_us(
    arch: int,
    shape: tuple[int, int, int],
    tile: tuple[int, int],
    dtype: str,
    bytes: float,
    ctas_per_sm: int,
    epilogue_per_element: float,
) -> float:
    """A fused linear layer of M, N and K that moves ``bytes``, in tiles of rows and columns."""
    card = CARDS[arch]
    M, N, K = shape
    block_m, block_n = tile
    tiles = math.ceil(M / block_m) * math.ceil(N / block_n)
    tiles_per_sm = math.ceil(tiles / card.sms)
    cycles_per_us = 1e3 * card.ghz
    flops_per_us = 1e6 * card.tflops * _rate(dtype) / card.sms
    product_us = 2.0 * block_m * block_n * K / flops_per_us
    epilogue_us = epilogue_per_element * block_m * block_n / (4 * 32) / cycles_per_us
    if min(ctas_per_sm, tiles_per_sm) > 1:
        busy = max(tiles_per_sm * product_us + epilogue_us, product_us + tiles_per_sm * epilogue_us)
    else:
        busy = tiles_per_sm * (product_us + epilogue_us)
    return FIXED_US + max(busy, 1e-6 * bytes / card.tb_per_s)


def pass_us(arch: int, bytes: float) -> float:
    """One pass over memory."""
    return FIXED_US + 1e-6 * bytes / CARDS[arch].tb_per_s


def _rate(dtype: str) -> float:
    """TF32 products run at half the rate of 16-bit ones."""
    return 0.5 if dtype == "tf32" else 1.0
