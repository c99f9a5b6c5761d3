"""The benchmarks' clocks and rivals on an NVIDIA GPU, before a session is spent on them. Run by ``make gpu-test``."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from gpu import DEVICE, MARKS, needs_gpu

from benchmarks import linear, models, run
from benchmarks.cases import Case
from benchmarks.measure import Problem, measure
from bert_fused.timing import capture, event_sampler, graph_sampler
from bert_fused.tune.accuracy import check

pytestmark = [*MARKS, needs_gpu]

MODULE = Case("modules", "small", "bfloat16", "gelu", 256, 512, 256)
POOLER = Case("pooler", "small", "bfloat16", "tanh", 8, 256, 256, 8, 16)
MODEL = Case("models", "tiny", "bfloat16", "gelu", 256, 1024, 256, 4, 64)


def test_a_failed_capture_leaves_the_next_one_in_peace() -> None:
    x = torch.randn(256, 256, device=DEVICE)
    with pytest.raises(RuntimeError):
        capture([lambda: x.sum().item()])
    torch.cuda.empty_cache()
    sample = graph_sampler([lambda: x @ x] * 20)
    assert sample() > 0
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


def test_a_failed_capture_leaves_random_numbers() -> None:
    x = torch.randn(256, 256, device=DEVICE)
    with pytest.raises(RuntimeError):
        capture([lambda: x.sum().item()])
    assert 0 <= torch.rand(1, device=DEVICE).item() < 1


def test_memory_that_an_implementation_allocates_is_poisoned() -> None:
    """Else memory that still holds the right result would pass for a result. A CPU's allocator promises no reuse."""
    poisoned: list[bool] = []

    def call(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        poisoned.append(bool(torch.empty(len(x), len(weight), device=DEVICE).isnan().all()))
        return F.gelu(F.linear(x, weight, bias))

    check(call, "gelu", *(torch.randn(*shape, device=DEVICE) for shape in ((512, 64), (1024, 64), (1024,))))
    assert all(poisoned)


@pytest.mark.alone
def test_graph_and_event_samplers_agree_on_a_long_product() -> None:
    """A product long enough that launches are no part of it."""
    a = torch.randn(4096, 4096, device=DEVICE).bfloat16()
    calls = [lambda: a @ a] * 20
    graph, events = graph_sampler(calls), event_sampler(calls)
    ratios = sorted(graph() / events() for _ in range(9))
    assert 0.9 < ratios[4] < 1.1


@pytest.mark.parametrize(
    "case",
    [MODULE, POOLER, dataclasses.replace(MODULE, suite="training"), MODEL, dataclasses.replace(MODEL, ragged=True)],
    ids=str,
)
def test_every_rival_gets_its_figures(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.LAYERS_AND_HEADS, "tiny", (2, 4))
    torch.compiler.reset()
    make = models.problem if case.suite == "models" else linear.problem
    with torch.set_grad_enabled(case.suite == "training"):
        problem: Problem = make(case, "cuda")
        rows = measure(problem, device="cuda", rounds=3)
    for row in rows:
        assert row["error"] is None, row
        uncaptured = "CUDA graph" in row["implementation"] or (case.ragged and "unpadded" in row["implementation"])
        assert row["gpu"]["method"] == ("events" if uncaptured else "graph"), row["implementation"]
        assert row["gpu"]["median_us"] > 0
        assert row["wall"]["median_us"] > 0
    names = {row["implementation"] for row in rows}
    assert {"ours", "eager", "eager again", "torch.compile"} <= names
    assert ("ours in a CUDA graph" in names) == (case.suite != "training")


def test_a_quick_run_on_the_gpu_succeeds(tmp_path: Path) -> None:
    out = f"{tmp_path}/r.jsonl"
    arguments = ["--device", "cuda", "--quick", "--suite", "pooler", "--rounds", "3", "--out", out]
    assert run.main([*arguments, "--commit", "0" * 40]) == 0
