"""The tuner, rehearsed on the CPU: kernels are interpreted, and a stub says how long each candidate takes."""

import contextlib
import errno
import itertools
import json
import os
import re
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bert_fused.__main__ import main
from bert_fused.cli import tune
from bert_fused.kernels import configs, user_tables
from bert_fused.kernels.configs import Config, Entry, Measured, forget_tables, get_config, load_user_table, parse_rows
from bert_fused.timing import Call, Sampler, ratio
from bert_fused.tune import search, shapes
from bert_fused.tune.candidates import candidates
from bert_fused.tune.search import EAGER, Budget, GpuUnusable, NotMeasured, Outcome, Shape, pick, tune_shape

CPU = torch.device("cpu")
NAME = "NVIDIA Stub GPU"
SHAPE = Shape(24, 64, 32, "float16")
LIBRARY = Config("library", "float16")
SMALL, MIDDLE, LARGE = (Config("pointer", "float16", m, 32, 32, 1, 1) for m in (16, 32, 64))
UNHURRIED = 1e9


class Stub:
    """In place of ``graph_sampler``: made-up times by candidate, and a record of who was sampled."""

    def __init__(self, times: dict[str, float], noise: Callable[[int], float] = lambda i: 0.0) -> None:
        self.times = times
        self.noise = noise
        self.samples: dict[str, int] = {}

    def __call__(self, calls: Sequence[Call]) -> Sampler:
        config = calls[0].keywords.get("config")
        name = EAGER if config is None else str(config)
        self.samples[name] = 0
        assert len(calls) >= 20
        assert calls[0]().shape == (calls[0].args[0].shape[0], calls[0].args[1].shape[0])

        def sample() -> float:
            self.samples[name] += 1
            return self.times.get(name, 100.0) * (1 + self.noise(self.samples[name]))

        return sample


def times(**known: float) -> dict[str, float]:
    names = {"eager": EAGER, "library": LIBRARY, "small": SMALL, "middle": MIDDLE, "large": LARGE}
    return {str(names[name]): us for name, us in known.items()}


def found(stub: Stub, candidates: Sequence[Config] = (SMALL, MIDDLE, LARGE), shape: Shape = SHAPE) -> Outcome:
    return tune_shape(shape, candidates, CPU, budget=Budget(UNHURRIED), sampler_of=stub)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("BERT_FUSED_TABLES", str(tmp_path / "tables"))
    monkeypatch.setenv("COMMIT", "abc123")
    monkeypatch.setattr(user_tables, "_warned", {})
    forget_tables()
    yield tmp_path / "tables"
    forget_tables()


# ------------------------------------------------------------------------------------------------------------ one shape


def test_the_fastest_is_chosen() -> None:
    outcome = found(Stub(times(eager=14, library=12, small=9, middle=8, large=9.5)))
    assert outcome.config == MIDDLE
    assert outcome.times == times(eager=14, library=12, small=9, middle=8, large=9.5)
    assert outcome.failed == {}
    assert outcome.unseen == 0


def test_the_hopeless_are_given_up_early() -> None:
    """Eager and the library are timed to the end, however slow."""
    stub = Stub(times(eager=30, library=20, small=8, middle=10.1, large=9.9))
    outcome = found(stub)
    assert outcome.config == SMALL
    assert outcome.times.keys() == times(eager=0, library=0, small=0, large=0).keys()
    assert stub.samples[str(MIDDLE)] == 3
    assert set(stub.samples.values()) == {3, 3 + 1 + search.ROUNDS}


def test_the_hopeless_free_their_memory_at_once() -> None:
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


def test_one_that_was_let_in_before_a_better_one_came() -> None:
    stub = Stub(times(eager=30, library=20, small=16, middle=15, large=8))
    outcome = found(stub)
    assert outcome.config == LARGE
    assert outcome.times.keys() == times(eager=0, library=0, large=0).keys()
    assert stub.samples[str(SMALL)] == stub.samples[str(MIDDLE)] == 3


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
def test_never_slower_than_cublas_or_eager(known: dict[str, float], chosen: Config) -> None:
    assert found(Stub(times(**known)), [SMALL]).config == chosen


def wrong_for(config: Config, monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., Any], *, training: bool) -> None:
    honest = search.linear_act_fwd

    def planted(*args: Any, **kwargs: Any) -> Any:
        result = honest(*args, **kwargs)
        return wrong(*result) if kwargs["config"] == config and kwargs["save_preact"] == training else result

    monkeypatch.setattr(search, "linear_act_fwd", planted)


def test_wrong_numbers_are_rejected_before_anything_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_for(SMALL, monkeypatch, lambda out, preact: (out * 1.01, preact), training=False)
    stub = Stub(times(eager=14, library=12, small=1, middle=8, large=9))
    outcome = found(stub)
    assert outcome.config == MIDDLE
    assert str(SMALL) not in stub.samples
    assert re.match(r"ValueError: wrong result", outcome.failed[str(SMALL)])


def test_a_candidate_that_raises_is_reported_and_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_resources(*_: object) -> None:
        raise RuntimeError("out of resource: shared memory\nRequired: 300000")

    wrong_for(SMALL, monkeypatch, out_of_resources, training=False)
    outcome = found(Stub(times(eager=14, library=12, small=1, middle=8, large=9)))
    assert outcome.config == MIDDLE
    assert outcome.failed == {str(SMALL): "RuntimeError: out of resource: shared memory"}


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
def test_without_a_bar_there_is_no_result(who: str) -> None:
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


def test_tf32_is_measured_as_such() -> None:
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


def test_noise_does_not_beat_the_simpler() -> None:
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


def test_eager_in_the_noise_changes_nothing() -> None:
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
def test_the_budget_is_kept(seconds: float, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_what_there_was_no_time_for_is_counted(clock: Clock) -> None:
    stub = Stub(times(eager=14, library=12, small=9, middle=8, large=9.5))
    budget = Budget(clock.now + 18)
    outcome = tune_shape(SHAPE, [SMALL, MIDDLE, LARGE], CPU, budget=budget, sampler_of=clock.sampler_of(stub))
    assert outcome.config == SMALL
    assert outcome.unseen == 2


def test_no_time_for_a_candidate_is_no_result(clock: Clock) -> None:
    """An entry for the library that nothing was compared with would stop the shape from being measured."""
    with pytest.raises(NotMeasured, match="out of time"):
        tune_shape(SHAPE, [SMALL], CPU, budget=Budget(clock.now + 10), sampler_of=clock.sampler_of(Stub({})))


# -------------------------------------------------------------------------------------------------------------- command


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    """A machine with a GPU: the interpreter's architecture, under a name, timed by the stub."""
    monkeypatch.setattr(tune, "find_gpu", lambda name: tune.Gpu(CPU, NAME, 0))
    monkeypatch.setattr(tune, "candidates", lambda *_: [SMALL, WINNER])
    monkeypatch.setattr(tune, "Trials", lambda device: contextlib.nullcontext())
    made = Stub({"pointer 32x32x32 4 warps 1 stages": 8.0, EAGER: 14.0, str(LIBRARY): 12.0})
    monkeypatch.setattr(tune, "graph_sampler", made)
    return made


def test_every_proposed_candidate_takes_part() -> None:
    stub = Stub({})
    ((_, outcome),) = tune.measure([SHAPE], tune.Gpu(CPU, NAME, 0), Budget(UNHURRIED), stub)
    assert isinstance(outcome, Outcome)
    proposed = candidates(SHAPE.M, SHAPE.N, SHAPE.K, SHAPE.dtype, 0)
    assert stub.samples.keys() == {EAGER, *map(str, proposed)}
    assert LIBRARY in proposed


WINNER = Config("pointer", "float16", 32, 32, 32, num_warps=4, num_stages=1)
ARGUMENTS = ["tune", "--shapes", "24x64x32,8x64x64", "--dtypes", "float16"]


def lookup(M: int, N: int, K: int) -> Config:
    return get_config(M, N, K, "float16", 0, aligned=True, device=NAME)


def test_end_to_end(stub: Stub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lookup(24, 64, 32) != WINNER
    assert main(ARGUMENTS) == 0
    assert lookup(24, 64, 32) == lookup(8, 64, 64) == WINNER
    out = capsys.readouterr().out
    assert re.search(
        r"^float16  24x64x32 +pointer 32x32x32 4 warps 1 stages +8\.00 us +cuBLAS \+ pass +12\.00 +eager +14\.00$",
        out,
        re.MULTILINE,
    )
    assert "2 of 2 shapes measured" in out
    path = folder / "sm_0-nvidia-stub-gpu.json"
    assert f"table: {path}" in out
    table = json.loads(path.read_text())
    assert re.fullmatch(
        rf"measured on {NAME}, torch \S+, Triton \S+, \d{{4}}-\d\d-\d\d, commit abc123", table["source"]
    )
    (entry, _) = sorted(load_user_table(0, NAME), key=lambda entry: -entry.m)
    assert entry.measured is not None
    assert (entry.measured.us, entry.measured.library_us, entry.measured.eager_us) == (8.0, 12.0, 14.0)


def test_shapes_without_an_entry_go_first(stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--shapes", "24x64x32", "--dtypes", "float16"]) == 0
    stub.times["pointer 32x32x32 4 warps 1 stages"] = 99
    capsys.readouterr()
    assert main(ARGUMENTS) == 0
    measured = re.findall(r"^float16  (\S+)", capsys.readouterr().out, re.MULTILINE)
    assert measured == ["8x64x64", "24x64x32"]
    assert lookup(24, 64, 32) == LIBRARY
    assert len(load_user_table(0, NAME)) == 2


def test_what_failed_is_reported(stub: Stub, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    wrong_for(WINNER, monkeypatch, lambda out, preact: (-out, preact), training=False)
    assert main(ARGUMENTS) == 0
    assert f"float16 {WINNER} failed at 2 shapes: ValueError: wrong result" in capsys.readouterr().err
    assert lookup(24, 64, 32) == LIBRARY


def test_a_damaged_table_is_measured_anew(stub: Stub, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.mkdir()
    (folder / "sm_0-nvidia-stub-gpu.json").write_text("{")
    assert main(ARGUMENTS) == 0
    assert lookup(24, 64, 32) == WINNER
    assert len(caplog.records) == 1


def test_nothing_measured(stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ARGUMENTS, "--budget", "-1"]) == 1
    assert "0 of 2 shapes measured" in capsys.readouterr().out


def test_interrupted(stub: Stub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured before Ctrl-C is kept."""
    honest = tune.tune_shape

    def once(shape: Shape, *args: Any, **kwargs: Any) -> Outcome:
        if shape.M == 8:
            raise KeyboardInterrupt
        return honest(shape, *args, **kwargs)

    monkeypatch.setattr(tune, "tune_shape", once)
    assert main(ARGUMENTS) == 0
    assert "not measured: interrupted" in capsys.readouterr().out
    assert lookup(24, 64, 32) == WINNER


def test_out_of_memory_costs_one_shape(stub: Stub, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    honest = search.make_buffers

    def small_gpu(shape: Shape, device: torch.device) -> Any:
        if shape.M == 24:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return honest(shape, device)

    monkeypatch.setattr(search, "make_buffers", small_gpu)
    assert main(ARGUMENTS) == 0
    assert "24x64x32         not measured: out of memory" in capsys.readouterr().out
    assert [entry.m for entry in load_user_table(0, NAME)] == [8]


def test_a_folder_that_cannot_be_written_is_known_before_measuring(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for chosen, reason in ((str(tmp_path / "file" / "tables"), "Not a directory"), ("off", "BERT_FUSED_TABLES is off")):
        monkeypatch.setenv("BERT_FUSED_TABLES", chosen)
        forget_tables()
        assert main(ARGUMENTS) == 2
        error = capsys.readouterr().err
        assert error.startswith("tune: cannot write ")
        assert reason in error
        assert len(error.splitlines()) == 1
        assert stub.samples == {}
        assert main([*ARGUMENTS, "--export", str(tmp_path / "exported.json")]) == 0
        captured = capsys.readouterr()
        assert len(captured.err.splitlines()) == 1
        assert len(parse_rows(json.loads((tmp_path / "exported.json").read_text())["entries"])) == 2
        (tmp_path / "exported.json").unlink()
        stub.samples.clear()


def test_a_read_only_folder_is_known_before_measuring(
    stub: Stub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(ARGUMENTS) == 0
    capsys.readouterr()
    stub.samples.clear()
    honest = Path.open

    def refuse(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if mode != "r":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return honest(path, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    forget_tables()
    assert main(ARGUMENTS) == 2
    error = capsys.readouterr().err
    assert error.startswith("tune: cannot write ")
    assert "Read-only file system" in error
    assert len(error.splitlines()) == 1
    assert stub.samples == {}
    assert lookup(24, 64, 32) == WINNER


def test_a_disk_that_fills_up_is_said_once(stub: Stub, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    honest = configs.remember

    def full(entries: Sequence[Entry], *arguments: Any) -> Path:
        if entries:
            raise OSError(28, "No space left on device")
        return honest(entries, *arguments)

    monkeypatch.setattr(tune, "remember", full)
    assert main(ARGUMENTS) == 1
    captured = capsys.readouterr()
    assert captured.err.count("No space left on device") == 1
    assert "table:" not in captured.out


def test_export(stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file for kernels/tables: what was measured, and the shipped entries that it does not replace."""
    generic = {"dtypes": ["float16"], "m": 64, "kernel": "library"}
    exact = generic | {"m": 24, "n": 64, "k": 32}
    other = exact | {"m": 48}
    shipped = {"arch": 0, "source": "computed: in a test", "entries": [generic, exact, other]}
    monkeypatch.setattr(tune, "shipped_table", lambda arch: shipped)
    path = tmp_path / "sm_0.json"
    assert main([*ARGUMENTS, "--export", str(path)]) == 0
    table = json.loads(path.read_text())
    assert table["arch"] == 0
    assert re.fullmatch(
        rf"measured on {NAME}, .*commit abc123; entries without measured times: computed: in a test", table["source"]
    )
    entries = parse_rows(table["entries"])
    assert [(e.m, e.n, e.k, e.config.kernel, e.measured is not None) for e in entries] == [
        (24, 64, 32, "pointer", True),
        (48, 64, 32, "library", False),
        (8, 64, 64, "pointer", True),
        (64, None, None, "library", False),
    ]
    monkeypatch.setattr(configs, "TABLES", tmp_path)
    forget_tables()
    assert get_config(24, 64, 32, "float16", 0, aligned=True) == WINNER
    assert main([*ARGUMENTS, "--budget", "-1", "--export", str(tmp_path / "again.json")]) == 0
    assert len(parse_rows(json.loads((tmp_path / "again.json").read_text())["entries"])) == 4


def test_export_to_nowhere(stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ARGUMENTS, "--export", str(tmp_path / "none" / "table.json")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert stub.samples == {}
    assert main([*ARGUMENTS, "--budget", "-1", "--export", str(tmp_path / "table.json")]) == 2
    assert "nothing was measured that could be exported" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--device", "cpu"], ["--device", "cuda:7"], ["--device", "nonsense"]])
def test_without_a_gpu(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", *arguments]) == 2
    assert capsys.readouterr().err == ("tune: tuning needs an NVIDIA GPU, and there is none that PyTorch can use\n")


@pytest.mark.parametrize(
    ("device", "reason"),
    [("cuda", "no kernel runs on this GPU: TRITON_INTERPRET is set"), ("cuda:2", "there is no GPU cuda:2")],
)
def test_a_gpu_that_cannot_be_tuned(device: str, reason: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert main(["tune", "--device", device]) == 2
    assert capsys.readouterr().err == f"tune: {reason}\n"


@pytest.mark.parametrize("text", ["", "3x4", "0x8x8", "8x8x8x8", "BERT-huge", "8x8x8,", "-1x8x8"])
def test_bad_shapes_are_named(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["tune", f"--shapes={text}"])
    assert stop.value.code == 2
    assert "is neither MxNxK nor one of MiniLM, BERT-base, BERT-large" in capsys.readouterr().err


def test_bad_dtypes_and_alignment_are_named(stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["tune", "--dtypes", "float16,int8"])
    assert "'int8' is not one of bfloat16, float16, tf32" in capsys.readouterr().err
    assert main(["tune", "--shapes", "8x64x36", "--dtypes", "float16"]) == 2
    assert "8x64x36: cuBLAS serves rows that are not on 16-byte boundaries" in capsys.readouterr().err


def test_shapes_of_models() -> None:
    assert shapes.parse_shapes("5x8x16,bert-BASE")[0] == (5, 8, 16)
    assert set(shapes.parse_shapes("bert-base")) == set(shapes.all_shapes(("BERT-base",)))
    everything = shapes.all_shapes()
    assert len(set(everything)) == len(everything) == 3 * 12
    rows = sorted({M for M, N, K in everything if (N, K) == (3072, 768)})
    assert rows[0] == 1
    assert all(b <= configs.REACH * a or (a, b) == (1, 8) for a, b in itertools.pairwise(rows))


def test_info_says_why(stub: Stub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from bert_fused.cli import info

    assert main(["info", "--arch", "90", "--shapes", "512x3072x768,300x3072x770"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^float16 +512 +3072 +768 +\S+ .*shipped table \(computed\)", out, re.MULTILINE)
    assert re.search(r"^float16 +300 +3072 +770 .*rows are not on 16-byte boundaries$", out, re.MULTILINE)
    assert re.search(r"^float32 +512 .*IEEE fp32 has no tensor cores$", out, re.MULTILINE)
    assert main(["info", "--arch", "120", "--shapes"]) == 0
    assert "no table for this architecture" in capsys.readouterr().out

    assert main(ARGUMENTS) == 0
    capsys.readouterr()
    info._print_choices(info._choices(0, NAME, (torch.float16,), [(24, 64, 32), (30, 64, 32), (2000, 64, 32)]))
    _, where, _, exact, near, far = capsys.readouterr().out.splitlines()
    assert str(user_tables.table_path(0, NAME)) in where
    assert re.search(r"measured here on \d{4}-\d\d-\d\d: 8 us, cuBLAS \+ pass 12, eager 14$", exact)
    assert near.endswith("eager 14, nearest to M = 24")
    assert far.endswith("no table for this architecture")

    entry = Entry(24, 64, 32, WINNER, Measured(8.0, 12.0, 14.0, "2026-01-01", ""))
    assert info._reason(entry, 24, 0, "").startswith("measured for the shipped table on 2026-01-01: 8 us")
