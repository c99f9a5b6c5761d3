"""Print what the cycle model says of sm_90's kernels beside cuBLAS and eager PyTorch, for docs/performance-log.md.

Modelled, not measured. The model's constants and their sources are in bert_fused/tune/candidates.py.
"""

import argparse
import math
from dataclasses import replace

from bert_fused.kernels.configs import Config
from bert_fused.tune.candidates import ISSUE, LATENCY, MEMORY_SHARE, chip_of, modelled_clocks, step_clocks
from bert_fused.tune.shapes import MODELS

ARCH = 90
ROWS = (1024, 2048, 4096, 8192, 16384, 32768)
# Instructions per element of GELU in eager's pass (compiled for sm_90).
ERF = 25
# Bytes up to which H100's L2 keeps its rate: github.com/te42kyfo/gpu-benches, gpu-l2-cache/h100_pcie.txt.
L2_SIZE = 33e6


SHIPPED = Config("tma", "bfloat16", 128, 128, 64, 4, 3)
PERSISTENT = Config("tma", "bfloat16", 128, 256, 64, 8, 3, persistent=1, subtiles=2)
COOPERATIVE = Config("hopper", "bfloat16", 128, 256, 64, 8, 4, persistent=1, subtiles=2)
PING_PONG = Config("hopper", "bfloat16", 128, 128, 64, 8, 5, persistent=1, subtiles=2)
# Each with the blocks that load a tile of the weight together.
KERNELS = {
    "shipped": (SHIPPED, 1),
    "persistent": (PERSISTENT, 1),
    "cooperative": (COOPERATIVE, 1),
    "ping-pong": (PING_PONG, 1),
    "ping-pong, multicast": (PING_PONG, 2),
}


def library_clocks(M: int, N: int, K: int) -> float:
    """Return the clocks of cuBLAS: the best of its tiles, in clusters of two, with nothing exposed but the product."""
    chip = chip_of(ARCH)
    product = min(
        math.ceil(math.ceil(M / m) * math.ceil(N / n) / chip.sms)
        * math.ceil(K / 64)
        * step_clocks(replace(SHIPPED, block_m=m, block_n=n), ARCH, 2)
        for m, n in ((128, 256), (256, 128), (128, 128), (64, 256), (128, 64), (64, 128))
    )
    return max(product, 2 * (M * K + N * K + M * N) / (chip.sms * chip.memory * MEMORY_SHARE)) + LATENCY


def eager_clocks(M: int, N: int, K: int) -> float:
    """Return the clocks of cuBLAS and of a pass that computes GELU, from L2 where it holds both tensors."""
    chip = chip_of(ARCH)
    moved = 4 * M * N
    rate = chip.l2 if moved <= L2_SIZE else chip.memory * MEMORY_SHARE
    return library_clocks(M, N, K) + max(moved / rate, M * N * ERF / ISSUE) / chip.sms + LATENCY


def table() -> str:
    """Return a Markdown table: microseconds of cuBLAS and eager, then cuBLAS' and eager's times over each kernel's."""
    lines = [" | ".join(("| K, N, M", "cuBLAS, µs", "eager, µs", *KERNELS)) + " |", "|---" * (3 + len(KERNELS)) + "|"]
    for K, N in MODELS.values():
        for M in ROWS:
            library, eager = library_clocks(M, N, K), eager_clocks(M, N, K)
            cells = [f"{clocks / (1e3 * chip_of(ARCH).ghz):.1f}" for clocks in (library, eager)]
            for config, cluster in KERNELS.values():
                clocks = modelled_clocks(config, M, N, K, ARCH, cluster=cluster)
                cells.append(f"{library / clocks:.2f}, {eager / clocks:.2f}")
            lines.append(f"| {K}, {N}, {M} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    argparse.ArgumentParser(prog="python -m benchmarks modelled", description=__doc__).parse_args(argv)
    print(table())
    return 0
