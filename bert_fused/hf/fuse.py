"""``fuse``, ``unfuse`` and ``fused``: put the fused modules into a Hugging Face model and take them out again.

A module is fused by assigning its ``__class__``: parameters, hooks, keys and identity stay, and undoing it is exact.
"""

import contextlib
import itertools
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from ..unpad.encoder import FusedEncoder
from ..unpad.hooks import add_hooks, remove_hooks
from . import modules
from .planning import Change, Options, Plan, make_plan

_lock = threading.Lock()
_fuse_count = itertools.count(1)

# Attributes that ``fuse`` sets on instances where they differ from the class's.
_OPTIONS = ("recompute_preact", "skip", "unpad", "cls_only", "under_head", "fuse_count")


@dataclass(frozen=True)
class FuseReport:
    """What ``fuse`` did.

    Attributes:
        fused: names of the fused modules, as in ``model.named_modules()``.
        skipped: name -> why a module that can be fused, or looks as if it could, was left alone. The name "" stands for
            the whole model, where nothing in it can be fused.
        paths: name -> what a fused module runs on its present device: "Triton", or "PyTorch" and the reason.
    """

    fused: tuple[str, ...]
    skipped: dict[str, str] = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = [(name or "(model)", "fused", self.paths[name]) for name in self.fused]
        rows += [(name or "(model)", "skipped", reason) for name, reason in self.skipped.items()]
        width = max(len(name) for name, _, _ in rows)
        lines = [f"{name:<{width}}  {what:<7}  {why}" for name, what, why in rows]
        return "\n".join([*lines, f"{len(self.fused)} fused, {len(self.skipped)} skipped"])


def fuse(
    model: nn.Module,
    *,
    recompute_preact: bool = False,
    unpad: bool = False,
    cls_only: bool | Literal["auto"] = False,
    skip_pooler: bool = False,
) -> FuseReport:
    """Fuse every linear layer and its activation of a Hugging Face model, in place, and on request its encoder.

    Fused are intermediates, poolers, MLPs and heads whose class's own code has a known form (``docs/models.md``).
    Results stay those of the model, gradients included. A module with an adapter, a hook, quantised weights or an
    activation without a kernel is left alone and named in the report. Every call checks this again: a module that gets
    one of these after fusing runs Hugging Face's own forward for as long as it has it.

    Options hold for every module in the report, also one fused before.

    Args:
        model: any ``nn.Module`` with modules of transformers inside.
        recompute_preact: train in less memory: each module computes its pre-activation again in the backward pass
            instead of keeping it (see ``linear_act``).
        unpad: compute nothing at padding. Hidden states are zeros there; at real tokens they are the model's, and so is
            what its head returns. This and ``cls_only`` are for bert, roberta, xlm-roberta, camembert and electra.
        cls_only: compute the last layer for position 0 only. ``"auto"``: in eval mode, inside a head that reads no
            other position (sequence classification, next sentence, multiple choice). ``True``: also when the model
            itself is called; its ``last_hidden_state`` is then ``[B, 1, H]``, for embeddings taken from position 0.
        skip_pooler: leave out the pooler of a model without a head; ``pooler_output`` is then None.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``, or an option not a bool.
        ValueError: ``cls_only`` is another string.
    """
    plan = _plan(model, Options(recompute_preact, unpad, cls_only, skip_pooler))
    _apply([*plan.now, *plan.before])
    return _report(plan)


def unfuse(model: nn.Module) -> None:
    """Give every fused module in ``model`` its original class back.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        RuntimeError: ``fully_shard`` made a fused module a unit of its own, not a module around it. Nothing is changed.
    """
    _check(model)
    _restore(model.modules())
    remove_hooks(model.modules())


@contextlib.contextmanager
def fused(
    model: nn.Module,
    *,
    recompute_preact: bool = False,
    unpad: bool = False,
    cls_only: bool | Literal["auto"] = False,
    skip_pooler: bool = False,
) -> Iterator[FuseReport]:
    """Fuse within a ``with`` block, as ``fuse`` does. What was fused before stays as it was, in the block and after it.

    The block is the model's, not the thread's: leaving it unfuses the model for every thread that calls it.

    Raises:
        TypeError, ValueError: as ``fuse``.
    """
    plan = _plan(model, Options(recompute_preact, unpad, cls_only, skip_pooler))
    _apply(plan.now)
    try:
        yield _report(plan)
    finally:
        _restore(change.module for change in plan.now)
        for change in plan.now:
            if change.site is not None:
                remove_hooks(module for module, _ in change.site.hooked)


def _plan(model: nn.Module, options: Options) -> Plan:
    _check(model)
    with _lock:
        return make_plan(model, options)


def _report(plan: Plan) -> FuseReport:
    return FuseReport(tuple(plan.paths), plan.skipped, plan.paths)


def _apply(changes: Sequence[Change]) -> None:
    with _lock:
        _drop_options(change.module for change in changes)
        for module, kind, options, site in changes:
            module.__class__ = kind
            module.__dict__.update(options)
            if issubclass(kind, FusedEncoder):
                module.__dict__["fuse_count"] = next(_fuse_count)
            if site is not None and options:
                add_hooks(site.hooked)
            elif site is not None:
                remove_hooks(module for module, _ in site.hooked)


@contextlib.contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """Unfuse within a ``with`` block, then fuse the same modules again."""
    was_fused = [module for module in model.modules() if modules.original_class(module)]
    before = []
    for module in was_fused:
        options = {name: module.__dict__[name] for name in _OPTIONS if name in module.__dict__}
        before.append(Change(module, type(module), options))
    _restore(was_fused)
    try:
        yield
    finally:
        _apply(before)


def _restore(candidates: Iterable[nn.Module]) -> None:
    with _lock:
        fused_ones = [(module, original) for module in candidates if (original := modules.original_class(module))]
        for module, _ in fused_ones:
            if modules.wrapped_class(module) is not None:
                kind = type(module).__name__
                raise RuntimeError(f"fully_shard made it a {kind}, which it must stay: unfuse before fully_shard")
        _drop_options(module for module, _ in fused_ones)
        for module, original in fused_ones:
            module.__class__ = original


def _drop_options(fused_ones: Iterable[nn.Module]) -> None:
    """Take the options off all modules before the class of any is changed: an encoder without them runs dense."""
    for module in fused_ones:
        for name in _OPTIONS:
            module.__dict__.pop(name, None)


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
