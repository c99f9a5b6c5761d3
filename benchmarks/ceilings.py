"""What this machine reaches at best, measured in the same run: a large matrix product, and a large copy."""

import functools
from typing import Any

import torch

from bert_fused.timing import graph_sampler, interleave, repeated, summarize, wall_sampler

ROUNDS = 10


@functools.cache
def matmul_tflops(device: str, dtype: str) -> float:
    """TFLOP/s of a product of square random matrices; ``dtype`` as in a case, torch's fp32 setting as it is."""
    size = 256 if device == "cpu" else 4096 if dtype == "float32" else 8192
    kind = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    a, b = (torch.randn(size, size, device=device).to(kind) for _ in range(2))
    return 2e-6 * size**3 / _microseconds(device, lambda: torch.mm(a, b))


@functools.cache
def copy_tb_per_s(device: str) -> float:
    """TB/s of a copy, bytes read and written."""
    size = 2**24 if device == "cpu" else 2**30
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return 2e-6 * size / _microseconds(device, lambda: target.copy_(source))


def roofline_us(device: str, dtype: str, flops: float, bytes: float) -> float:
    """The least time that the measured ceilings allow."""
    return max(1e-6 * flops / matmul_tflops(device, dtype), 1e-6 * bytes / copy_tb_per_s(device))


def _microseconds(device: str, call: Any) -> float:
    calls = repeated([call])
    sampler = graph_sampler(calls) if device == "cuda" else wall_sampler(calls, lambda: None)
    return summarize(interleave({"it": sampler}, rounds=ROUNDS)["it"]).median
