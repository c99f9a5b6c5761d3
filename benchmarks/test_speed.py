"""``pytest benchmarks``: quick figures of ours and eager for pytest-benchmark, which keeps and compares them.

Times are wall-clock and synchronised; on a GPU, ``extra_info`` also has samples of the GPU's clock. Tests do not take
turns, so for ratios use ``python -m benchmarks run``.
"""

import itertools
import time
from typing import Any

import pytest
import torch

from benchmarks import linear, models
from benchmarks.cases import SUITES, Case, cases
from benchmarks.measure import checked
from bert_fused.timing import graph_sampler, repeated
from bert_fused.tune.search import fp32_products

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS = 10


def synchronized_time() -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@pytest.mark.parametrize("name", ["eager", "ours"])
@pytest.mark.parametrize("case", cases(SUITES, DEVICE, quick=True), ids=str)
@pytest.mark.benchmark(timer=synchronized_time)
def test_speed(case: Case, name: str, benchmark: Any) -> None:
    benchmark.group = str(case)
    make = models.problem if case.suite == "models" else linear.problem
    with fp32_products(case.dtype), torch.set_grad_enabled(case.suite == "training"):
        problem = make(case, DEVICE)
        (rival,) = (rival for rival in problem.implementations if rival.name == name)
        benchmark.extra_info |= {"config": rival.config, "accuracy": checked(problem, rival)}
        calls = repeated(rival.calls(problem.sets), problem.min_calls)
        turns = itertools.cycle(calls)
        benchmark.pedantic(lambda: next(turns)(), rounds=ROUNDS, iterations=len(calls), warmup_rounds=1)
        if DEVICE == "cuda":
            sample = graph_sampler(calls)
            benchmark.extra_info["gpu_us"] = [sample() for _ in range(ROUNDS)]
