"""``verify``: compare a model, fused, with itself, unfused, on the same inputs."""

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..unpad.heads import reads_of
from ..unpad.hooks import argument
from .fuse import fused, unfused


@dataclass(frozen=True)
class Verification:
    """How far a fused model's outputs are from the same model's unfused.

    Attributes:
        max_abs_error: largest absolute difference over all elements of all floating-point outputs.
        cosine: smallest cosine similarity over the outputs, each taken as one vector.
        outputs: number of output tensors compared.
    """

    max_abs_error: float
    cosine: float
    outputs: int

    def __str__(self) -> str:
        return f"{self.outputs} outputs: max abs error {self.max_abs_error:.3g}, cosine {self.cosine:.9f}"


def verify(model: nn.Module, *args: object, **kwargs: object) -> Verification:
    """Call ``model(*args, **kwargs)`` fused and unfused and compare every floating-point output.

    For a model fused with ``unpad``, ``cls_only`` or ``skip_pooler``, only values that both calls compute are compared:
    per-token outputs at the tokens that the caller's ``[B, S]`` attention mask keeps, and only at position 0 where the
    last layer computes no other.

    Both calls run in eval mode without gradients, on copies of the arguments and from the same random state. The
    training mode of every module, the random state and what is fused are as before afterwards.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        ValueError: nothing in the model can be fused, or it returns no floating-point tensor.
    """
    pairs = compared(model, args, kwargs).values()
    return Verification(
        max_abs_error=max(max_abs_error(mine, other) for mine, other in pairs),
        cosine=min(_cosine(mine, other) for mine, other in pairs),
        outputs=len(pairs),
    )


def compared(
    model: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return path of an output -> the two tensors to compare, fused and unfused. Raises as ``verify``."""
    with fused(model) as report:
        if not report.fused:
            raise ValueError(f"nothing to verify, no module is fused:\n{report}")
        with _eval_mode(model):
            ours = outputs_of(model, args, kwargs)
            with unfused(model):
                theirs = outputs_of(model, args, kwargs)
    if not theirs or not ours:
        raise ValueError("nothing to verify: the model returned no floating-point tensor")
    keep = _real_tokens(model, args, kwargs)
    # Logits [B, S] hold one score for each token here, in other models one for each of S labels.
    scores_tokens = reads_of(model) == "tokens"
    return {
        path: _comparable(ours[path], theirs[path], keep, 2 if scores_tokens and path == "logits" else 3)
        for path in theirs
        if path in ours
    }


def outputs_of(model: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> dict[str, Tensor]:
    """Return the model's floating-point outputs by their path.

    The model gets copies of the arguments, and the random state is restored, so that the next call starts the same.
    """

    def copied(leaf: object) -> object:
        return leaf.detach().clone() if isinstance(leaf, Tensor) else copy.deepcopy(leaf)

    args, kwargs = tree_map(copied, (args, kwargs))
    devices = list({parameter.device for parameter in model.parameters() if parameter.is_cuda})
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        # Cloned, since a model may return the same buffer every time.
        return {path: tensor.clone() for path, tensor in _tensors(model(*args, **kwargs))}


def _real_tokens(model: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Tensor | None:
    """Return the real tokens, bool ``[B, S]``; None if the model computes padding as well or the mask is another."""
    if not any(getattr(module, "unpad", False) for module in model.modules()):
        return None
    mask = argument(model, "attention_mask", args, kwargs)
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _comparable(mine: Tensor, other: Tensor, keep: Tensor | None, dimensions: int) -> tuple[Tensor, Tensor]:
    """Cut two outputs down to the values that both calls computed. dimensions: of an output per token, at least."""
    if mine.dim() == other.dim() == 3 and mine.shape[1] == 1 < other.shape[1]:
        return mine, other[:, :1]
    if keep is not None and mine.dim() >= dimensions and mine.shape[:2] == keep.shape:
        keep = keep.to(mine.device)
        return mine[keep], other[keep]
    return mine, other


def max_abs_error(a: Tensor, b: Tensor) -> float:
    same = (a == b) | (a.isnan() & b.isnan())
    difference = (a.double() - b.double()).abs().masked_fill(same, 0.0)
    # An infinity or a NaN on one side only counts as an infinite error.
    return float(difference.nan_to_num(nan=math.inf).max()) if difference.numel() else 0.0


def _cosine(a: Tensor, b: Tensor) -> float:
    """Return the cosine similarity of the finite parts; 1 for equal outputs, zeros and empty ones included."""
    a, b = (t.double().flatten().masked_fill(~t.isfinite().flatten(), 0.0) for t in (a, b))
    return 1.0 if torch.equal(a, b) else float(torch.nn.functional.cosine_similarity(a, b, dim=0))


def _tensors(output: object, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield every floating-point tensor in nested tuples, lists and mappings, in order, with its path."""
    if isinstance(output, Tensor) and output.is_floating_point():
        yield path, output
    if isinstance(output, (tuple, list)):
        output = dict(enumerate(output))
    for key, value in output.items() if isinstance(output, Mapping) else ():
        yield from _tensors(value, f"{path}.{key}" if path else str(key))


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
