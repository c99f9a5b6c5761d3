"""Time rival implementations in turns, and summarize the samples.

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
# Clock cycles that the GPU sleeps while the host enqueues calls, at first and at most: about 1 and 60 ms at 2 GHz.
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
    """Return the median of the per-round ratios and its interval, a percentile bootstrap over rounds.

    Both sequences hold one sample of each round, in the order of the rounds.
    """
    ratios = torch.tensor(baseline, dtype=torch.float64) / torch.tensor(samples, dtype=torch.float64)
    picks = torch.randint(len(ratios), (resamples, len(ratios)), generator=torch.Generator().manual_seed(seed))
    medians = ratios[picks].quantile(0.5, dim=1)
    low, high = medians.quantile(_levels(0.025, 0.975)).tolist()
    return Ratio(ratios.quantile(0.5).item(), low, high)


def _levels(*levels: float) -> torch.Tensor:
    return torch.tensor(levels, dtype=torch.float64)


def buffer_count(bytes_read: int, cache_bytes: int) -> int:
    """Return how many sets of buffers to rotate so that each has left a cache of this size before its next turn."""
    return min(MAX_BUFFERS, max(4, math.ceil(2 * cache_bytes / bytes_read)))


def repeated(calls: Sequence[Call], minimum: int = MIN_CALLS) -> list[Call]:
    """Return the list of calls repeated as a whole until it has at least ``minimum`` calls."""
    return list(calls) * math.ceil(minimum / len(calls))


def capture(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """Return one CUDA graph of the calls, which must have compiled before.

    If a call cannot be captured, raises its error, and restores allocator, stream and random numbers, which
    ``torch.cuda.graph`` alone leaves in the middle of a capture (torch 2.11).
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
        with contextlib.suppress(RuntimeError):  # raised if the capture did end, as after running out of memory
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            torch._C._cuda_releasePool(torch.cuda.current_device(), pool)
        # The default generator leaves a capture only when one succeeds, so make one. A broken GPU cannot capture.
        with contextlib.suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch.zeros(1, device="cuda")
        raise
    return graph


def graph_sampler(calls: Sequence[Call]) -> Sampler:
    """Return a sampler that replays a CUDA graph of the calls."""
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
    """Return a sampler for calls that cannot be captured, since they replay graphs of their own or synchronise.

    The GPU sleeps while the host enqueues the calls. If it was awake before the host had enqueued all, the sample is
    taken again with a longer sleep, up to ``LAST_SLEEP``. A call that synchronises waits for the GPU to wake, however
    long it sleeps: then the sample contains time of the host.
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
    """Return a sampler of wall time that synchronises before and after the calls."""

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
    """Take one sample of each implementation per round, in shuffled order, after one unrecorded round.

    No round starts after ``deadline``, a value of ``time.monotonic()``. All lists have the same length, which may be 0.
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
