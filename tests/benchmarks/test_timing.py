"""Can the benchmarks tell a slower function from an equal one? On this machine, and in theory."""

import contextlib
import math
import random
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.cases import Case
from benchmarks.linear import problem
from benchmarks.measure import Implementation, Problem, measure
from bert_fused.timing import Ratio, buffer_count, capture, interleave, ratio, repeated, summarize, wall_sampler

CASE = Case("modules", "small", "float32", "gelu", 8, 512, 256)


def slower(rival: Implementation, tenths: int) -> Implementation:
    """The same, made slower by repeating so many of every ten calls."""

    def calls(sets: Any) -> list[Any]:
        right = rival.calls(sets)
        return [(lambda call=call: (call(), call())) if i % 10 < tenths else call for i, call in enumerate(right)]

    return Implementation("slower", calls)


@pytest.mark.alone
def test_timing_here_finds_equals_equal_and_a_tenth_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager against itself, within 3 %; against eager with a tenth of its calls made twice, 10 %."""
    full = problem(CASE, "cpu")
    eager = next(rival for rival in full.implementations if rival.name == "eager")
    again = Implementation("eager again", eager.calls)
    sets = repeated(full.sets, 20)[:20]
    planted = Problem([eager, again, slower(eager, 1)], sets, lambda *_: {}, full.flops, full.bytes)
    # Samples shorter than the scheduler's slices: another process spoils some of them, not all of them a little.
    with torch.no_grad():
        rows = {row["implementation"]: row for row in measure(planted, device="cpu", rounds=400)}
    same, slow = (rows[name]["wall"]["ratio_to"]["eager"] for name in ("eager again", "slower"))
    assert abs(same["median"] - 1) < 0.03
    assert same["high"] - same["low"] < 0.06
    assert slow["high"] < 1
    assert slow["median"] == pytest.approx(1 / 1.1, abs=0.03)


def drifting(rounds: int, *speeds: float, seed: int = 0) -> list[list[float]]:
    """Samples of implementations that take ``speeds`` microseconds on a clock that drifts by a third, with noise."""
    noise = random.Random(seed)
    clocks = [1 + 0.3 * math.sin(i / 5) for i in range(rounds)]
    return [[speed * clock * noise.gauss(1, 0.01) for clock in clocks] for speed in speeds]


def test_a_planted_slowdown_is_found_in_spite_of_drift() -> None:
    eager, again, slower = drifting(40, 10.0, 10.0, 11.0)
    same, slowdown = ratio(eager, again), ratio(eager, slower)
    assert same.low <= 1 <= same.high
    assert same.high - same.low < 0.02
    assert slowdown.low <= 1 / 1.1 <= slowdown.high < 0.95


def test_the_interval_of_equals_covers_one_about_as_often_as_it_says() -> None:
    ratios = [ratio(*drifting(30, 1.0, 1.0, seed=seed), resamples=400) for seed in range(100)]
    assert sum(r.low <= 1 <= r.high for r in ratios) >= 88


def test_one_sample_has_a_summary_and_a_ratio_without_spread() -> None:
    assert vars(summarize([3.0])) == {"median": 3.0, "p20": 3.0, "p80": 3.0}
    assert ratio([6.0], [3.0]) == Ratio(2.0, 2.0, 2.0)


def test_a_summary_has_the_median_and_two_quantiles() -> None:
    summary = summarize([5.0, 1.0, 2.0, 3.0, 4.0, 6.0])
    assert vars(summary) == pytest.approx({"median": 3.5, "p20": 2.0, "p80": 5.0})


def test_rounds_are_shuffled_and_complete() -> None:
    order: list[str] = []
    samplers = {name: lambda name=name: float(order.append(name) or len(order)) for name in "abc"}
    samples = interleave(samplers, rounds=20)
    assert {name: len(taken) for name, taken in samples.items()} == {"a": 20, "b": 20, "c": 20}
    rounds = [tuple(order[i : i + 3]) for i in range(3, len(order), 3)]  # the first round is the warm-up
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len(set(rounds)) > 1


def test_buffers_outgrow_the_cache_and_share_the_calls() -> None:
    assert buffer_count(2 * 2**20, 50 * 2**20) == 50
    assert buffer_count(2**30, 50 * 2**20) == 4
    seen: list[int] = []
    calls = repeated([lambda i=i: seen.append(i) for i in range(7)])
    assert wall_sampler(calls, lambda: None)() > 0
    assert len(calls) == 21
    assert [seen.count(i) for i in range(7)] == [3] * 7


def test_a_deadline_ends_the_rounds() -> None:
    calls: list[str] = []
    assert interleave({"a": lambda: float(calls.append("a") or 1)}, rounds=9, deadline=-math.inf) == {"a": []}
    assert calls == ["a"]  # the warm-up


def test_a_failed_capture_takes_the_random_numbers_out_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch leaves its default generator in a capture that failed, until one succeeds; its part is played here."""
    captures: list[bool] = []  # of each, whether it has ended

    @contextlib.contextmanager
    def graph(*_: Any, **__: Any) -> Iterator[None]:
        captures.append(False)
        yield
        captures[:] = [True] * len(captures)

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    made_up: dict[str, Any] = {"graph": graph, "CUDAGraph": object, "graph_pool_handle": object}
    made_up |= {"Stream": lambda: stream, "current_stream": lambda: stream, "set_stream": lambda stream: None}
    made_up |= {"stream": lambda stream: contextlib.nullcontext(), "current_device": lambda: 0}
    for name, value in made_up.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda *_: None, raising=False)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *sizes, device: zeros(*sizes))

    def fails_while_captured() -> None:
        if captures:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        capture([fails_while_captured])
    assert captures == [True, True]
    # A GPU that can do no more tells why by its first error.
    monkeypatch.setattr(torch, "zeros", lambda *sizes, device: fails_while_captured())
    captures.clear()
    with pytest.raises(ZeroDivisionError):
        capture([lambda: 1 / (not captures)])


def test_the_wall_clock_waits_for_the_device_on_both_sides() -> None:
    happened: list[str] = []
    wall_sampler([lambda: happened.append("call")] * 2, lambda: happened.append("wait"))()
    assert happened == ["wait", "call", "call", "wait"]
