"""One shape of ``tune``: its candidates are checked against fp64, timed in turns beside eager, and one is chosen."""

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cli.common import CommandError
from ..kernels.configs import Config
from ..reference import linear_act
from ..timing import Call, Sampler, buffer_count, graph_sampler, interleave, ratio, repeated, summarize
from .accuracy import LinearAct, check

ROUNDS = 20
MIN_ROUNDS = 5
# A candidate whose first samples take this many times as long as the best's so far is timed no further.
HOPELESS = 1.25
# Candidates are equal if the interval of their ratio contains 1 and their medians are no further apart than this.
EQUAL = 0.98
# Numbers are checked on so many rows at most: fp64 takes time and memory.
CHECKED_ROWS = 4096

EAGER = "eager"

SamplerOf = Callable[[Sequence[Call]], Sampler]
# Runs a candidate for the first time, with the pre-activation or without: somewhere else, or it would not be asked.
Trial = Callable[["Shape", Config, bool], None]


@dataclass(frozen=True)
class Shape:
    """``[M, K] @ [N, K].T``; dtype as in ``Config``."""

    M: int
    N: int
    K: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype:<9}{self.M}x{self.N}x{self.K}"

    @property
    def activation(self) -> str:
        return "tanh" if self.N == self.K else "gelu"  # of BERT's layers only the pooler is square


@dataclass(frozen=True)
class Outcome:
    """What was found for a shape.

    times: median microseconds per call of whoever was timed to the end, by ``str(config)``, and of ``EAGER``.
    failed: candidate -> why it is none: wrong numbers, or the error it raised.
    hopeless, unseen: how many were given up after their first samples, and how many there was no time for.
    """

    config: Config
    times: dict[str, float]
    failed: dict[str, str]
    hopeless: int
    unseen: int


@dataclass
class Budget:
    """Time on ``time.monotonic()``; ``longest`` is the longest preparation so far, mostly a compilation, in seconds."""

    deadline: float
    longest: float = 0.0

    @property
    def end_of_rounds(self) -> float:
        """The chosen one is compiled once more afterwards, and checked twice."""
        return self.deadline - 2 * self.longest

    def suffices(self) -> bool:
        """Whether one more candidate can be prepared."""
        return time.monotonic() + self.longest <= self.end_of_rounds


class NotMeasured(Exception):
    """A shape has no result; the message says why."""


class Refused(Exception):
    """A candidate failed where it was tried; the message says how."""


class GpuUnusable(CommandError):
    """A candidate left the GPU in a state in which nothing more can be measured."""


@torch.no_grad()
def tune_shape(
    shape: Shape,
    candidates: Sequence[Config],
    device: torch.device,
    *,
    budget: Budget,
    sampler_of: SamplerOf = graph_sampler,
    trial: Trial | None = None,
    proved: Config | None = None,
) -> Outcome:
    """Choose among ``candidates``, which are in order of preference.

    The library goes first, whether or not it is among them. Eager PyTorch is timed beside them. trial: where candidates
    run first, but for the library and ``proved``, which ran at this shape before; None: in this process.

    Raises:
        NotMeasured: eager or the library failed, or the time does not suffice to compare them with anything.
        GpuUnusable: a candidate broke it.
    """
    library = Config("library", shape.dtype)
    configs = dict.fromkeys((library, *candidates))
    bars = (EAGER, str(library))
    samplers: dict[str, Sampler] = {}
    first: dict[str, float] = {}
    failed: dict[str, str] = {}
    unseen = 0
    with fp32_products(shape.dtype):
        buffers = make_buffers(shape, device)
        x, weight, bias = buffers[0]
        checked = (x[:CHECKED_ROWS], weight, bias)

        def attempt(config: Config, training: bool) -> None:
            if trial is None or config in (library, proved):
                check_config(config, shape.activation, *checked, training=training)
            else:
                trial(shape, config, training)

        named = {str(config): config for config in configs}
        for name, function in _rivals(shape, configs).items():
            if not budget.suffices():
                unseen += 1
                continue
            begin = time.monotonic()
            with _recording(failed, name, device):
                if name == EAGER:
                    check(function, shape.activation, *checked)
                else:
                    attempt(named[name], training=False)
                sampler = sampler_of(repeated([functools.partial(function, *inputs) for inputs in buffers]))
                sampler()
                first[name] = min(sampler() for _ in range(2))
                if name in bars or first[name] <= HOPELESS * min(first.values()):
                    samplers[name] = sampler
            if name in bars and name in failed:
                raise NotMeasured(f"{name}: {failed[name]}")
            if name not in failed:  # a hang says nothing about the next one
                budget.longest = max(budget.longest, time.monotonic() - begin)
        if not samplers.keys() >= set(bars) or (unseen and len(first) + len(failed) == len(bars)):
            raise NotMeasured("out of time")
        # Those that were let in early were compared with fewer.
        limit = HOPELESS * min(first.values())
        finalists = {name: sampler for name, sampler in samplers.items() if name in bars or first[name] <= limit}
        samples = interleave(finalists, rounds=ROUNDS, deadline=budget.end_of_rounds)
        if len(samples[EAGER]) < MIN_ROUNDS:
            raise NotMeasured("out of time")
        timed = {config: samples[str(config)] for config in configs if str(config) in samples}
        while True:
            config = pick(timed, samples[EAGER])
            with _recording(failed, str(config), device):
                attempt(config, training=True)
            if str(config) not in failed:
                break
            if config == library:
                raise NotMeasured(f"{library}: {failed[str(library)]}")
            del timed[config]
    times = {name: summarize(taken).median for name, taken in samples.items()}
    return Outcome(config, times, failed, hopeless=len(first) - len(finalists), unseen=unseen)


def pick(samples: Mapping[Config, Sequence[float]], eager: Sequence[float]) -> Config:
    """The fastest by median, or the first in order that cannot be told from it.

    The first of ``samples`` is the library. It is also the choice where eager PyTorch beats the fastest: eager is no
    configuration, and the library is nearest to it.
    """
    library = next(iter(samples))
    fastest = min(samples, key=lambda config: summarize(samples[config]).median)
    if ratio(eager, samples[fastest]).high < 1:
        return library
    return next(config for config in samples if config == fastest or _equal(samples[fastest], samples[config]))


def _equal(fastest: Sequence[float], other: Sequence[float]) -> bool:
    compared = ratio(fastest, other)
    return compared.high >= 1 and compared.median >= EQUAL


def make_buffers(shape: Shape, device: torch.device, sets: int | None = None) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Sets of x, weight and bias, by default so many that none is in cache when its turn comes."""
    dtype = torch.float32 if shape.dtype == "tf32" else getattr(torch, shape.dtype)
    g = torch.Generator(device).manual_seed(0)

    def normal(scale: float, *sizes: int) -> Tensor:
        # What bfloat16 holds, TF32 holds too: its products are exact then, and fp32's bound can judge them.
        return (scale * torch.randn(*sizes, device=device, generator=g)).bfloat16().to(dtype)

    if sets is None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
        sets = buffer_count((shape.M + shape.N) * shape.K * dtype.itemsize, cache)
    return [(normal(1, shape.M, shape.K), normal(0.02, shape.N, shape.K), normal(0.02, shape.N)) for _ in range(sets)]


def _rivals(shape: Shape, configs: Iterable[Config]) -> dict[str, LinearAct]:
    activation = shape.activation
    rivals: dict[str, LinearAct] = {EAGER: functools.partial(linear_act, activation=activation)}
    for config in configs:
        rivals[str(config)] = functools.partial(_fused, activation=activation, config=config)
    return rivals


def _fused(
    x: Tensor, weight: Tensor, bias: Tensor, *, activation: str, config: Config, save_preact: bool = False
) -> Tensor:
    from ..kernels.linear_act import linear_act_fwd

    return linear_act_fwd(x, weight, bias, activation=activation, save_preact=save_preact, config=config)[0]


@torch.no_grad()
def first_run(shape: Shape, config: Config, training: bool, device: torch.device) -> None:
    """Raise what a configuration raises that fails at a shape or gives wrong numbers there.

    Numbers are checked on some rows; a hang may need them all.
    """
    with fp32_products(shape.dtype):
        ((x, weight, bias),) = make_buffers(shape, device, sets=1)
        check_config(config, shape.activation, x[:CHECKED_ROWS], weight, bias, training=training)
        if len(x) > CHECKED_ROWS:
            _fused(x, weight, bias, activation=shape.activation, config=config, save_preact=training)


def check_config(config: Config, activation: str, x: Tensor, weight: Tensor, bias: Tensor, *, training: bool) -> None:
    """Raise what a configuration raises that is wrong, or in training keeps no or a wrong pre-activation."""
    if not training:
        check(functools.partial(_fused, activation=activation, config=config), activation, x, weight, bias)
        return
    from ..kernels.linear_act import linear_act_fwd

    def kept(which: int) -> LinearAct:
        def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            result = linear_act_fwd(x, weight, bias, activation="gelu", save_preact=True, config=config)[which]
            assert result is not None
            return result

        return call

    check(kept(0), "gelu", x, weight, bias)
    check(kept(1), "none", x, weight, bias)


def in_one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


@contextmanager
def _recording(failed: dict[str, str], name: str, device: torch.device) -> Iterator[None]:
    """That a candidate does not compile, does not fit or is wrong is a result as well."""
    try:
        yield
    except GpuUnusable:
        raise
    except Exception as error:
        failed[name] = str(error) if isinstance(error, Refused) else in_one_line(error)
        if device.type == "cuda":
            try:
                torch.cuda.synchronize(device)
            except RuntimeError as fatal:
                raise GpuUnusable(f"after {name} the GPU can do no more: {fatal}") from error


@contextmanager
def fp32_products(dtype: str) -> Iterator[None]:
    """torch's setting of how fp32 matrices are multiplied, eager's too, as a ``Config.dtype`` wants it."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
