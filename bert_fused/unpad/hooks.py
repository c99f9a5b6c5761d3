"""The hooks that tell an encoder the caller's mask and which positions its head reads. Needs transformers.

The modules between the caller and the encoder are never swapped: transformers, accelerate and FSDP find models by their
class. Forward pre-hooks put a ``Request`` among the keyword arguments instead, which every model passes on. They do
nothing unless the encoder is a fused one, and are functions of this module, so that models can be pickled and copied.
A hook called without keyword arguments was added or removed by ``fuse`` or ``unfuse`` during the call; it does nothing.

A caller who calls a module's ``forward`` goes past its hooks, and a model that was fused alone may be put under a head
later. So an encoder that was fused under a head runs dense unless that head's hook took part in the call, and one that
was fused without a head runs dense when another model of transformers calls it.
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..guards import arguments, watch_reason
from .encoder import REQUEST, FusedEncoder, Request
from .heads import Reads, base_of, is_overridden, known_name, pooler_reads, reads_of

# The label that the losses of transformers' heads ignore.
_IGNORED_LABEL = -100

# What torch calls a pre-hook with, and what the hook returns to replace it.
_Args = tuple[object, ...]
_Kwargs = dict[str, Any]
_Changed = tuple[_Args, _Kwargs] | None
PreHook = Callable[[nn.Module, _Args, _Kwargs | None], _Changed]


def add_hooks(hooked: Iterable[tuple[nn.Module, PreHook]]) -> None:
    """Give every module on the way to an encoder its hook, once."""
    for module, hook in hooked:
        if hook not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(hook, with_kwargs=True)


def remove_hooks(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook in OURS:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


def base_pre_hook(base: PreTrainedModel, args: _Args, kwargs: _Kwargs | None = None) -> _Changed:
    """Forward pre-hook of the encoder's own model: make the request from the caller's mask and the head's message."""
    if kwargs is None or known_name(base) != "Model" or not _is_last(base, base_pre_hook):
        return None
    if isinstance(kwargs.get(REQUEST), Request):
        return None
    kwargs = dict(kwargs)
    head_reads = kwargs.pop(REQUEST, None)
    if head_reads is None and (getattr(base.encoder, "under_head", False) or _is_called_by_a_model(base)):
        return args, kwargs
    request = _request(base, argument(base, "attention_mask", args, kwargs), head_reads)
    return args, kwargs | ({REQUEST: request} if request is not None else {})


def head_pre_hook(head: PreTrainedModel, args: _Args, kwargs: _Kwargs | None = None) -> _Changed:
    """Forward pre-hook of a model with a head: tell ``base_pre_hook`` which positions the head reads."""
    if kwargs is None or not _has_fused_encoder(head) or not _is_last(head, head_pre_hook):
        return None
    labels = argument(head, "labels", args, kwargs)
    return args, kwargs | {REQUEST: _reads_now(head, labels, argument(head, "attention_mask", args, kwargs))}


def sentence_transformer_pre_hook(wrapper: nn.Module, args: _Args, kwargs: _Kwargs | None = None) -> _Changed:
    """Forward pre-hook of sentence-transformers' Transformer, which calls its model's ``forward`` past the others."""
    model = wrapped_model(wrapper)
    if kwargs is None or model is None or not args or not isinstance(args[0], Mapping):
        return None
    mask = kwargs.get("attention_mask", args[0].get("attention_mask"))
    if known_name(model) == "Model":
        under_head = getattr(model.encoder, "under_head", False)
        request = _request(model, mask, None) if not under_head else None
        return (args, kwargs | {REQUEST: request}) if request is not None else None
    return (args, kwargs | {REQUEST: _reads_now(model, None, mask)}) if _has_fused_encoder(model) else None


OURS = (base_pre_hook, head_pre_hook, sentence_transformer_pre_hook)


def _is_called_by_a_model(base: PreTrainedModel) -> bool:
    """Tell whether the ``forward`` of another model of transformers, which may read any position, is running."""
    # torch.export cannot break its graph for this look, and runs Hugging Face's code in any case.
    return torch.compiler.is_exporting() or _model_on_the_stack(base)


# Only the stack tells: a module has no reference to the modules that hold it.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _model_on_the_stack(base: PreTrainedModel) -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_argcount:
            caller = frame.f_locals.get(code.co_varnames[0])
            if isinstance(caller, PreTrainedModel) and caller is not base:
                return True
        frame = frame.f_back
    return False


def wrapped_model(module: nn.Module) -> PreTrainedModel | None:
    """Return the model inside sentence-transformers' Transformer; None for any other module."""
    if not type(module).__module__.startswith("sentence_transformers."):
        return None
    model = getattr(module, "auto_model", None)
    return model if isinstance(model, PreTrainedModel) else None


def _has_fused_encoder(head: PreTrainedModel) -> bool:
    base = base_of(head)
    return base is not None and isinstance(base.encoder, FusedEncoder)


def _request(base: PreTrainedModel, mask: object, head_reads: Reads | None) -> Request | None:
    encoder = base.encoder
    in_pooler = pooler_reads(base)
    if not isinstance(encoder, FusedEncoder) or "all" in (head_reads, in_pooler):
        return None
    # A replaced forward and a pre-hook may both pass on another mask than the caller's.
    if is_overridden(encoder) or encoder._forward_pre_hooks:
        return None
    # Another thread may unfuse the encoder meanwhile.
    unpad, cls_only = getattr(encoder, "unpad", False), getattr(encoder, "cls_only", False)
    if cls_only == "auto":
        only_first = head_reads == "first" and not base.training
    else:
        only_first = cls_only and head_reads in (None, "first", "watched")
    return Request(
        mask=mask if unpad and type(mask) is Tensor else None,
        needs_first=in_pooler == "first" or head_reads in ("first", "watched"),
        only_first=only_first,
    )


def _reads_now(head: PreTrainedModel, labels: object, mask: object) -> Reads:
    """Return which positions a head reads in this call: a loss over labels at padding reads padding."""
    reads = reads_of(head) or "all"
    if reads == "first" and _is_watched(head):
        return "watched"
    # ELECTRA's discriminator leaves padding out of its loss by itself.
    if reads != "tokens" or labels is None or mask is None or hasattr(head, "discriminator_predictions"):
        return reads
    if not isinstance(mask, Tensor) or not isinstance(labels, Tensor) or mask.dim() != 2 or mask.shape != labels.shape:
        return "all"
    return "all" if _any_label_at_padding(labels, mask.to(labels.device)) else "tokens"


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _any_label_at_padding(labels: Tensor, mask: Tensor) -> bool:
    return bool(((labels != _IGNORED_LABEL) & (mask == 0)).any())


def _is_watched(head: PreTrainedModel) -> bool:
    """Tell whether a user's hook would see how many positions the encoder's result has."""
    base = base_of(head)
    if base is None:
        return False
    seers = (base, base.encoder, getattr(base, "pooler", None), getattr(head, "classifier", None))
    return any(watch_reason(module, OURS) is not None for module in seers if module is not None)


def _is_last(module: nn.Module, hook: PreHook) -> bool:
    """Tell whether ``hook`` is the last pre-hook, so that no later one changes the arguments it has seen."""
    hooks = list(module._forward_pre_hooks.values())
    return bool(hooks) and hooks[-1] is hook


def argument(module: nn.Module, name: str, args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
    """Return an argument of a call of ``module``, passed by position or by name; None if it was not passed."""
    return arguments(type(module), args, kwargs).get(name)
