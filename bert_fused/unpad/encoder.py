"""The fused encoder: it skips padding and, in the last layer, rows that no head reads. Needs transformers.

Hugging Face's encoder gets the mask that its attention wants, not the caller's, and does not know which positions the
head reads. Hooks pass both to it as a ``Request`` among the keyword arguments (``hooks.py``).

Hugging Face's own encoder and layers then run on packed rows ``[1, T, H]``. In the place of an attention mask they hand
an ``EncoderMask`` down to the self-attention, whose class is ours. Where only position 0 is read, the last layer's
attention, whose class is ours as well, drops the other rows, and everything after it sees that position alone.
"""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import ModelOutput
from transformers.utils.output_capturing import _active_collector

from ..fallback import logger, reading_reason
from ..guards import arguments, class_is_patched, is_defined_in, signature_of, watch_reason
from .packing import Packing, kept, packing_of

# One architecture under five names: the module of transformers that defines it -> the prefix of its class names.
PREFIXES = {
    f"transformers.models.{family}.modeling_{family}": prefix
    for family, prefix in (
        ("bert", "Bert"),
        ("roberta", "Roberta"),
        ("xlm_roberta", "XLMRoberta"),
        ("camembert", "Camembert"),
        ("electra", "Electra"),
    )
}

CLSOnly = bool | Literal["auto"]

# The keyword argument that a request travels in.
REQUEST = "bert_fused_request"

# Keyword arguments that do not change the result of an encoder or an attention.
_HARMLESS = ("position_ids", "num_items_in_batch")
# Arguments that are known to need Hugging Face's code, so that no warning names them.
_DECODING = ("encoder_hidden_states", "encoder_attention_mask", "past_key_values", "cache", "use_cache")
_RECORDING = ("output_attentions", "output_hidden_states", "return_dict")
# The children of the attentions whose result ours reproduces.
_SELF_ATTENTION_PARTS = {"query", "key", "value", "dropout"}
_ATTENTION_PARTS = {"self", "output"}

# Modules that act on each row independently, with any number of dimensions in front: these classes of torch, and all
# classes of the packages below.
_ROWWISE = frozenset(
    {
        nn.Linear,
        nn.Identity,
        nn.Embedding,
        nn.LayerNorm,
        nn.RMSNorm,
        nn.Dropout,
        nn.AlphaDropout,
        nn.Sequential,
        nn.ModuleList,
        nn.ModuleDict,
        nn.ParameterList,
        nn.ParameterDict,
        nn.CELU,
        nn.ELU,
        nn.GELU,
        nn.Hardshrink,
        nn.Hardsigmoid,
        nn.Hardswish,
        nn.Hardtanh,
        nn.LeakyReLU,
        nn.LogSigmoid,
        nn.Mish,
        nn.RReLU,
        nn.ReLU,
        nn.ReLU6,
        nn.SELU,
        nn.SiLU,
        nn.Sigmoid,
        nn.Softplus,
        nn.Softshrink,
        nn.Softsign,
        nn.Tanh,
        nn.Tanhshrink,
        nn.Threshold,
    }
)
_ROWWISE_HOMES = ("transformers.", "bert_fused.", "peft.")


class Request(NamedTuple):
    """What the hooks tell an encoder about a call.

    mask: the caller's attention mask, if padding may be dropped. needs_first: position 0 is read even where it is
        padding. only_first: no other position is read.
    """

    mask: Tensor | None
    needs_first: bool
    only_first: bool


# Not a NamedTuple: wrappers of modules look into tuples for tensors to cast or to move.
@dataclass(frozen=True)
class EncoderMask:
    """Takes the place of the attention mask inside a fused encoder.

    packing: how the rows are packed; None if they are not. mask: Hugging Face's own attention mask, for rows that are
    not packed. only_first: the last layer computes position 0 alone. attended: all hidden states, if the attention is
    given only the rows of position 0.
    """

    packing: Packing | None
    mask: Tensor | None
    only_first: bool
    attended: Tensor | None = None


class NotUnderstood(Exception):
    """A part of the encoder was given an argument that ours does not know; the message names both."""


class FusedEncoder(nn.Module):
    original: type[nn.Module]
    # Set by ``fuse`` on the instance. under_head: the encoder runs dense unless its head's hook took part in the call.
    unpad = False
    cls_only: CLSOnly = False
    under_head = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        request = kwargs.pop(REQUEST, None)
        # Another thread may have unfused the module since the call began: then its class is the original.
        original = getattr(type(self), "original", type(self))
        if isinstance(request, Request):
            output = _run(self, original, request, args, kwargs)
            if output is not None:
                return output
        return original.forward(self, *args, **kwargs)


class FusedSelfAttention(nn.Module):
    original: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        original = getattr(type(self), "original", type(self))
        mask = _encoder_mask(args, kwargs)
        if mask is None:
            return original.forward(self, *args, **kwargs)
        if mask.packing is None and mask.attended is None:
            return original.forward(self, *_replaced(args, mask, mask.mask), **_replaced(kwargs, mask, mask.mask))
        rows = _hidden_states(original, args, kwargs)
        return (_attend_packed if mask.packing is not None else _attend_first)(self, rows, mask), None


class FusedAttention(nn.Module):
    """The last layer's attention: it keeps only position 0 if no other is read."""

    original: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        original = getattr(type(self), "original", type(self))
        mask = _encoder_mask(args, kwargs)
        if mask is not None and mask.only_first:
            hidden = _hidden_states(original, args, kwargs)
            rows = hidden[:, :1] if mask.packing is None else mask.packing.firsts(hidden[0])[None]
            for old, new in ((mask, replace(mask, attended=hidden)), (hidden, rows)):
                args, kwargs = _replaced(args, old, new), _replaced(kwargs, old, new)
        return original.forward(self, *args, **kwargs)


def _replaced(values: Any, old: Any, new: Any) -> Any:
    """The arguments, a tuple or a dictionary, with ``new`` in the place of ``old``."""
    if isinstance(values, dict):
        return {name: new if value is old else value for name, value in values.items()}
    return tuple(new if value is old else value for value in values)


def _encoder_mask(args: tuple[Any, ...], kwargs: dict[str, Any]) -> EncoderMask | None:
    for arg in (*args, *kwargs.values()):
        if type(arg) is EncoderMask:
            return arg
    return None


def _hidden_states(original: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states that an attention was called with.

    Raises:
        NotUnderstood: the attention was given something else that may change the result.
    """
    given = arguments(original, args, kwargs)
    unknown = [name for name, value in given.items() if type(value) is not EncoderMask and _matters(name, value)]
    if unknown != ["hidden_states"]:
        raise NotUnderstood(f"{original.__name__} was given {', '.join(unknown)}")
    return cast(Tensor, given["hidden_states"])


def _matters(name: str, value: Any) -> bool:
    return value is not None and value is not False and name not in _HARMLESS


def _run(
    encoder: nn.Module, original: type[nn.Module], request: Request, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> ModelOutput | None:
    """The encoder's output, or None if Hugging Face's code must run instead or does the same work."""
    given = arguments(original, args, kwargs)
    hidden, mask = given.pop("hidden_states", None), given.pop("attention_mask", None)
    unknown = [name for name, value in given.items() if _matters(name, value)]
    for name in unknown:
        if name not in (*_DECODING, *_RECORDING):
            _log_dense(f"{original.__name__} was given {name}")
    config: Any = encoder.config
    if (
        unknown
        or type(hidden) is not Tensor
        or (mask is not None and type(mask) is not Tensor)
        or len(args) > len(signature_of(original).positional)
        or config._attn_implementation not in ("sdpa", "eager")
        or _active_collector.get()
    ):
        return None

    packing: Packing | None = None
    if request.mask is not None and reading_reason(hidden) is None:
        keep = kept(request.mask.to(hidden.device), hidden.shape[:2], config._attn_implementation)
        if keep is not None:
            packing = packing_of(keep, needs_first=request.needs_first or request.only_first)
    # For position 0 only the first row of Hugging Face's mask is needed; it has rows if it has four dimensions.
    only_first = request.only_first and (packing is not None or mask is None or mask.dim() == 4)
    if (packing is None and not only_first) or layers_reason(encoder, swapped=True) is not None:
        return None

    given["hidden_states"] = hidden if packing is None else packing.pack(hidden)[None]
    given["attention_mask"] = EncoderMask(packing, mask, only_first)
    try:
        output = original.forward(encoder, **given)
        if packing is not None:
            restore = packing.restore_firsts if only_first else packing.restore
            output = type(output)(last_hidden_state=restore(output.last_hidden_state[0]))
        return cast(ModelOutput, output)
    except NotUnderstood as reason:
        _log_dense(str(reason))
        return None
    except Exception:
        # Another thread may have unfused the attentions meanwhile; Hugging Face's take no ``EncoderMask``.
        if layers_reason(encoder, swapped=True) is None:
            raise
        return None


@functools.cache
def _log_dense(reason: str) -> None:
    """Warn once for each reason that an encoder runs Hugging Face's code."""
    logger.warning("the encoder runs without unpad and cls_only: %s, which bert_fused does not know", reason)


def _attend_packed(attention: Any, rows: Tensor, mask: EncoderMask) -> Tensor:
    """Self-attention of packed rows ``[1, T, H]``, or of the first token of each sequence, ``[1, B, H]``."""
    assert mask.packing is not None
    attended = (rows if mask.attended is None else mask.attended)[0]
    context: Tensor = mask.packing.attend(
        attention.query(rows[0]),
        attention.key(attended),
        attention.value(attended),
        heads=attention.num_attention_heads,
        scale=attention.scaling,
        dropout=attention.dropout.p if attention.training else 0.0,
        firsts=mask.attended is not None,
    )
    return context[None]


def _attend_first(attention: Any, rows: Tensor, mask: EncoderMask) -> Tensor:
    """The model's own attention of position 0, ``[B, 1, H]``, to all hidden states, ``[B, S, H]``."""
    eager: Any = vars(sys.modules[_original(attention).__module__])["eager_attention_forward"]
    function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager)
    query, key, value = (
        projected.unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)
        for projected in (attention.query(rows), attention.key(mask.attended), attention.value(mask.attended))
    )
    first_row = mask.mask[:, :, :1] if mask.mask is not None else None
    dropout = attention.dropout.p if attention.training else 0.0
    context, _ = function(attention, query, key, value, first_row, dropout=dropout, scaling=attention.scaling)
    return cast(Tensor, context.flatten(-2))


def _original(module: nn.Module) -> type[nn.Module]:
    kind = type(module)
    return cast(type[nn.Module], getattr(kind, "original", kind))


def classes_reason(base: nn.Module) -> str | None:
    """Why a request or a mask may not reach the encoder in the installed transformers, or None.

    base: the model that holds an encoder.
    """
    encoder = _original(cast(nn.Module, base.encoder))
    for kind in (type(base), encoder):
        if not signature_of(kind).takes_more:
            return f"{kind.__name__}.forward takes no further keyword arguments"
    for kind, name in (
        (type(base), "attention_mask"),
        (encoder, "attention_mask"),
        (encoder, "hidden_states"),
    ):
        if name not in signature_of(kind).names:
            return f"{kind.__name__}.forward has no argument {name}"
    return None


def attentions_of(encoder: nn.Module) -> list[nn.Module]:
    """The modules whose classes are swapped with their encoder's: each self-attention and the last attention."""
    layers: Any = encoder.layer
    return [*(layer.attention.self for layer in layers), layers[-1].attention]


def is_fused_attention(module: nn.Module) -> bool:
    return isinstance(module, (FusedSelfAttention, FusedAttention))


def layers_reason(encoder: nn.Module, *, swapped: bool) -> str | None:
    """Why the layers must run dense, or None: a part of another kind, one that may mix rows, or a user's hook.

    swapped: whether the attentions must have classes of ours, as they have after ``fuse``.
    """
    if not len(cast(nn.ModuleList, encoder.layer)):
        return "it has no layers"
    home = _original(encoder).__module__
    config: Any = encoder.config
    if _attention_is_replaced(home, config._attn_implementation):
        return f"its attention under the name of {config._attn_implementation} is not transformers' own"
    last = len(cast(nn.ModuleList, encoder.layer)) - 1
    for i, layer in enumerate(cast(nn.ModuleList, encoder.layer)):
        attention: Any = getattr(layer, "attention", None)
        self_attention: Any = getattr(attention, "self", None)
        for name, module in (("Layer", layer), ("Attention", attention), ("SelfAttention", self_attention)):
            kind = _original(module)
            if kind.__module__ != home or not kind.__name__.endswith(name) or class_is_patched(kind):
                return f"layer {i} has a {kind.__qualname__} of another kind"
        if self_attention._modules.keys() != _SELF_ATTENTION_PARTS or attention._modules.keys() != _ATTENTION_PARTS:
            return f"layer {i} has an attention of other parts"
        fused = isinstance(self_attention, FusedSelfAttention)
        if swapped and not (fused and isinstance(attention, FusedAttention) == (i == last)):
            return f"layer {i} is not where it was when the encoder was fused"
        if layer.chunk_size_feed_forward:
            return "chunk_size_feed_forward is set"
        reason = rows_reason(layer)
        if reason is not None:
            return f"layer {i} has {reason}"
    return None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _attention_is_replaced(home: str, implementation: str) -> bool:
    """Whether the SDPA or eager attention of the layers that the module ``home`` defines is not transformers' own."""
    eager = vars(sys.modules[home]).get("eager_attention_forward")
    if implementation == "eager":
        return not is_defined_in(ALL_ATTENTION_FUNCTIONS.get_interface("eager", eager), home)
    if implementation == "sdpa":
        function = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", eager)
        return not is_defined_in(function, "transformers.integrations.sdpa_attention")
    return False


def rows_reason(root: nn.Module) -> str | None:
    """Why a module may not act on each row independently, or which user's hook it has; else None."""
    # nn.Module.modules() takes five times as long.
    waiting = [root]
    while waiting:
        module = waiting.pop()
        reason = watch_reason(module)
        if reason is not None:
            return reason
        kind = type(module)
        if kind not in _ROWWISE and not kind.__module__.startswith(_ROWWISE_HOMES):
            return f"a {kind.__module__}.{kind.__qualname__}"
        waiting.extend(child for child in module._modules.values() if child is not None)
    return None
