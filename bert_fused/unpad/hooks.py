"""Which positions of an encoder's result each head reads, and the hooks that pass this on to it. Needs transformers.

The modules between the caller and the encoder are never swapped: transformers, accelerate and FSDP find models by their
class. Forward pre-hooks put a ``Request`` among the keyword arguments instead, which every model passes on. They do
nothing unless the encoder is a fused one, and are functions of this module, so that models can be pickled and copied.
A hook called without keyword arguments was added or removed by ``fuse`` or ``unfuse`` during the call; it does nothing.

A caller who calls a module's ``forward`` goes past its hooks, and a model that was fused alone may be put under a head
later. So an encoder that was fused under a head runs dense unless that head's hook took part in the call, and one that
was fused without a head runs dense when another model of transformers calls it.
"""

import ast
import functools
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..guards import arguments, class_is_patched, signature_of, watch_reason
from .encoder import (
    PREFIXES,
    REQUEST,
    CLSOnly,
    FusedEncoder,
    Request,
    classes_reason,
    layers_reason,
    rows_reason,
)

# "first": position 0, through the pooler or a classification head. "watched": the same, but a user's hook sees the
# rest. "tokens": each position independently, so that padding changes results at padding only. "all": padding may
# change any result.
Reads = Literal["first", "watched", "tokens", "all"]
_READS: dict[str, Reads] = {
    "ForSequenceClassification": "first",
    "ForNextSentencePrediction": "first",
    "ForMultipleChoice": "first",
    "ForMaskedLM": "tokens",
    "ForTokenClassification": "tokens",
    "ForPreTraining": "tokens",
    "ForQuestionAnswering": "all",
    "ForCausalLM": "all",
    "LMHeadModel": "all",
}
# The method of a model that turns the caller's mask into its attention's.
_MASKS = "_create_attention_masks"
# The label that the losses of transformers' heads ignore.
_IGNORED_LABEL = -100


@dataclass(frozen=True)
class EncoderSite:
    """An encoder in a model.

    name: as in ``model.named_modules()``. base: the model that holds it. head: the model with a head around that one.
    hooked: each module that passes a call on, and the hook it needs. reason: why the encoder must be left alone.
    """

    name: str
    encoder: nn.Module
    base: nn.Module
    head: nn.Module | None
    hooked: tuple[tuple[nn.Module, Callable[..., Any]], ...]
    reason: str | None

    @property
    def pooler(self) -> nn.Module | None:
        return getattr(self.base, "pooler", None)


def encoder_sites(model: nn.Module) -> Iterator[EncoderSite]:
    """Every encoder of a supported family whose own model is ``model`` or inside it."""
    modules = dict(model.named_modules())
    for name, base in modules.items():
        if _kind(base) != "Model":
            continue
        above = [modules[outer] for outer in _outer(name)]
        heads = [module for module in above if isinstance(module, PreTrainedModel)]
        head = heads[0] if heads else None
        hooked: list[tuple[nn.Module, Callable[..., Any]]] = [(base, base_pre_hook)]
        if head is not None:
            hooked.append((head, head_pre_hook))
        hooked += [(module, sentence_transformer_pre_hook) for module in above if _wrapped(module) is not None]
        encoder = cast(nn.Module, base.encoder)
        reason = _reason(base, heads) or _bypass_reason(above)
        yield EncoderSite(f"{name}.encoder" if name else "encoder", encoder, base, head, tuple(hooked), reason)


def _outer(name: str) -> list[str]:
    """Names of the modules around a module, the nearest first."""
    parts = name.split(".") if name else []
    return [".".join(parts[:end]) for end in range(len(parts) - 1, -1, -1)]


def _bypass_reason(above: list[nn.Module]) -> str | None:
    """Which of the modules around a model calls past the hooks, or None. sentence-transformers' has its own hook."""
    for module in above:
        if _wrapped(module) is None and _calls_a_forward(type(module).forward):
            return f"{type(module).__name__} calls a model's forward, not the model, and so goes past the hooks"
    return None


@functools.cache
def _calls_a_forward(function: Any) -> bool:
    """Whether a method's code calls the ``forward`` of something, other than of its own base classes."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return False
    called = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return any(
        isinstance(to, ast.Attribute)
        and to.attr == "forward"
        and not (isinstance(to.value, ast.Call) and ast.unparse(to.value.func) == "super")
        for to in called
    )


def _reason(base: nn.Module, heads: list[nn.Module]) -> str | None:
    config: Any = base.config
    for module in (base, cast(nn.Module, base.encoder)):
        if _replaced(module):
            return f"{type(module).__name__} has a forward of its own"
    if cast(nn.Module, base.encoder)._forward_pre_hooks:
        return "hooks before it may change its mask"
    if not isinstance(base.encoder, FusedEncoder) and _known(base.encoder) != "Encoder":
        return f"it is a {type(base.encoder).__name__} of another kind"
    if config.is_decoder or config.add_cross_attention:
        return "it is a decoder"
    if getattr(config, "position_embedding_type", None) not in (None, "absolute"):
        return f"its attention has {config.position_embedding_type} position embeddings"
    if len(heads) > 1 or (heads and (reads_of(heads[0]) is None or _base_of(heads[0]) is not base)):
        return f"what {type(heads[-1]).__name__} reads of it is not known"
    if heads and reads_of(heads[0]) == "all":
        return f"{type(heads[0]).__name__} reads padded positions"
    if not heads and _pooler_reads(base) == "all":
        return "what its pooler reads is not known"
    if heads and not signature_of(type(heads[0])).takes_more:
        return f"{type(heads[0]).__name__}.forward takes no further keyword arguments"
    return classes_reason(base)


def settings(site: EncoderSite, unpad: bool, cls_only: CLSOnly, pools: bool) -> tuple[dict[str, Any], str, str | None]:
    """Which options apply to an encoder: its attributes and what the report says of it, or why it is left alone.

    pools: whether there is a pooler that will not be skipped.
    """
    if not unpad and not cls_only:
        return {}, "", None
    reason = site.reason or layers_reason(site.encoder, swapped=False)
    if reason is not None:
        return {}, "", reason
    reads = reads_of(site.head) if site.head is not None else None
    reader = type(site.head or site.base).__name__
    granted: dict[str, Any] = {}
    does = []
    if unpad:
        granted["unpad"] = True
        does.append("no work on padding")
        if reads == "first" or pools:
            does.append("dense where position 0 of a sequence is padding, since it is read")
    if cls_only and reads == "tokens":
        does.append(f"the whole last layer, since {reader} reads every position")
    elif cls_only == "auto" and reads is None:
        does.append("the whole last layer, since who reads it is not known")
    elif cls_only:
        granted["cls_only"] = cls_only
        does.append(f"the last layer for position 0 only, inside {reader}" + ", in eval mode" * (cls_only == "auto"))
    if not granted:
        return {}, "", does[0]
    if site.head is not None:
        granted["under_head"] = True
    else:
        does.append("dense where a model of transformers calls it")
    return granted, "; ".join(does), None


def add_hooks(site: EncoderSite) -> None:
    """Give every module on the way to an encoder its hook, once."""
    for module, hook in site.hooked:
        if hook not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(hook, with_kwargs=True)


def remove_hooks(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook in OURS:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


def reads_of(head: nn.Module) -> Reads | None:
    """Which positions a model with a head reads of the encoder's result; None if it is not transformers' own."""
    kind = _known(head)
    reads = _READS.get(kind) if kind is not None else None
    if reads is None:
        return None
    base = _base_of(head)
    if base is None:
        return "all"
    reader = getattr(head, "classifier", None)
    summary: Any = getattr(head, "sequence_summary", None)
    if kind == "ForSequenceClassification" and getattr(base, "pooler", None) is None:
        return "first" if _known(reader) == "ClassificationHead" else "all"
    if kind == "ForMultipleChoice" and summary is not None:
        return "first" if summary.summary_type == "first" else "all"
    if reads == "tokens" and any(
        rows_reason(child) is not None for child in head._modules.values() if child is not None and child is not base
    ):
        return "all"
    return "all" if _pooler_reads(base) == "all" else reads


def _pooler_reads(base: nn.Module) -> Reads | None:
    """Which positions a model's pooler reads; None if there is no pooler or it is skipped."""
    pooler = getattr(base, "pooler", None)
    if pooler is None or getattr(pooler, "skip", False):
        return None
    return "first" if _known(pooler) == "Pooler" else "all"


def _known(module: Any) -> str | None:
    """As ``_kind``, but None if ``forward`` or the making of masks was replaced on the instance."""
    return _kind(module) if module is not None and not _replaced(module) else None


def _kind(module: Any) -> str | None:
    """The class of transformers whose ``forward`` a module has, by its name without the family's prefix, or None."""
    kind: Any = type(module)
    for original in kind.__mro__:
        prefix = PREFIXES.get(original.__module__)
        if prefix is not None:
            ours = kind.__module__.startswith("bert_fused.")
            same = (kind.forward is original.forward or ours) and not class_is_patched(original)
            same = same and getattr(kind, _MASKS, None) is getattr(original, _MASKS, None)
            return original.__name__.removeprefix(prefix) if same else None
    return None


def _replaced(module: Any) -> bool:
    attributes = module.__dict__
    return "forward" in attributes or "_hf_hook" in attributes or _MASKS in attributes


def _base_of(head: nn.Module) -> nn.Module | None:
    base = getattr(head, cast(str, head.base_model_prefix), None)
    return base if _known(base) == "Model" else None


def base_pre_hook(base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
    """Forward pre-hook of the encoder's own model: make the request from the caller's mask and the head's message."""
    if kwargs is None:
        return None
    if _known(base) != "Model" or not _is_last(base, base_pre_hook) or isinstance(kwargs.get(REQUEST), Request):
        return None
    kwargs = dict(kwargs)
    head_reads = kwargs.pop(REQUEST, None)
    if head_reads is None and (getattr(base.encoder, "under_head", False) or _is_called_by_a_model(base)):
        return args, kwargs
    request = _request(base, argument(base, "attention_mask", args, kwargs), head_reads)
    return args, kwargs | ({REQUEST: request} if request is not None else {})


def _is_called_by_a_model(base: nn.Module) -> bool:
    """Whether the ``forward`` of another model of transformers is running, which may read any position."""
    # torch.export cannot break its graph for this look, and runs Hugging Face's code in any case.
    return torch.compiler.is_exporting() or _model_on_the_stack(base)


# Only the stack tells: a module has no reference to the modules that hold it.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _model_on_the_stack(base: nn.Module) -> bool:
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_argcount:
            caller = frame.f_locals.get(code.co_varnames[0])
            if isinstance(caller, PreTrainedModel) and caller is not base:
                return True
        frame = cast(Any, frame.f_back)
    return False


def head_pre_hook(head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
    """Forward pre-hook of a model with a head: say which positions it reads, for ``base_pre_hook``."""
    if kwargs is None:
        return None
    base = _base_of(head)
    if base is None or not isinstance(base.encoder, FusedEncoder) or not _is_last(head, head_pre_hook):
        return None
    labels = argument(head, "labels", args, kwargs)
    return args, kwargs | {REQUEST: _reads_now(head, labels, argument(head, "attention_mask", args, kwargs))}


def sentence_transformer_pre_hook(
    wrapper: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
) -> Any:
    """The same for sentence-transformers' Transformer, which calls its model's ``forward`` past all hooks."""
    if kwargs is None:
        return None
    model = _wrapped(wrapper)
    if model is None or not args or not isinstance(args[0], Mapping):
        return None
    mask = kwargs.get("attention_mask", args[0].get("attention_mask"))
    if _known(model) == "Model":
        under_head = getattr(model.encoder, "under_head", False)
        request = _request(model, mask, None) if not under_head else None
        return (args, kwargs | {REQUEST: request}) if request is not None else None
    base = _base_of(model)
    if base is None or not isinstance(base.encoder, FusedEncoder):
        return None
    return args, kwargs | {REQUEST: _reads_now(model, None, mask)}


OURS = (base_pre_hook, head_pre_hook, sentence_transformer_pre_hook)


def _wrapped(module: nn.Module) -> Any:
    """The model inside sentence-transformers' Transformer; None for any other module."""
    if not type(module).__module__.startswith("sentence_transformers."):
        return None
    model = getattr(module, "auto_model", None)
    return model if isinstance(model, PreTrainedModel) else None


def _reads_now(head: nn.Module, labels: Any, mask: Any) -> Reads:
    """Which positions a head reads in this call: a loss over labels at padding reads padding."""
    reads = reads_of(head) or "all"
    if reads == "first" and _is_watched(head):
        return "watched"
    if reads != "tokens" or labels is None or mask is None or not _has_token_loss(head):
        return reads
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape != labels.shape:
        return "all"
    return "all" if _any_label_at_padding(labels, mask.to(labels.device)) else "tokens"


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _any_label_at_padding(labels: Tensor, mask: Tensor) -> bool:
    return bool(((labels != _IGNORED_LABEL) & (mask == 0)).any())


def _has_token_loss(head: nn.Module) -> bool:
    # ELECTRA's discriminator leaves padding out of its loss by itself.
    return not hasattr(head, "discriminator_predictions")


def _request(base: nn.Module, mask: Any, head_reads: Reads | None) -> Request | None:
    encoder = base.encoder
    pooler_reads = _pooler_reads(base)
    if not isinstance(encoder, FusedEncoder) or "all" in (head_reads, pooler_reads):
        return None
    # A replaced forward and a pre-hook may both pass on another mask than the caller's.
    if _replaced(encoder) or encoder._forward_pre_hooks:
        return None
    # Another thread may unfuse the encoder meanwhile.
    unpad, cls_only = getattr(encoder, "unpad", False), getattr(encoder, "cls_only", False)
    if cls_only == "auto":
        only_first = head_reads == "first" and not base.training
    else:
        only_first = cls_only and head_reads in (None, "first", "watched")
    return Request(
        mask=mask if unpad and type(mask) is Tensor else None,
        needs_first=pooler_reads == "first" or head_reads in ("first", "watched"),
        only_first=only_first,
    )


def _is_watched(head: nn.Module) -> bool:
    """Whether a user's hook would see how many positions the encoder's result has."""
    base: Any = _base_of(head)
    seers = (base, base.encoder, getattr(base, "pooler", None), getattr(head, "classifier", None))
    return any(watch_reason(module, OURS) is not None for module in seers if module is not None)


def _is_last(module: nn.Module, hook: Callable[..., Any]) -> bool:
    """Whether no later pre-hook can change the arguments that ``hook`` has seen."""
    hooks = list(module._forward_pre_hooks.values())
    return bool(hooks) and hooks[-1] is hook


def argument(module: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An argument of a call of ``module``, however it was passed."""
    return arguments(type(module), args, kwargs).get(name)
