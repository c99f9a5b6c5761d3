"""``verify``: the same model, the same inputs, fused and unfused."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .fusion import fused, unfused


@dataclass(frozen=True)
class Verification:
    """How far a fused model's outputs are from the same model's unfused.

    max_abs_error: largest absolute difference over all elements of all floating-point outputs.
    cosine: smallest cosine similarity over the outputs, each taken as one vector.
    outputs: number of output tensors compared.
    """

    max_abs_error: float
    cosine: float
    outputs: int

    def __str__(self) -> str:
        return f"{self.outputs} outputs: max abs error {self.max_abs_error:.3g}, cosine {self.cosine:.9f}"


def verify(model: nn.Module, *args: Any, **kwargs: Any) -> Verification:
    """Call ``model(*args, **kwargs)`` fused and unfused and compare every floating-point output.

    Both calls run in eval mode without gradients. The training mode of every module and the random state are as before
    afterwards, and so is what is fused.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        ValueError: nothing in the model can be fused, or it returns no floating-point tensor.
    """
    with fused(model) as report:
        if not report.fused:
            raise ValueError(f"nothing to verify, no module is fused:\n{report}")
        with _eval_mode(model), _kept_random_state(model), torch.no_grad():
            ours = list(_tensors(model(*args, **kwargs)))
            with unfused(model):
                theirs = list(_tensors(model(*args, **kwargs)))
    if not theirs:
        raise ValueError("nothing to verify: the model returned no floating-point tensor")
    pairs = list(zip(ours, theirs, strict=True))
    return Verification(
        max_abs_error=max(_max_abs_error(mine, other) for mine, other in pairs),
        cosine=min(_cosine(mine, other) for mine, other in pairs),
        outputs=len(pairs),
    )


def _max_abs_error(a: Tensor, b: Tensor) -> float:
    same = (a == b) | (a.isnan() & b.isnan())
    difference = (a.double() - b.double()).abs().masked_fill(same, 0.0)
    # An infinity or a NaN on one side only is as wrong as can be.
    return float(difference.nan_to_num(nan=math.inf).max()) if difference.numel() else 0.0


def _cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double().flatten().nan_to_num(), b.double().flatten().nan_to_num()
    if torch.equal(a, b):
        return 1.0
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


def _tensors(output: Any) -> Iterator[Tensor]:
    """Every floating-point tensor in nested tuples, lists and mappings, in order."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextlib.contextmanager
def _kept_random_state(model: nn.Module) -> Iterator[None]:
    devices = {p.device for p in model.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices=list(devices)):
        yield
