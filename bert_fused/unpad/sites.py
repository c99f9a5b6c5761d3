"""Find every encoder in a model, and decide which options of ``fuse`` apply to it. Needs transformers."""

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypedDict

from torch import nn
from transformers import PreTrainedModel
from transformers.models.bert.modeling_bert import BertEncoder

from ..guards import original_of, signature_of
from .encoder import CLSOnly, FusedEncoder
from .heads import base_of, is_overridden, known_name, original_name, pooler_reads, reads_of
from .hooks import PreHook, base_pre_hook, head_pre_hook, sentence_transformer_pre_hook, wrapped_model
from .layers import layers_reason


class Settings(TypedDict, total=False):
    """Attributes that ``fuse`` sets on an encoder."""

    unpad: bool
    cls_only: CLSOnly
    under_head: bool


@dataclass(frozen=True)
class EncoderSite:
    """An encoder in a model.

    name: as in ``model.named_modules()``. base: the model that holds it. head: the model with a head around that one.
    hooked: each module that passes a call on, and the hook it needs. reason: why the encoder must be left alone.
    """

    name: str
    encoder: BertEncoder
    base: PreTrainedModel
    head: PreTrainedModel | None
    hooked: tuple[tuple[nn.Module, PreHook], ...]
    reason: str | None

    @property
    def pooler(self) -> nn.Module | None:
        return getattr(self.base, "pooler", None)


def encoder_sites(model: nn.Module) -> Iterator[EncoderSite]:
    """Yield every encoder of a supported family whose own model is ``model`` or inside it."""
    modules = dict(model.named_modules())
    for name, base in modules.items():
        if original_name(base) != "Model":
            continue
        above = [modules[outer] for outer in _outer(name)]
        heads = [module for module in above if isinstance(module, PreTrainedModel)]
        head = heads[0] if heads else None
        hooked: list[tuple[nn.Module, PreHook]] = [(base, base_pre_hook)]
        if head is not None:
            hooked.append((head, head_pre_hook))
        hooked += [(module, sentence_transformer_pre_hook) for module in above if wrapped_model(module) is not None]
        reason = _reason(base, heads) or _bypass_reason(above)
        yield EncoderSite(f"{name}.encoder" if name else "encoder", base.encoder, base, head, tuple(hooked), reason)


def _outer(name: str) -> list[str]:
    """Return the names of the modules around a module, the nearest first."""
    parts = name.split(".") if name else []
    return [".".join(parts[:end]) for end in range(len(parts) - 1, -1, -1)]


def _bypass_reason(above: list[nn.Module]) -> str | None:
    """Say which module around a model calls past the hooks, or None. sentence-transformers' has its own hook."""
    for module in above:
        if wrapped_model(module) is None and _calls_a_forward(type(module).forward):
            return f"{type(module).__name__} calls a model's forward, not the model, and so goes past the hooks"
    return None


@functools.cache
def _calls_a_forward(function: Callable[..., object]) -> bool:
    """Tell whether a method's code calls the ``forward`` of anything but its own base classes."""
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


def _reason(base: PreTrainedModel, heads: list[PreTrainedModel]) -> str | None:
    config, encoder = base.config, base.encoder
    for module in (base, encoder):
        if is_overridden(module):
            return f"{type(module).__name__} has a forward of its own"
    if encoder._forward_pre_hooks:
        return "hooks before it may change its mask"
    if not isinstance(encoder, FusedEncoder) and known_name(encoder) != "Encoder":
        return f"it is a {type(encoder).__name__} of another kind"
    if config.is_decoder or config.add_cross_attention:
        return "it is a decoder"
    if getattr(config, "position_embedding_type", None) not in (None, "absolute"):
        return f"its attention has {config.position_embedding_type} position embeddings"
    if len(heads) > 1 or (heads and (reads_of(heads[0]) is None or base_of(heads[0]) is not base)):
        return f"what {type(heads[-1]).__name__} reads of it is not known"
    if heads and reads_of(heads[0]) == "all":
        return f"{type(heads[0]).__name__} reads padded positions"
    if not heads and pooler_reads(base) == "all":
        return "what its pooler reads is not known"
    # The classes that a request travels through, and the arguments that each must have in the installed transformers.
    needed: dict[type[nn.Module], tuple[str, ...]] = {type(head): () for head in heads}
    needed |= {type(base): ("attention_mask",), original_of(encoder): ("attention_mask", "hidden_states")}
    for kind, names in needed.items():
        if not signature_of(kind).takes_more:
            return f"{kind.__name__}.forward takes no further keyword arguments"
        missing = [name for name in names if name not in signature_of(kind).names]
        if missing:
            return f"{kind.__name__}.forward has no argument {missing[0]}"
    return None


def settings(site: EncoderSite, unpad: bool, cls_only: CLSOnly, pools: bool) -> tuple[Settings, str, str | None]:
    """Decide which options apply to an encoder: its attributes and the report's line on it, or why it is left alone.

    pools: whether there is a pooler that will not be skipped.
    """
    if not unpad and not cls_only:
        return {}, "", None
    reason = site.reason or layers_reason(site.encoder, swapped=False)
    if reason is not None:
        return {}, "", reason
    reads = reads_of(site.head) if site.head is not None else None
    reader = type(site.head or site.base).__name__
    granted: Settings = {}
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
