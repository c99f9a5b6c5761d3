"""A candidate that hangs or dies costs itself: rehearsed in the interpreter, with both planted in the child process."""

import ctypes
import functools
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from stub import CPU, LIBRARY, NAME, SHAPE

from bert_fused.__main__ import main
from bert_fused.cli import tune
from bert_fused.kernels.configs import Config, forget_tables, load_user_table
from bert_fused.tune import trials
from bert_fused.tune.search import EAGER, Budget, GpuUnusable, Refused, Shape, first_run, tune_shape
from bert_fused.tune.trials import Trials

HANGS, DIES, WRONG, RIGHT, ALSO_RIGHT = (Config("pointer", "float16", m, 32, 32, 1, 1) for m in (16, 32, 64, 128, 256))


def planted(shape: Shape, config: Config, training: bool, device: torch.device) -> None:
    """What a child does in place of ``first_run``."""
    if config == HANGS:
        time.sleep(3600)
    if config == DIES:
        ctypes.string_at(0)
    if config == WRONG:
        raise ValueError("wrong result: planted\nand more")
    first_run(shape, config, training, device)


@pytest.fixture(autouse=True)
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("BERT_FUSED_TABLES", str(tmp_path))
    monkeypatch.setattr(trials, "LIMIT", 5.0)
    forget_tables()
    yield
    forget_tables()


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every child process that was started."""
    started: list[Any] = []
    honest = Trials._start

    def counted(self: Trials) -> None:
        honest(self)
        started.append(self._child)

    monkeypatch.setattr(Trials, "_start", counted)
    return started


def sampler_of(calls: Any) -> Any:
    """The library takes 12 us, whoever else 8, and eager 14."""
    config = calls[0].keywords.get("config")
    calls[0]()
    microseconds = 14.0 if config is None else 12.0 if config == LIBRARY else 8.0
    return lambda: microseconds


def test_tune_goes_on_after_a_hang_and_a_fault(
    children: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both at two shapes: what hung once is not waited for again."""
    monkeypatch.setattr(tune, "find_gpu", lambda name: tune.Gpu(CPU, NAME, 0))
    monkeypatch.setattr(tune, "candidates", lambda *_: [HANGS, DIES, WRONG, RIGHT])
    monkeypatch.setattr(tune, "graph_sampler", sampler_of)
    monkeypatch.setattr(tune, "Trials", functools.partial(Trials, work=planted))
    assert main(["tune", "--shapes", "24x64x32,8x64x64", "--dtypes", "float16"]) == 0
    captured = capsys.readouterr()
    assert [entry.config for entry in load_user_table(0, NAME)] == [RIGHT, RIGHT]
    assert f"{HANGS} failed at 2 shapes: no result within 5 s" in captured.err
    assert re.search(rf"{DIES} failed at 2 shapes: it ended the process that tried it \(exit code -\d+\)", captured.err)
    assert f"{WRONG} failed at 2 shapes: ValueError: wrong result: planted\n" in captured.err
    # One from the start, one after the hang and one after the fault; none is left.
    assert len(children) == 3
    assert not any(child.is_alive() for child in children)


def test_all_but_eager_and_the_library_run_in_a_child_first() -> None:
    """The chosen one runs there once more, in training."""
    tried: list[tuple[Config, bool]] = []

    def trial(shape: Shape, config: Config, training: bool) -> None:
        assert shape == SHAPE
        tried.append((config, training))
        if config == WRONG or (config == RIGHT and training):
            raise Refused("it hung")

    outcome = tune_shape(
        SHAPE,
        [WRONG, RIGHT, ALSO_RIGHT],
        CPU,
        budget=Budget(1e9),
        sampler_of=lambda calls: functools.partial(
            {RIGHT: 7.0, ALSO_RIGHT: 8.0}.get, calls[0].keywords.get("config"), 8.5
        ),
        trial=trial,
    )
    assert tried == [(WRONG, False), (RIGHT, False), (ALSO_RIGHT, False), (RIGHT, True), (ALSO_RIGHT, True)]
    assert outcome.config == ALSO_RIGHT
    assert outcome.failed == {str(WRONG): "it hung", str(RIGHT): "it hung"}
    assert outcome.times.keys() == {EAGER, str(LIBRARY), str(RIGHT), str(ALSO_RIGHT)}


def test_the_budget_ignores_the_time_of_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else 30 s of waiting would end a run that has 60 s left."""
    now = [1000.0]
    monkeypatch.setattr("bert_fused.tune.search.time.monotonic", lambda: now[0])

    def trial(shape: Shape, config: Config, training: bool) -> None:
        now[0] += 30.0 if config == HANGS else 0.0
        if config == HANGS:
            raise Refused("it hung")

    budget = Budget(now[0] + 90)
    outcome = tune_shape(SHAPE, [HANGS, RIGHT], CPU, budget=budget, sampler_of=sampler_of, trial=trial)
    assert (outcome.config, outcome.unseen) == (RIGHT, 0)


class Pipe:
    """A child's end, in this process: what it is sent, and its answers."""

    def __init__(self, *requests: tuple[Shape, Config, bool]) -> None:
        self.requests = list(requests)
        self.answers: list[Any] = []

    def recv(self) -> Any:
        if not self.requests:
            raise EOFError
        return self.requests.pop(0)

    def send(self, answer: Any) -> None:
        self.answers.append(answer)


@pytest.fixture
def played_cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A device that is dead once something is in the list."""
    dead: list[str] = []

    def synchronize(device: torch.device) -> None:
        if dead:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")

    monkeypatch.setattr(torch, "zeros", lambda *_, device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(trials.signal, "signal", lambda *_: None)
    return dead


@pytest.mark.parametrize("raises", [True, False])
def test_a_child_whose_gpu_died_says_so_and_ends(raises: bool, played_cuda: list[str]) -> None:
    """Whether the call that did it notices or not."""

    def work(shape: Shape, config: Config, training: bool, device: torch.device) -> None:
        if config == WRONG:
            raise ValueError("wrong result")
        if config == DIES:
            played_cuda.append("dead")
            if raises:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")

    pipe = Pipe((SHAPE, RIGHT, False), (SHAPE, WRONG, False), (SHAPE, DIES, False), (SHAPE, RIGHT, True))
    trials._try(pipe, torch.device("cuda", 0), work)  # type: ignore[arg-type]
    fatal = "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert pipe.answers == [(None, True), (None, True), ("ValueError: wrong result", True), (fatal, False)]
    assert len(pipe.requests) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_a_child_that_cannot_use_the_gpu_ends_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where a GPU serves one process at a time."""
    monkeypatch.setattr(tune, "find_gpu", lambda name: tune.Gpu(torch.device("cuda", 0), NAME, 0))
    assert main(["tune", "--shapes", "24x64x32", "--dtypes", "float16"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tune: the process that tries candidates cannot use the GPU: ")
    assert error.count("\n") == 1


def test_a_gpu_lost_in_between_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the candidate that was next."""

    def trial(shape: Shape, config: Config, training: bool) -> None:
        raise GpuUnusable("the process that tries candidates cannot use the GPU: it did not start")

    with pytest.raises(GpuUnusable, match="it did not start"):
        tune_shape(SHAPE, [RIGHT], CPU, budget=Budget(1e9), sampler_of=sampler_of, trial=trial)
