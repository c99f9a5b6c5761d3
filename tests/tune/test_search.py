"""The measurement of one shape: who takes part, who is chosen, and that the budget is kept."""

import re
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from stub import CPU, LARGE, LIBRARY, MIDDLE, NAME, SHAPE, SMALL, UNHURRIED, Stub, times

from bert_fused.cli import tune
from bert_fused.kernels.configs import Config
from bert_fused.timing import Call, Sampler, ratio
from bert_fused.tune import search
from bert_fused.tune.candidates import candidates
from bert_fused.tune.search import EAGER, Budget, GpuUnusable, NotMeasured, Outcome, Shape, pick, tune_shape


def found(stub: Stub, candidates: Sequence[Config] = (SMALL, MIDDLE, LARGE), shape: Shape = SHAPE) -> Outcome:
    return tune_shape(shape, candidates, CPU, budget=Budget(UNHURRIED), sampler_of=stub)


def test_tune_shape_chooses_the_fastest() -> None:
    outcome = found(Stub(times(eager=14, library=12, small=9, middle=8, large=9.5)))
    assert outcome.config == MIDDLE
    assert outcome.times == times(eager=14, library=12, small=9, middle=8, large=9.5)
    assert outcome.failed == {}
    assert outcome.unseen == 0


@pytest.mark.parametrize(
    ("known", "dropped"),
    [
        ({"eager": 30, "library": 20, "small": 8, "middle": 10.1, "large": 9.9}, {MIDDLE}),
        ({"eager": 30, "library": 20, "small": 16, "middle": 15, "large": 8}, {SMALL, MIDDLE}),
    ],
    ids=["slower than an earlier one", "let in before a better one came"],
)
def test_hopeless_candidates_are_dropped_after_their_first_samples(
    known: dict[str, float], dropped: set[Config]
) -> None:
    """Eager and the library are timed to the end, however slow."""
    stub = Stub(times(**known))
    outcome = found(stub)
    everyone = {EAGER, *map(str, (LIBRARY, SMALL, MIDDLE, LARGE))}
    assert outcome.times.keys() == everyone - {str(config) for config in dropped}
    for name, taken in stub.samples.items():
        assert taken == 3 + (1 + search.ROUNDS if name in outcome.times else 0)


def test_hopeless_candidates_free_their_memory_at_once() -> None:
    """A captured graph holds on to its results."""
    stub = Stub(times(eager=30, library=20, small=8, middle=20, large=9))
    alive: weakref.WeakSet[Sampler] = weakref.WeakSet()
    counts = []

    def sampler_of(calls: Sequence[Call]) -> Sampler:
        counts.append(len(alive))
        sampler = stub(calls)
        alive.add(sampler)
        return sampler

    last = Config("pointer", "float16", 16, 16, 16, 1, 1)
    tune_shape(SHAPE, [SMALL, MIDDLE, LARGE, last], CPU, budget=Budget(UNHURRIED), sampler_of=sampler_of)
    assert counts == [0, 1, 2, 3, 4, 4]


@pytest.mark.parametrize(
    ("known", "chosen"),
    [
        ({"eager": 14, "library": 8, "small": 9}, LIBRARY),
        ({"eager": 7, "library": 9, "small": 8}, LIBRARY),  # eager is no configuration; the library is nearest to it
        ({"eager": 7, "library": 9, "small": 6.9}, SMALL),
        ({"eager": 14, "library": 9, "small": 8}, SMALL),
    ],
    ids=["library wins", "eager wins", "ours wins barely", "ours wins"],
)
def test_the_choice_is_never_slower_than_cublas_or_eager(known: dict[str, float], chosen: Config) -> None:
    assert found(Stub(times(**known)), [SMALL]).config == chosen


def wrong_for(config: Config, monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., Any], *, training: bool) -> None:
    honest = search.linear_act_fwd

    def planted(*args: Any, **kwargs: Any) -> Any:
        result = honest(*args, **kwargs)
        return wrong(*result) if kwargs["config"] == config and kwargs["save_preact"] == training else result

    monkeypatch.setattr(search, "linear_act_fwd", planted)


def out_of_resources(*_: object) -> None:
    raise RuntimeError("out of resource: shared memory\nRequired: 300000")


@pytest.mark.parametrize(
    ("planted", "message"),
    [
        (lambda out, preact: (out * 1.01, preact), "ValueError: wrong result: .*"),
        (out_of_resources, "RuntimeError: out of resource: shared memory"),
    ],
    ids=["wrong", "raises"],
)
def test_a_failing_candidate_is_reported_and_not_timed(
    planted: Callable[..., Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong_for(SMALL, monkeypatch, planted, training=False)
    stub = Stub(times(eager=14, library=12, small=1, middle=8, large=9))
    outcome = found(stub)
    assert outcome.config == MIDDLE
    assert str(SMALL) not in stub.samples
    assert list(outcome.failed) == [str(SMALL)]
    assert re.fullmatch(message, outcome.failed[str(SMALL)])


@pytest.mark.parametrize(
    "wrong",
    [lambda out, preact: (out, preact + 1), lambda out, preact: (2 * out, preact), lambda out, preact: 1 / 0],
    ids=["pre-activation", "result", "raises"],
)
def test_a_winner_that_cannot_train_gives_way_to_the_next(
    wrong: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lookup does not know whether the pre-activation will be stored; that is another compilation."""
    wrong_for(SMALL, monkeypatch, wrong, training=True)
    outcome = found(Stub(times(eager=14, library=12, small=8, middle=9, large=8.5)))
    assert outcome.config == LARGE
    assert list(outcome.failed) == [str(SMALL)]


@pytest.mark.parametrize("who", [EAGER, str(LIBRARY)])
def test_a_shape_has_no_result_if_eager_or_the_library_fails(who: str) -> None:
    stub = Stub({})

    def sampler_of(calls: Sequence[Call]) -> Sampler:
        sampler = stub(calls)
        if list(stub.samples)[-1] == who:
            raise MemoryError("no room")
        return sampler

    with pytest.raises(NotMeasured, match=f"{re.escape(who)}: MemoryError: no room"):
        tune_shape(SHAPE, [SMALL], CPU, budget=Budget(UNHURRIED), sampler_of=sampler_of)


def test_a_broken_gpu_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an illegal access every call fails, so nothing that follows would mean anything."""

    def broken(*_: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    failed: dict[str, str] = {}
    with (
        pytest.raises(GpuUnusable, match="after a tile the GPU can do no more: an illegal"),
        search._recording(failed, "a tile", torch.device("cuda", 0)),
    ):
        broken()


def test_tf32_is_measured_with_tf32_products() -> None:
    shape = Shape(24, 64, 32, "tf32")
    seen = set()

    def sampler_of(calls: Sequence[Call]) -> Sampler:
        seen.add((torch.backends.cuda.matmul.fp32_precision, calls[0].args[0].dtype))
        return lambda: 1.0

    before = torch.backends.cuda.matmul.fp32_precision
    assert tune_shape(shape, [], CPU, budget=Budget(UNHURRIED), sampler_of=sampler_of).config.dtype == "tf32"
    assert seen == {("tf32", torch.float32)}
    assert torch.backends.cuda.matmul.fp32_precision == before
    x, weight, _ = search.make_buffers(shape, CPU)[0]
    for tensor in (x, weight):
        assert torch.equal(tensor, tensor.bfloat16().float())


def test_a_pooler_is_measured_with_its_activation() -> None:
    assert Shape(32, 384, 384, "float16").activation == "tanh"
    assert SHAPE.activation == "gelu"


# --------------------------------------------------------------------------------------------------------------- choice

ROUNDS = 20


def series(median: float, spread: float = 0.0, phase: int = 0) -> list[float]:
    """Times that swing around a median, out of step with those of another phase."""
    return [median * (1 + spread * ((i + phase) % 5 - 2) / 2) for i in range(ROUNDS)]


def test_an_earlier_candidate_wins_within_the_noise() -> None:
    """0.5 % faster with a spread of 5 % is no difference; without a spread it is one."""
    eager = series(20)
    noisy = {LIBRARY: series(12), SMALL: series(8.04, 0.05), MIDDLE: series(8.0, 0.05, 2)}
    assert pick(noisy, eager) == SMALL
    assert pick({config: noisy[config] for config in (LIBRARY, MIDDLE, SMALL)}, eager) == MIDDLE
    assert pick({LIBRARY: series(12), SMALL: series(8.04), MIDDLE: series(8.0)}, eager) == MIDDLE


def test_noise_does_not_hide_a_large_difference() -> None:
    """Intervals that meet do not make 5 % nothing."""
    wide = [8.0 / r for r in [0.7] * 7 + [0.95] * 6 + [1.3] * 7]
    assert ratio(series(8.0), wide).high > 1
    assert pick({LIBRARY: wide, SMALL: series(8.0)}, series(20)) == SMALL


def test_the_library_wins_a_draw() -> None:
    assert pick({LIBRARY: series(8.05, 0.05), SMALL: series(8.0, 0.05, 2)}, series(20)) == LIBRARY


def test_eager_within_the_noise_changes_nothing() -> None:
    samples = {LIBRARY: series(12), SMALL: series(8.0)}
    faster_by_chance = [8.0 * r for r in [0.9] * 7 + [0.99] * 6 + [1.1] * 7]
    assert ratio(faster_by_chance, samples[SMALL]).median < 1
    assert pick(samples, faster_by_chance) == SMALL
    assert pick(samples, series(7.0, 0.05)) == LIBRARY


# --------------------------------------------------------------------------------------------------------------- budget


class Clock:
    """``time`` in place of the real one: preparing a candidate takes 3 s, a sample 10 ms."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        fake = types.SimpleNamespace(monotonic=lambda: self.now)
        for module in ("tune.search", "cli.tune", "timing"):
            monkeypatch.setattr(f"bert_fused.{module}.time", fake)

        def slow_check(*arguments: Any) -> None:
            self.now += 3

        monkeypatch.setattr(search, "check", slow_check)

    def sampler_of(self, stub: Stub) -> Callable[[Sequence[Call]], Sampler]:
        def make(calls: Sequence[Call]) -> Sampler:
            sampler = stub(calls)

            def sample() -> float:
                self.now += 0.01
                return sampler()

            return sample

        return make


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.mark.parametrize("seconds", [0, 3.5, 9.5, 12.5, 15, 18, 19, 25, 40, 60, 100])
def test_measure_keeps_the_budget(seconds: float, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """One candidate, before the first duration is known, is all that may run over."""
    monkeypatch.setattr(tune, "candidates", lambda *_: [SMALL, MIDDLE, LARGE])
    stub = Stub(times(eager=14, library=12, small=9, middle=8, large=9.5))
    gpu = tune.Gpu(CPU, NAME, 0)
    start = clock.now
    todo = [Shape(M, 64, 32, "float16") for M in (8, 12, 16, 24)]
    results = list(tune.measure(todo, gpu, Budget(start + seconds), clock.sampler_of(stub)))
    assert clock.now - start <= max(seconds, 3.1)
    measured = [shape for shape, outcome in results if isinstance(outcome, Outcome)]
    assert measured == todo[: len(measured)]
    # Eager, the library and a candidate, then the chosen one in training: 15 s; with all three candidates 22 s.
    assert len(measured) >= min(4, seconds // 23)
    assert bool(measured) == (seconds >= 18)


def test_candidates_without_time_are_counted(clock: Clock) -> None:
    stub = Stub(times(eager=14, library=12, small=9, middle=8, large=9.5))
    budget = Budget(clock.now + 18)
    outcome = tune_shape(SHAPE, [SMALL, MIDDLE, LARGE], CPU, budget=budget, sampler_of=clock.sampler_of(stub))
    assert outcome.config == SMALL
    assert outcome.unseen == 2


def test_a_shape_has_no_result_without_time_for_a_candidate(clock: Clock) -> None:
    """An entry for the library that nothing was compared with would stop the shape from being measured."""
    with pytest.raises(NotMeasured, match="out of time"):
        tune_shape(SHAPE, [SMALL], CPU, budget=Budget(clock.now + 10), sampler_of=clock.sampler_of(Stub({})))


def test_every_proposed_candidate_takes_part() -> None:
    stub = Stub({})
    ((_, outcome),) = tune.measure([SHAPE], tune.Gpu(CPU, NAME, 0), Budget(UNHURRIED), stub)
    assert isinstance(outcome, Outcome)
    proposed = candidates(SHAPE.M, SHAPE.N, SHAPE.K, SHAPE.dtype, 0)
    assert stub.samples.keys() == {EAGER, *map(str, proposed)}
    assert LIBRARY in proposed
