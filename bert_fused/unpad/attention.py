"""Parts of a fused encoder's layers: attention over packed rows or of position 0 alone, and products by oneDNN.

In the place of an attention mask, Hugging Face's layers hand an ``EncoderMask`` down to the self-attention, whose class
is ours. Where only position 0 is read, the last layer's attention, whose class is ours as well, drops the other rows.
On a CPU the self-attentions and the outputs take their linear layers' products from oneDNN. Needs transformers.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert.modeling_bert import BertSelfAttention

from ..guards import arguments, class_is_patched, hook_reason, original_of, signature_of
from ..onednn import may_serve
from ..ops import linear_act
from .packing import Packing

_OUTPUT_PARTS = {"dense", "dropout", "LayerNorm"}
# Keyword arguments that do not change the result of an encoder or an attention.
_HARMLESS = ("position_ids", "num_items_in_batch")


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


class FusedSelfAttention(nn.Module):
    original: type[nn.Module]
    linears = ("query", "key", "value")

    def forward(self, *args: object, **kwargs: object) -> object:
        original = original_of(self)
        mask = _encoder_mask(args, kwargs)
        if mask is not None and (mask.packing is not None or mask.attended is not None):
            rows = _hidden_states(original, args, kwargs)
            return (_attend_packed if mask.packing is not None else _attend_first)(self, rows, mask), None
        if mask is not None:
            args, kwargs = _exchanged(args, kwargs, mask, mask.mask)
        hidden = args[0] if args else kwargs.get("hidden_states")
        if type(hidden) is Tensor and hidden.dim() == 3 and _may_project(hidden) and not class_is_patched(original):
            output = _attend_dense(self, original, args, kwargs)
            if output is not None:
                return output
        return original.forward(self, *args, **kwargs)


class FusedOutput(nn.Module):
    """The linear layer after an attention or an intermediate, by oneDNN, then residual and LayerNorm."""

    original: type[nn.Module]
    linears = ("dense",)
    dense: nn.Module
    dropout: nn.Module
    LayerNorm: nn.Module

    def forward(self, *args: object, **kwargs: object) -> object:
        original = original_of(self)
        if (
            len(args) == 2
            and not kwargs
            and type(args[0]) is Tensor
            and _may_project(args[0])
            and self._modules.keys() == _OUTPUT_PARTS
            and not class_is_patched(original)
        ):
            return self.LayerNorm(self.dropout(project(self.dense, args[0])) + args[1])
        return original.forward(self, *args, **kwargs)


class FusedAttention(nn.Module):
    """The last layer's attention: it drops every row but position 0 if no other is read."""

    original: type[nn.Module]

    def forward(self, *args: object, **kwargs: object) -> object:
        original = original_of(self)
        mask = _encoder_mask(args, kwargs)
        if mask is not None and mask.only_first:
            hidden = _hidden_states(original, args, kwargs)
            rows = hidden[:, :1] if mask.packing is None else mask.packing.firsts(hidden[0])[None]
            args, kwargs = _exchanged(args, kwargs, mask, replace(mask, attended=hidden))
            args, kwargs = _exchanged(args, kwargs, hidden, rows)
        return original.forward(self, *args, **kwargs)


def _exchanged(
    args: tuple[object, ...], kwargs: dict[str, object], old: object, new: object
) -> tuple[tuple[object, ...], dict[str, object]]:
    """Return the arguments of a call with ``new`` in the place of ``old``."""
    others = {name: new if value is old else value for name, value in kwargs.items()}
    return tuple([new if value is old else value for value in args]), others


def _encoder_mask(args: tuple[object, ...], kwargs: dict[str, object]) -> EncoderMask | None:
    for arg in (*args, *kwargs.values()):
        if type(arg) is EncoderMask:
            return arg
    return None


def _may_project(x: Tensor) -> bool:
    return may_serve(x.dtype, x.shape[:-1].numel(), "alone")


def project(linear: nn.Module, x: Tensor) -> Tensor:
    """Return ``linear(x)``, ``[..., K]`` to ``[..., N]``; oneDNN may serve a plain ``nn.Linear`` without hooks."""
    if (
        type(linear) is nn.Linear
        and _may_project(x)
        and hook_reason(linear) is None
        and not class_is_patched(nn.Linear)
    ):
        return linear_act(x, linear.weight, linear.bias, "none")
    out: Tensor = linear(x)
    return out


def heeded(given: Mapping[str, object]) -> list[str]:
    """Return the names of the arguments of a call that may change its result."""
    return [name for name, value in given.items() if value is not None and value is not False and name not in _HARMLESS]


def _hidden_states(original: type[nn.Module], args: tuple[object, ...], kwargs: dict[str, object]) -> Tensor:
    """Return the hidden states that an attention was called with.

    Raises:
        NotUnderstood: the attention was given something else that may change the result.
    """
    given = arguments(original, args, kwargs)
    unknown = [name for name in heeded(given) if type(given[name]) is not EncoderMask]
    hidden = given.get("hidden_states")
    if unknown != ["hidden_states"] or not isinstance(hidden, Tensor):
        raise NotUnderstood(f"{original.__name__} was given {', '.join(unknown)}")
    return hidden


def _attend_dense(
    attention: BertSelfAttention, original: type[nn.Module], args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[Tensor, Tensor | None] | None:
    """Return what the model's own self-attention returns, or None where its code must run."""
    given = arguments(original, args, kwargs)
    hidden, mask = given.pop("hidden_states"), given.pop("attention_mask", None)
    signature = signature_of(original)
    if heeded(given) or len(args) > len(signature.positional) or not isinstance(mask, Tensor | None):
        return None
    assert isinstance(hidden, Tensor)
    more = {name: value for name, value in given.items() if name not in signature.names}
    return _attend(attention, hidden, hidden, mask, **more)


def _attend_packed(attention: BertSelfAttention, rows: Tensor, mask: EncoderMask) -> Tensor:
    """Compute self-attention of packed rows ``[1, T, H]``, or of the first token of each sequence, ``[1, B, H]``."""
    assert mask.packing is not None
    attended = (rows if mask.attended is None else mask.attended)[0]
    heads = attention.num_attention_heads
    context = mask.packing.attend(
        project(attention.query, rows[0]).unflatten(-1, (heads, -1)),
        project(attention.key, attended).unflatten(-1, (heads, -1)),
        project(attention.value, attended).unflatten(-1, (heads, -1)),
        scale=attention.scaling,
        dropout=attention.dropout.p if attention.training else 0.0,
        firsts=mask.attended is not None,
    )
    return context.flatten(-2)[None]


def _attend_first(attention: BertSelfAttention, rows: Tensor, mask: EncoderMask) -> Tensor:
    """Compute the model's own attention of position 0, ``[B, 1, H]``, to all hidden states, ``[B, S, H]``."""
    assert mask.attended is not None
    first_row = mask.mask[:, :, :1] if mask.mask is not None else None
    return _attend(attention, rows, mask.attended, first_row)[0]


def _attend(
    attention: BertSelfAttention, rows: Tensor, attended: Tensor, mask: Tensor | None, **more: object
) -> tuple[Tensor, Tensor | None]:
    """Compute the model's own attention of ``rows``, ``[B, R, H]``, to ``attended``, ``[B, S, H]``, and its weights."""
    eager = vars(sys.modules[original_of(attention).__module__])["eager_attention_forward"]
    function = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager)
    query, key, value = (
        project(linear, states).unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)
        for linear, states in ((attention.query, rows), (attention.key, attended), (attention.value, attended))
    )
    dropout = attention.dropout.p if attention.training else 0.0
    context, weights = function(attention, query, key, value, mask, dropout=dropout, scaling=attention.scaling, **more)
    return context.flatten(-2), weights
