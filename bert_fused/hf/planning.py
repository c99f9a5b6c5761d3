"""Decide what ``fuse`` changes in a model, and what its report says. Changes nothing. Needs transformers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, NamedTuple

from torch import nn

from ..guards import class_is_patched
from ..ops import ONEDNN, path_name
from ..unpad.attention import FusedAttention, FusedOutput, FusedSelfAttention
from ..unpad.heads import is_overridden
from ..unpad.sites import EncoderSite, encoder_sites, settings
from . import modules
from .checks import linear_reason, path_of, step_aside_reason
from .recognize import lookalike_reason

_MATCHED_BY_NAME = "its class is named in _no_split_modules"


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


class Change(NamedTuple):
    """A module, the class it gets, and its options. site: of an encoder, else None."""

    module: nn.Module
    kind: type[nn.Module]
    options: Mapping[str, object] = MappingProxyType({})
    site: EncoderSite | None = None


@dataclass
class Plan:
    """A report being made, and the changes: ``now`` to modules not fused yet, ``before`` to those that are."""

    skipped: dict[str, str] = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)
    now: list[Change] = field(default_factory=list)
    before: list[Change] = field(default_factory=list)

    def add(self, change: Change) -> None:
        (self.before if modules.original_class(change.module) is not None else self.now).append(change)


def make_plan(model: nn.Module, options: Options) -> Plan:
    plan = Plan()
    sites = list(encoder_sites(model))
    unread = {id(site.pooler) for site in sites if site.head is None and options.skip_pooler}
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
    return plan


def _plan_blocks(plan: Plan, model: nn.Module, options: Options, matched_by_name: set[str], unread: set[int]) -> None:
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
        plan.add(Change(module, target if wrapped is None else type(module), settings))


def _plan_encoder(plan: Plan, site: EncoderSite, options: Options, matched_by_name: set[str], pools: bool) -> None:
    """Plan an encoder and the parts of its layers. pools: a pooler reads its result."""
    already = modules.original_class(site.encoder)
    granted, does, reason = settings(site, options.unpad, options.cls_only, pools)
    if granted and type(site.encoder).__name__ in matched_by_name:
        granted, reason = {}, _MATCHED_BY_NAME
    if reason is not None:
        plan.skipped[site.name] = reason
    swapped = _plan_projections(plan, site, matched_by_name)
    if granted:
        swapped += [layer.attention.self for layer in site.encoder.layer] + [site.encoder.layer[-1].attention]
    for module in site.encoder.modules():
        original = modules.original_class(module) or type(module)
        if module in swapped:
            plan.add(Change(module, modules.fused_encoder_class(original) or original))
        elif isinstance(module, (FusedSelfAttention, FusedAttention, FusedOutput)):  # as fused before, or moved since
            plan.add(Change(module, original))
    if not granted and already is None:
        return
    kind = type(site.encoder)
    if granted:
        kind = modules.fused_encoder_class(already or kind) or kind
        plan.paths[site.name] = does
    elif not modules.wrapped_class(site.encoder):
        kind = already or kind
    plan.add(Change(site.encoder, kind, granted, site))


def _plan_projections(plan: Plan, site: EncoderSite, matched_by_name: set[str]) -> list[nn.Module]:
    """Report the attentions and outputs of which oneDNN serves the linear layers; return those that get our class."""
    swapped = []
    for name, module in site.encoder.named_modules():
        original = modules.original_class(module) or type(module)
        target = modules.fused_encoder_class(original)
        if target is None or not issubclass(target, (FusedSelfAttention, FusedOutput)):
            continue
        parameter = next(module.parameters(), None)
        if parameter is None or path_name(parameter.device, parameter.dtype, "alone") != ONEDNN:
            continue
        reasons = [linear_reason(getattr(module, linear, None), linear) for linear in target.linears]
        if is_overridden(module) or class_is_patched(original):
            reasons.append("its forward was replaced")
        if type(module).__name__ in matched_by_name:
            reasons.append(_MATCHED_BY_NAME)
        reason = next(filter(None, reasons), None)
        if reason is None:
            swapped.append(module)
            plan.paths[f"{site.name}.{name}"] = ONEDNN
        else:
            plan.skipped[f"{site.name}.{name}"] = reason
    return swapped
