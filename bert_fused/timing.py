"""Interleaved timing of rival implementations, and the statistics of what it yields.

Two clocks, in microseconds per call. GPU: replays of a CUDA graph of many calls over rotating buffers, so that neither
launches nor warm caches are timed. Wall: calls made from Python one after another, synchronised at the end. Rivals take
turns in shuffled rounds, because a GPU's clock drifts by more than the differences that matter; what counts is the
ratio of two samples of one round.
"""

import contextlib
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]
Sampler = Callable[[], float]  # takes one sample: microseconds per call

MIN_CALLS = 20
MAX_BUFFERS = 384
# Clock cycles that the GPU sleeps while the host enqueues calls: about 1 ms, and 60 ms, at 2 GHz.
FIRST_SLEEP, LAST_SLEEP = 2**21, 2**27


@dataclass(frozen=True)
class Summary:
    median: float
    p20: float
    p80: float


@dataclass(frozen=True)
class Ratio:
    """Baseline's time over this implementation's (above 1: faster than the baseline), with a 95 % interval."""

    median: float
    low: float
    high: float


def summarize(samples: Sequence[float]) -> Summary:
    p20, median, p80 = torch.tensor(samples, dtype=torch.float64).quantile(_levels(0.2, 0.5, 0.8)).tolist()
    return Summary(median, p20, p80)


def ratio(baseline: Sequence[float], samples: Sequence[float], *, resamples: int = 2000, seed: int = 0) -> Ratio:
    """Median of the per-round ratios. Both sequences hold one sample of each round, in the order of the rounds.

    The interval is a percentile bootstrap over rounds.
    """
    ratios = torch.tensor(baseline, dtype=torch.float64) / torch.tensor(samples, dtype=torch.float64)
    picks = torch.randint(len(ratios), (resamples, len(ratios)), generator=torch.Generator().manual_seed(seed))
    medians = ratios[picks].quantile(0.5, dim=1)
    low, high = medians.quantile(_levels(0.025, 0.975)).tolist()
    return Ratio(ratios.quantile(0.5).item(), low, high)


def _levels(*levels: float) -> torch.Tensor:
    return torch.tensor(levels, dtype=torch.float64)


def buffer_count(bytes_read: int, cache_bytes: int) -> int:
    """How many sets of buffers to rotate so that a set has left a cache of ``cache_bytes`` before its next turn."""
    return min(MAX_BUFFERS, max(4, math.ceil(2 * cache_bytes / bytes_read)))


def repeated(calls: Sequence[Call], minimum: int = MIN_CALLS) -> list[Call]:
    """The calls, each as often as the others, so often that there are at least ``minimum``."""
    return list(calls) * math.ceil(minimum / len(calls))


def capture(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """The calls in one CUDA graph. Whatever compiles must have compiled before.

    Raises what a call raises that cannot be captured. Allocator, stream and random numbers are then as before,
    while ``torch.cuda.graph`` alone leaves them in the middle of a capture (torch 2.11).
    """
    stream, before = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        for call in calls[:3]:
            call()
    before.wait_stream(stream)
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.graph(graph, pool=pool):
            for call in calls:
                call()
    except BaseException:
        torch.cuda.set_stream(before)
        with contextlib.suppress(RuntimeError):  # where the capture did end, as after running out of memory
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            torch._C._cuda_releasePool(torch.cuda.current_device(), pool)
        # Only the end of a capture that succeeds takes the default generator out of it. A broken GPU cannot capture.
        with contextlib.suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch.zeros(1, device="cuda")
        raise
    return graph


def graph_sampler(calls: Sequence[Call]) -> Sampler:
    """Each sample replays a CUDA graph of the calls."""
    graph = capture(calls)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample() -> float:
        # The first replay keeps the GPU busy while the host enqueues the timed one, whose launch would else be timed.
        graph.replay()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return 1e3 * float(start.elapsed_time(end)) / len(calls)

    return sample


def event_sampler(calls: Sequence[Call]) -> Sampler:
    """For calls that cannot be captured, since they replay graphs of their own or synchronise.

    The GPU sleeps while the host enqueues them, for longer if it was found awake too early. What synchronises wakes it
    however long it sleeps: then the host is part of the sample.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    cycles = FIRST_SLEEP

    def sample() -> float:
        nonlocal cycles
        while True:
            torch.cuda._sleep(cycles)
            start.record()
            for call in calls:
                call()
            end.record()
            awake = start.query()
            end.synchronize()
            if not awake or cycles >= LAST_SLEEP:
                return 1e3 * float(start.elapsed_time(end)) / len(calls)
            cycles *= 2

    return sample


def wall_sampler(calls: Sequence[Call], synchronize: Call) -> Sampler:
    def sample() -> float:
        synchronize()
        start = time.perf_counter()
        for call in calls:
            call()
        synchronize()
        return 1e6 * (time.perf_counter() - start) / len(calls)

    return sample


def interleave(
    samplers: Mapping[str, Sampler], *, rounds: int, seed: int = 0, deadline: float = math.inf
) -> dict[str, list[float]]:
    """One sample of each implementation per round, in shuffled order, after one unrecorded round.

    No round starts after ``deadline``, a value of ``time.monotonic()``; every list has one length, which may be 0.
    """
    order = list(samplers)
    shuffle = random.Random(seed).shuffle
    samples: dict[str, list[float]] = {name: [] for name in order}
    for name in order:
        samplers[name]()
    for _ in range(rounds):
        if time.monotonic() > deadline:
            break
        shuffle(order)
        for name in order:
            samples[name].append(samplers[name]())
    return samples
