"""``fuse``, ``unfuse`` and ``fused``: put the fused modules into a Hugging Face model and take them out again.

A module is fused by assigning its ``__class__``: parameters, hooks, keys and identity stay, and undoing it is exact.
"""

import contextlib
import itertools
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, NamedTuple

from torch import nn

from ..unpad.attention import FusedAttention, FusedSelfAttention
from ..unpad.encoder import FusedEncoder
from ..unpad.hooks import add_hooks, remove_hooks
from ..unpad.sites import EncoderSite, encoder_sites, settings
from . import modules
from .checks import path_of, step_aside_reason
from .recognize import lookalike_reason

_lock = threading.Lock()
_fuse_count = itertools.count(1)

_MATCHED_BY_NAME = "its class is named in _no_split_modules"

# Attributes that ``fuse`` sets on instances where they differ from the class's.
_OPTIONS = ("recompute_preact", "skip", "unpad", "cls_only", "under_head", "fuse_count")


@dataclass(frozen=True)
class Options:
    """The arguments of ``fuse`` and ``fused``."""

    recompute_preact: bool = False
    unpad: bool = False
    cls_only: bool | Literal["auto"] = False
    skip_pooler: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.cls_only, str) and self.cls_only != "auto":
            raise ValueError(f"cls_only must be True, False or 'auto', got {self.cls_only!r}")
        for name, value in vars(self).items():
            if not isinstance(value, bool) and not (name == "cls_only" and isinstance(value, str)):
                raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


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
    report, fused_now, fused_before = _fuse(model, Options(recompute_preact, unpad, cls_only, skip_pooler))
    _apply([*fused_now, *fused_before])
    return report


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
    report, fused_now, _ = _fuse(model, Options(recompute_preact, unpad, cls_only, skip_pooler))
    _apply(fused_now)
    try:
        yield report
    finally:
        _restore(change.module for change in fused_now)
        for change in fused_now:
            if change.site is not None:
                remove_hooks(module for module, _ in change.site.hooked)


class _Change(NamedTuple):
    """A module, the class it gets, and its options. site: of an encoder, else None."""

    module: nn.Module
    kind: type[nn.Module]
    options: Mapping[str, object] = MappingProxyType({})
    site: EncoderSite | None = None


def _apply(changes: Sequence[_Change]) -> None:
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


@dataclass
class _Plan:
    """A report being made, and the changes: ``now`` to modules not fused yet, ``before`` to those that are."""

    skipped: dict[str, str] = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)
    now: list[_Change] = field(default_factory=list)
    before: list[_Change] = field(default_factory=list)

    def add(self, change: _Change) -> None:
        (self.before if modules.original_class(change.module) is not None else self.now).append(change)


def _fuse(model: nn.Module, options: Options) -> tuple[FuseReport, list[_Change], list[_Change]]:
    """Return the report, the changes to modules not fused yet, and those to fused ones. Changes nothing."""
    _check(model)
    plan = _Plan()
    sites = list(encoder_sites(model))
    unread = {id(site.pooler) for site in sites if site.head is None and options.skip_pooler}
    with _lock:
        # accelerate and FSDP look for these classes by name, and would miss one that has ours.
        matched_by_name = {name for each in model.modules() for name in getattr(each, "_no_split_modules", None) or ()}
        _plan_blocks(plan, model, options, matched_by_name, unread)
        skipped_poolers = {id(change.module) for change in (*plan.now, *plan.before) if "skip" in change.options}
        for site in sites:
            pools = site.pooler is not None and id(site.pooler) not in skipped_poolers
            _plan_encoder(plan, site, options, matched_by_name, pools)
    holds_no = f"{type(model).__name__} holds no"
    if (options.unpad or options.cls_only) and not sites:
        families = "bert, roberta, xlm-roberta, camembert, electra"
        plan.skipped[""] = f"{holds_no} whole model of the families {families}, so no encoder is fused"
    elif not plan.paths and not plan.skipped:
        plan.skipped[""] = f"{holds_no} module of transformers that can be fused"
    return FuseReport(tuple(plan.paths), plan.skipped, plan.paths), plan.now, plan.before


def _plan_blocks(plan: _Plan, model: nn.Module, options: Options, matched_by_name: set[str], unread: set[int]) -> None:
    """Plan the linear layers with their activations. unread: ids of the poolers to skip."""
    for name, module in model.named_modules():
        already, wrapped = modules.original_class(module), modules.wrapped_class(module)
        target = modules.fused_class(already or wrapped or type(module))
        if target is None:
            reason = lookalike_reason(module)
            if reason is not None:
                plan.skipped[name] = reason
            continue
        if wrapped is not None and not already:
            reason = f"fully_shard made it a {type(module).__name__}, which it must stay: fuse before fully_shard"
        else:
            reason = step_aside_reason(module, already or type(module), target.block)
        if reason is None and type(module).__name__ in matched_by_name:
            reason = _MATCHED_BY_NAME
        if reason is not None:
            plan.skipped[name] = reason
            continue
        settings = {"recompute_preact": True} if options.recompute_preact else {}
        plan.paths[name] = path_of(module, target.block)
        if id(module) in unread:
            settings["skip"], plan.paths[name] = True, "left out on request"
        plan.add(_Change(module, target if wrapped is None else type(module), settings))


def _plan_encoder(plan: _Plan, site: EncoderSite, options: Options, matched_by_name: set[str], pools: bool) -> None:
    """Plan an encoder and its attentions. pools: a pooler reads its result."""
    already = modules.original_class(site.encoder)
    granted, does, reason = settings(site, options.unpad, options.cls_only, pools)
    if granted and type(site.encoder).__name__ in matched_by_name:
        granted, reason = {}, _MATCHED_BY_NAME
    if reason is not None:
        plan.skipped[site.name] = reason
    if not granted and already is None:
        return
    attentions = []
    if granted:
        attentions = [layer.attention.self for layer in site.encoder.layer] + [site.encoder.layer[-1].attention]
    for module in site.encoder.modules():
        original = modules.original_class(module) or type(module)
        if module in attentions:
            plan.add(_Change(module, modules.fused_encoder_class(original) or original))
        elif isinstance(module, (FusedSelfAttention, FusedAttention)):  # in a layer that was moved after it was fused
            plan.add(_Change(module, original))
    kind = type(site.encoder)
    if granted:
        kind = modules.fused_encoder_class(already or kind) or kind
        plan.paths[site.name] = does
    elif not modules.wrapped_class(site.encoder):
        kind = already or kind
    plan.add(_Change(site.encoder, kind, granted, site))


@contextlib.contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """Unfuse within a ``with`` block, then fuse the same modules again."""
    was_fused = [module for module in model.modules() if modules.original_class(module)]
    before = []
    for module in was_fused:
        options = {name: module.__dict__[name] for name in _OPTIONS if name in module.__dict__}
        before.append(_Change(module, type(module), options))
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
