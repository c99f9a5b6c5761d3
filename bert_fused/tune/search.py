"""Measure one shape for ``tune``: check its candidates against fp64, time them in turns with eager, and choose one."""

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cli.common import CommandError
from ..fallback import HAS_TRITON
from ..kernels.configs import Config
from ..reference import linear_act
from ..timing import Call, Sampler, buffer_count, graph_sampler, interleave, ratio, repeated, summarize
from .accuracy import LinearAct, check

if HAS_TRITON:
    from ..kernels.linear_act import linear_act_fwd

ROUNDS = 20
MIN_ROUNDS = 5
# A candidate is timed no further if its first samples take more than this many times as long as the best's so far.
HOPELESS = 1.25
# Candidates are equal if the interval of their ratio contains 1 and the ratio itself is at least this.
EQUAL = 0.98
# At most this many rows are checked: fp64 takes time and memory.
CHECKED_ROWS = 4096

EAGER = "eager"

Data = tuple[Tensor, Tensor, Tensor]  # x, weight, bias
SamplerOf = Callable[[Sequence[Call]], Sampler]
# Runs a candidate for the first time in another process: the shape, the candidate, and whether it keeps the
# pre-activation. Raises ``Refused`` or ``GpuUnusable``.
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
    """The result for one shape.

    config: the chosen configuration.
    times: median microseconds per call by ``str(config)``, and of ``EAGER``, for those that were timed in all rounds.
    failed: by the same names, the error that a candidate raised, wrong numbers included.
    unseen: how many candidates were not tried for lack of time.
    """

    config: Config
    times: dict[str, float]
    failed: dict[str, str]
    unseen: int


@dataclass
class Budget:
    """A deadline on ``time.monotonic()``; longest: seconds of the longest preparation so far, mostly a compilation."""

    deadline: float
    longest: float = 0.0

    @property
    def end_of_rounds(self) -> float:
        """When rounds end: early enough to compile the chosen candidate once more, and to check it twice."""
        return self.deadline - 2 * self.longest

    def suffices(self) -> bool:
        """Return whether one more candidate can be prepared."""
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
) -> Outcome:
    """Choose among ``candidates``, which are in order of preference, and the library; eager PyTorch is timed as well.

    trial: runs each candidate for the first time; None: that happens in this process, as for the library.

    Raises:
        NotMeasured: eager or the library failed, or there is no time to compare them with a candidate.
        GpuUnusable: a candidate broke the GPU.
    """
    library = Config("library", shape.dtype)
    configs = dict.fromkeys((library, *candidates))
    rivals: dict[str, Config | None] = {EAGER: None} | {str(config): config for config in configs}
    bars = list(rivals)[:2]  # eager and the library
    samplers: dict[str, Sampler] = {}
    first: dict[str, float] = {}
    failed: dict[str, str] = {}
    unseen = 0
    with fp32_products(shape.dtype):
        buffers = make_buffers(shape, device)
        x, weight, bias = buffers[0]
        checked = (x[:CHECKED_ROWS], weight, bias)
        attempt = functools.partial(_attempt, shape, checked, trial)
        for i, (name, config) in enumerate(rivals.items()):
            if not budget.suffices():
                unseen = len(rivals) - i
                break
            begin = time.monotonic()
            with _recording(failed, name, device):
                attempt(config, training=False)
                sampler = sampler_of(repeated([functools.partial(_rival(shape, config), *each) for each in buffers]))
                sampler()
                first[name] = min(sampler() for _ in range(2))
                if name in bars or first[name] <= HOPELESS * min(first.values()):
                    samplers[name] = sampler
            if name in bars and name in failed:
                raise NotMeasured(f"{name}: {failed[name]}")
            if name not in failed:  # a hang says nothing about the next candidate
                budget.longest = max(budget.longest, time.monotonic() - begin)
        if unseen and len(rivals) - unseen <= len(bars):
            raise NotMeasured("out of time")
        # An early candidate was compared only with those before it.
        limit = HOPELESS * min(first.values())
        finalists = {name: sampler for name, sampler in samplers.items() if name in bars or first[name] <= limit}
        samples = interleave(finalists, rounds=ROUNDS, deadline=budget.end_of_rounds)
        if len(samples[EAGER]) < MIN_ROUNDS:
            raise NotMeasured("out of time")
        timed = {config: samples[str(config)] for config in configs if str(config) in samples}
        chosen = _pick_trainable(timed, samples[EAGER], attempt, failed, device)
    times = {name: summarize(taken).median for name, taken in samples.items()}
    return Outcome(chosen, times, failed, unseen)


def _rival(shape: Shape, config: Config | None) -> LinearAct:
    if config is None:
        return functools.partial(linear_act, activation=shape.activation)
    return functools.partial(_fused, activation=shape.activation, config=config)


def _attempt(shape: Shape, data: Data, trial: Trial | None, config: Config | None, training: bool) -> None:
    """Run and check a rival, and raise what it raises. config: None is eager."""
    if config is None:
        check(_rival(shape, None), shape.activation, *data)
    elif trial is None or config.kernel == "library":
        check_config(config, shape.activation, *data, training=training)
    else:
        trial(shape, config, training)


def _pick_trainable(
    timed: dict[Config, list[float]],
    eager: list[float],
    attempt: Callable[..., None],
    failed: dict[str, str],
    device: torch.device,
) -> Config:
    """Return the best of ``timed`` that can also save the pre-activation; remove those that fail at it."""
    while True:
        config = pick(timed, eager)
        with _recording(failed, str(config), device):
            attempt(config, training=True)
        if str(config) not in failed:
            return config
        if config.kernel == "library":
            raise NotMeasured(f"{config}: {failed[str(config)]}")
        del timed[config]


def pick(samples: Mapping[Config, Sequence[float]], eager: Sequence[float]) -> Config:
    """Return the first of ``samples`` that is the fastest by median, or cannot be told from the fastest.

    The library must come first. It is also chosen if eager PyTorch beats the fastest: eager is no configuration, and
    the library is nearest to it.
    """
    library = next(iter(samples))
    fastest = min(samples, key=lambda config: summarize(samples[config]).median)
    if ratio(eager, samples[fastest]).high < 1:
        return library
    return next(config for config in samples if config == fastest or _equal(samples[fastest], samples[config]))


def _equal(fastest: Sequence[float], other: Sequence[float]) -> bool:
    compared = ratio(fastest, other)
    return compared.high >= 1 and compared.median >= EQUAL


def make_buffers(shape: Shape, device: torch.device, sets: int | None = None) -> list[Data]:
    """Return sets of x, weight and bias; by default so many that each has left the cache before its next turn."""
    dtype = torch.float32 if shape.dtype == "tf32" else getattr(torch, shape.dtype)
    g = torch.Generator(device).manual_seed(0)

    def normal(scale: float, *sizes: int) -> Tensor:
        # TF32 holds bfloat16 numbers exactly, so its products are exact and fp32's bound can judge them.
        return (scale * torch.randn(*sizes, device=device, generator=g)).bfloat16().to(dtype)

    if sets is None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
        sets = buffer_count((shape.M + shape.N) * shape.K * dtype.itemsize, cache)
    return [(normal(1, shape.M, shape.K), normal(0.02, shape.N, shape.K), normal(0.02, shape.N)) for _ in range(sets)]


def _fused(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    activation: str,
    config: Config,
    save_preact: bool = False,
    which: int = 0,
) -> Tensor:
    """Return one of the kernel's outputs: 0 is the result, 1 the pre-activation."""
    output = linear_act_fwd(x, weight, bias, activation=activation, save_preact=save_preact, config=config)[which]
    assert output is not None
    return output


@torch.no_grad()
def first_run(shape: Shape, config: Config, training: bool, device: torch.device) -> None:
    """Run a configuration at a shape for the first time; raise if it fails or computes wrong numbers.

    Only the first rows' numbers are checked, but all rows are run, since a hang may need them all.
    """
    with fp32_products(shape.dtype):
        ((x, weight, bias),) = make_buffers(shape, device, sets=1)
        check_config(config, shape.activation, x[:CHECKED_ROWS], weight, bias, training=training)
        if len(x) > CHECKED_ROWS:
            _fused(x, weight, bias, activation=shape.activation, config=config, save_preact=training)


def check_config(config: Config, activation: str, x: Tensor, weight: Tensor, bias: Tensor, *, training: bool) -> None:
    """Check a configuration: raise its own error, or ValueError if its result is wrong, or in training its preact."""
    if not training:
        check(functools.partial(_fused, activation=activation, config=config), activation, x, weight, bias)
        return
    for which, computed in enumerate(("gelu", "none")):
        call = functools.partial(_fused, activation="gelu", config=config, save_preact=True, which=which)
        check(call, computed, x, weight, bias)


def in_one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


@contextmanager
def _recording(failed: dict[str, str], name: str, device: torch.device) -> Iterator[None]:
    """Record an error under ``name`` and go on: a candidate that does not compile, fit or compute right is a result."""
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
    """Multiply fp32 matrices in TF32 if ``dtype`` is "tf32", else in IEEE fp32. This sets torch, so eager as well."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
