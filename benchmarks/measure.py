"""Check the rivals of one case, then time them in turns; and measure what this machine reaches at best."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bert_fused.timing import (
    MIN_CALLS,
    Call,
    Sampler,
    capture,
    event_sampler,
    graph_sampler,
    interleave,
    ratio,
    repeated,
    summarize,
    wall_sampler,
)

Inputs = tuple[Any, ...]
BASELINES = ("eager", "F.linear")
CEILING_ROUNDS = 10


@dataclass(frozen=True)
class Implementation:
    """A way to compute a case.

    calls: given sets of inputs, returns one call for each set. config: the kernel that serves, if known. computes: the
    activation that it applies instead of the case's. graphs: it replays CUDA graphs of its own, so that its calls
    cannot be captured in another. packs: it leaves padding out. An encoder cannot do that while a graph is captured, so
    a graph would hold the dense path.
    """

    name: str
    calls: Callable[[Sequence[Inputs]], list[Call]]
    config: str = ""
    computes: str | None = None
    graphs: bool = False
    packs: bool = False


def each(function: Callable[..., Any]) -> Callable[[Sequence[Inputs]], list[Call]]:
    """Return the calls of an implementation that is a function of the inputs."""
    return lambda sets: [functools.partial(function, *inputs) for inputs in sets]


def graphed(function: Callable[..., Any], copied: int = 0) -> Callable[[Sequence[Inputs]], list[Call]]:
    """Return the calls of a function captured in a CUDA graph, as servers do; ``copied`` inputs are copied in.

    A module's input is already in the graph of the model around it; a model's comes from outside.
    """

    def replaying(inputs: Inputs) -> Call:
        moving = [tensor for tensor in inputs[:copied] if tensor is not None]
        static = [None if tensor is None else tensor.clone() for tensor in inputs[:copied]]
        targets = [tensor for tensor in static if tensor is not None]
        outputs: list[Any] = []
        graph = capture([lambda: outputs.append(function(*static, *inputs[copied:]))])
        output = outputs.pop()
        outputs.clear()

        def call() -> Any:
            if moving:
                torch._foreach_copy_(targets, moving)
            graph.replay()
            return output

        return call

    return lambda sets: [replaying(inputs) for inputs in sets]


@dataclass(frozen=True)
class Problem:
    """A case with its data.

    sets: inputs, so many that none is in cache when its turn comes. check: given an implementation, a function that
    calls it and a set of inputs, returns its errors; raises ValueError if they are too large. flops and bytes: of one
    call's matrix products and their operands. min_calls: the fewest calls in a sample. fill: the share of tokens that
    are not padding.
    """

    implementations: list[Implementation]
    sets: list[Inputs]
    check: Callable[[Implementation, Callable[..., Any], Inputs], dict[str, float]]
    flops: float
    bytes: float
    min_calls: int = MIN_CALLS
    fill: float = 1.0


def measure(
    problem: Problem,
    *,
    device: str,
    rounds: int,
    deadline: float = math.inf,
    state: Callable[[], Any] = lambda: None,
) -> list[dict[str, Any]]:
    """Check and time the rivals, and return a row for each; a rival that fails has an error and no figure.

    ``state`` reads the device's state: once before all, and after each clock's rounds, while the device is warm.
    """
    states = {"before": state()}
    synchronize: Call = torch.cuda.synchronize if device == "cuda" else lambda: None
    rows: dict[str, dict[str, Any]] = {}
    samplers: dict[str, dict[str, Sampler]] = {"gpu": {}, "wall": {}}
    methods: dict[str, str] = {}
    for rival in problem.implementations:
        row = {"implementation": rival.name, "config": rival.config, "computes": rival.computes, "error": None}
        row |= {"accuracy": None, "compile_seconds": None, "peak_bytes": None}
        rows[rival.name] = row
        if time.monotonic() > deadline:
            row["error"] = "out of time"
            continue
        try:
            row |= _prepare(problem, rival, device, synchronize)
            calls = repeated(rival.calls(problem.sets), problem.min_calls)
            if device == "cuda":
                samplers["gpu"][rival.name], methods[rival.name] = _gpu_sampler(calls, rival)
            samplers["wall"][rival.name] = wall_sampler(calls, synchronize)
        except Exception as error:  # a rival that does not compile or run is a result as well
            row["error"] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            for of_clock in samplers.values():
                of_clock.pop(rival.name, None)
            synchronize()  # raises if the GPU can do no more
    for clock, of_clock in samplers.items():
        samples = interleave(of_clock, rounds=rounds, deadline=deadline)
        states[clock] = state()
        for name, row in rows.items():
            taken = samples.get(name)
            method = methods.get(name, "graph") if clock == "gpu" else "wall"
            row[clock] = figures(taken, method, {b: samples[b] for b in BASELINES if b in samples}) if taken else None
            row["complete"] = row.get("complete", True) and (name not in of_clock or len(taken or ()) == rounds)
    for row in rows.values():
        row["complete"] = row["complete"] and row["error"] != "out of time"
        timed = row["gpu"] or row["wall"]
        row["tflops"] = 1e-6 * problem.flops / timed["median_us"] if timed else None
        row["gpu_state"] = states if device == "cuda" else None
    return list(rows.values())


def _prepare(problem: Problem, rival: Implementation, device: str, synchronize: Call) -> dict[str, Any]:
    """Make the first call, which compiles; return its seconds, the memory of a second call, and the errors."""
    begin = time.monotonic()
    (call,) = rival.calls(problem.sets[:1])
    call()
    synchronize()
    row: dict[str, Any] = {"compile_seconds": round(time.monotonic() - begin, 3), "peak_bytes": None}
    if device == "cuda" and not rival.graphs:  # a graph's memory was allocated when it was captured
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        synchronize()
        row["peak_bytes"] = torch.cuda.max_memory_allocated() - before

    row["accuracy"] = checked(problem, rival)
    return row


def checked(problem: Problem, rival: Implementation) -> dict[str, float]:
    """Return a rival's errors; raises ValueError if they are too large."""

    def once(*inputs: Any) -> Any:
        (call,) = rival.calls([inputs])
        return call()

    return problem.check(rival, once, problem.sets[0])


def _gpu_sampler(calls: Sequence[Call], rival: Implementation) -> tuple[Sampler, str]:
    if not (rival.graphs or rival.packs):
        try:
            return graph_sampler(calls), "graph"
        except RuntimeError:  # a call that synchronises or allocates cannot be captured
            torch.cuda.synchronize()
    return event_sampler(calls), "events"


def figures(samples: list[float], method: str, baselines: dict[str, list[float]]) -> dict[str, Any]:
    """Return a record's entry for one clock. ``method``: how it was read, "graph", "events" or "wall"."""
    summary = summarize(samples)
    return {
        "method": method,
        "median_us": summary.median,
        "p20_us": summary.p20,
        "p80_us": summary.p80,
        "ratio_to": {name: dataclasses.asdict(ratio(baseline, samples)) for name, baseline in baselines.items()},
        "samples_us": [round(sample, 4) for sample in samples],
    }


@functools.cache
def matmul_tflops(device: str, dtype: str) -> float:
    """Return TFLOP/s of a large matrix product; ``dtype`` as in a case, with torch's fp32 setting as it is."""
    size = 256 if device == "cpu" else 4096 if dtype == "float32" else 8192
    kind = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    a, b = (torch.randn(size, size, device=device).to(kind) for _ in range(2))
    return 2e-6 * size**3 / _microseconds(device, lambda: torch.mm(a, b))


@functools.cache
def copy_tb_per_s(device: str) -> float:
    """Return TB/s of a large copy, bytes read and written."""
    size = 2**24 if device == "cpu" else 2**30
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return 2e-6 * size / _microseconds(device, lambda: target.copy_(source))


def roofline_us(device: str, dtype: str, flops: float, bytes: float) -> float:
    """Return the least time that these two ceilings allow."""
    return max(1e-6 * flops / matmul_tflops(device, dtype), 1e-6 * bytes / copy_tb_per_s(device))


def _microseconds(device: str, call: Call) -> float:
    calls = repeated([call])
    sampler = graph_sampler(calls) if device == "cuda" else wall_sampler(calls, lambda: None)
    return summarize(interleave({"it": sampler}, rounds=CEILING_ROUNDS)["it"]).median
