"""One case of a benchmark: its rivals are checked against fp64, timed in turns, and each gives one record."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bert_fused.accuracy import check
from bert_fused.timing import buffer_count, graph_sampler, interleave, ratio, rotated, summarize, wall_sampler

SEQUENCE = 128


@dataclass(frozen=True)
class Case:
    """One shape, and who competes: "riskiest" and "compile" name one rival, "configurations" is every candidate."""

    op: str
    model: str
    M: int
    N: int
    K: int
    activation: str
    rivals: str = "configurations"
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        return f"{self.op} {self.model} M={self.M} K={self.K} N={self.N} {self.dtype} {self.activation} ({self.rivals})"


@dataclass(frozen=True)
class Implementation:
    """``call(x, weight, bias)``; ``computes`` is the activation it applies, where that is not the case's."""

    name: str
    call: Callable[[Tensor, Tensor, Tensor], Tensor]
    config: str = ""
    computes: str | None = None

    @property
    def label(self) -> str:
        return f"{self.name}: {self.config}" if self.config else self.name


def make_buffers(case: Case, device: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Sets of x, weight and bias, so many that none is in cache when its turn comes."""
    dtype = getattr(torch, case.dtype)
    g = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.float32, generator=g)

    cache = torch.cuda.get_device_properties(device).L2_cache_size if device == "cuda" else 0
    sets = buffer_count((case.M + case.N) * case.K * dtype.itemsize, cache)
    shape = (case.M, SEQUENCE, case.K) if case.op == "cls_pool" else (case.M, case.K)
    return [
        (normal(*shape).to(dtype), (0.02 * normal(case.N, case.K)).to(dtype), (0.02 * normal(case.N)).to(dtype))
        for _ in range(sets)
    ]


@torch.no_grad()
def measure(
    case: Case, rivals: Sequence[Implementation], *, device: str, rounds: int, deadline: float = math.inf
) -> list[dict[str, Any]]:
    """Check and time the rivals of one case. One record each; one that fails has an error and no figure."""
    buffers = make_buffers(case, device)
    synchronize: Callable[[], Any] = torch.cuda.synchronize if device == "cuda" else lambda: None
    rows: dict[str, dict[str, Any]] = {}
    samplers: dict[str, dict[str, Callable[[], float]]] = {"gpu": {}, "wall": {}}
    for rival in rivals:
        begin = time.monotonic()
        if begin > deadline:
            break
        row: dict[str, Any] = {"implementation": rival.name, "config": rival.config, "error": None}
        try:
            row |= check(rival.call, rival.computes or case.activation, *buffers[0])
            calls = rotated(rival.call, buffers)
            if device == "cuda":
                samplers["gpu"][rival.label] = graph_sampler(calls)
            samplers["wall"][rival.label] = wall_sampler(calls, synchronize)
        except Exception as error:  # that a rival does not compile or run is a result as well
            row["error"] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            synchronize()  # raises if the GPU can do no more
        row["prepare_seconds"] = round(time.monotonic() - begin, 3)
        rows[rival.label] = row

    for clock, of_clock in samplers.items():
        samples = interleave(of_clock, rounds=rounds, deadline=deadline)
        for label, row in rows.items():
            taken = samples.get(label)
            row[clock] = (
                _figures(taken, {b: samples[b] for b in ("eager", "F.linear") if b in samples}) if taken else None
            )
    for row in rows.values():
        figures = row["gpu"] or row["wall"]
        row["tflops"] = 2e-6 * case.M * case.N * case.K / figures["median_us"] if figures else None
    return list(rows.values())


def measure_ceilings(device: str) -> list[dict[str, Any]]:
    """What this machine reaches at best: a large bf16 matrix product, and a large copy (bytes read and written)."""
    size, copied = (8192, 2**30) if device == "cuda" else (256, 2**24)
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    source = torch.randn(copied // 2, device=device, dtype=torch.float32).bfloat16()
    target = torch.empty_like(source)
    records = []
    for op, function, arguments in (("matmul", torch.mm, (a, b)), ("copy", target.copy_, (source,))):
        calls = rotated(function, [arguments])
        sampler = graph_sampler(calls) if device == "cuda" else wall_sampler(calls, lambda: None)
        samples = interleave({op: sampler}, rounds=10)[op]
        figures = _figures(samples, {})
        seconds = 1e-6 * figures["median_us"]
        rate = {"tflops": 2e-12 * size**3 / seconds} if op == "matmul" else {"tb_per_s": 2e-12 * copied / seconds}
        case = {"op": op, "dtype": "bfloat16", "size": size if op == "matmul" else copied}
        clock = "gpu" if device == "cuda" else "wall"
        records.append({"case": case, "implementation": "PyTorch", "error": None, clock: figures} | rate)
    return records


def _figures(samples: list[float], baselines: dict[str, list[float]]) -> dict[str, Any]:
    summary = summarize(samples)
    return {
        "median_us": summary.median,
        "p20_us": summary.p20,
        "p80_us": summary.p80,
        "ratio_to": {name: dataclasses.asdict(ratio(baseline, samples)) for name, baseline in baselines.items()},
        "samples_us": [round(sample, 4) for sample in samples],
    }
