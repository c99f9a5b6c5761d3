"""The fused encoder: no work on padding, and no last-layer rows that nobody reads. Needs transformers.

Hugging Face's encoder is given the mask that its attention wants, not the caller's, and does not know who reads its
result. Both come as a ``Request``, which hooks put among the keyword arguments on their way down (``readers.py``).
"""

import functools
import sys
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.output_capturing import _active_collector

from .dispatch import reading_reason
from .genuine import class_is_patched, is_defined_in, watch_reason
from .packing import Packing, kept, packing_of

CLSOnly = bool | Literal["auto"]

# The keyword argument that a request travels in.
REQUEST = "bert_fused_request"

# Keyword arguments that change nothing about the encoder's result.
_HARMLESS = ("position_ids", "num_items_in_batch")

# What treats every row of its input alike, whatever other rows there are and whatever dimensions are in front: of torch
# these classes, and where other modules come from that do.
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
    """What an encoder must know of a call.

    mask: the caller's attention mask, if padding may be dropped. needs_first: position 0 is read even where it is
        padding. only_first: no other position is read.
    """

    mask: Tensor | None
    needs_first: bool
    only_first: bool


class FusedEncoder(nn.Module):
    original: type[nn.Module]
    # Set by ``fuse``, as attributes of the instance.
    unpad = False
    cls_only: CLSOnly = False

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        request = kwargs.pop(REQUEST, None)
        stranger = encoder_hidden_states is not None or past_key_values is not None or use_cache
        if isinstance(request, Request) and not stranger and _is_plain_call(self, hidden_states, kwargs):
            hidden = _run(self, hidden_states, attention_mask, request, kwargs)
            if hidden is not None:
                return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden)
        # Hugging Face's class, also if another thread has given it back to the module since the call began.
        original = getattr(type(self), "original", type(self))
        return original.forward(
            self,
            hidden_states,
            attention_mask,
            encoder_hidden_states,
            encoder_attention_mask,
            past_key_values,
            use_cache,
            **kwargs,
        )


def _is_plain_call(encoder: nn.Module, hidden_states: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether nothing but the last hidden states is asked for, and of ordinary tensors."""
    config: Any = encoder.config
    return (
        type(hidden_states) is Tensor
        and config._attn_implementation in ("sdpa", "eager")
        and all(value is None or value is False or name in _HARMLESS for name, value in kwargs.items())
        and not _active_collector.get()
    )


def _run(
    encoder: nn.Module, hidden: Tensor, attention_mask: Tensor | None, request: Request, kwargs: dict[str, Any]
) -> Tensor | None:
    """The last hidden states, or None where Hugging Face's way is as good or the only right one."""
    config: Any = encoder.config
    packing: Packing | None = None
    if request.mask is not None and reading_reason(hidden) is None:
        mask = request.mask.to(hidden.device)
        keep = kept(mask, hidden.shape[:2], config._attn_implementation)
        if keep is not None:
            packing = packing_of(keep, needs_first=request.needs_first or request.only_first)
    # For position 0 only the first row of Hugging Face's mask is needed; it has rows if it has four dimensions.
    only_first = request.only_first and (packing is not None or attention_mask is None or attention_mask.dim() == 4)
    if (packing is None and not only_first) or layers_reason(encoder) is not None:
        return None

    if packing is not None:
        return _packed(encoder, hidden, packing, only_first)
    return _dense_first(encoder, hidden, attention_mask, kwargs)


def _packed(encoder: nn.Module, hidden: Tensor, packing: Packing, only_first: bool) -> Tensor:
    """All layers on real tokens only: ``[B, S, H]``, or ``[B, 1, H]`` with ``only_first``."""
    *layers, last = cast(Any, encoder.layer)
    rows = packing.pack(hidden)
    for layer in layers:
        rows = _layer(layer, packing.attend, rows, rows)
    if not only_first:
        return packing.restore(_layer(last, packing.attend, rows, rows))
    attend = functools.partial(packing.attend, firsts=True)
    return packing.restore_firsts(_layer(last, attend, rows, packing.firsts(rows)))


def _dense_first(encoder: nn.Module, hidden: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
    """Hugging Face's layers, and the last for position 0 only: ``[B, 1, H]``. mask: as its attention wants it."""
    *layers, last = cast(Any, encoder.layer)
    for layer in layers:
        hidden = layer(hidden, mask, None, encoder_attention_mask=None, past_key_values=None, **kwargs)
    first_row = mask[:, :, :1] if mask is not None else None
    attend = functools.partial(_as_hugging_face, attention=last.attention.self, mask=first_row)
    return _layer(last, attend, hidden, hidden[:, :1])


def _as_hugging_face(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attention: Any,
    mask: Tensor | None,
    heads: int,
    scale: float,
    dropout: float,
) -> Tensor:
    """The model's own attention over ``[B, S, heads * D]``, by the function that its configuration names."""
    eager: Any = vars(sys.modules[type(attention).__module__])["eager_attention_forward"]
    function = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager)
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
    out, _ = function(attention, q, k, v, mask, dropout=dropout, scaling=scale)
    return cast(Tensor, out.flatten(-2))


def _layer(layer: Any, attend: Callable[..., Tensor], hidden: Tensor, rows: Tensor) -> Tensor:
    """A layer of which ``rows`` go on, while keys and values are those of all of ``hidden``."""
    if layer.gradient_checkpointing and layer.training:
        run = functools.partial(_forward, layer, attend)
        return cast(Tensor, layer._gradient_checkpointing_func(run, hidden, rows))
    return _forward(layer, attend, hidden, rows)


def _forward(layer: Any, attend: Callable[..., Tensor], hidden: Tensor, rows: Tensor) -> Tensor:
    attention = layer.attention.self
    context = attend(
        attention.query(rows),
        attention.key(hidden),
        attention.value(hidden),
        heads=attention.num_attention_heads,
        scale=attention.scaling,
        dropout=attention.dropout.p if attention.training else 0.0,
    )
    return cast(Tensor, layer.feed_forward_chunk(layer.attention.output(context, rows)))


def layers_reason(encoder: nn.Module) -> str | None:
    """Why the layers may do something that ``_layer`` does not, or not row by row, in words, or None."""
    if not len(cast(nn.ModuleList, encoder.layer)):
        return "it has no layers"
    home = getattr(type(encoder), "original", type(encoder)).__module__
    config: Any = encoder.config
    if _attention_is_replaced(home, config._attn_implementation):
        return f"its attention under the name of {config._attn_implementation} is not transformers' own"
    for i, layer in enumerate(cast(nn.ModuleList, encoder.layer)):
        attention: Any = getattr(layer, "attention", None)
        parts = {"Layer": layer, "Attention": attention, "SelfAttention": getattr(attention, "self", None)}
        for name, module in parts.items():
            kind = type(module)
            ours = kind.__module__ == home and kind.__name__.endswith(name)
            if not ours or class_is_patched(kind):
                return f"layer {i} has a {kind.__qualname__} of another kind"
        if layer.chunk_size_feed_forward:
            return "chunk_size_feed_forward is set"
        reason = rows_reason(layer)
        if reason is not None:
            return f"layer {i} has {reason}"
    return None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _attention_is_replaced(home: str, implementation: str) -> bool:
    """Whether what the layers of the module ``home`` would call as SDPA or eager attention is somebody else's."""
    eager = vars(sys.modules[home]).get("eager_attention_forward")
    if implementation == "eager":
        return not is_defined_in(ALL_ATTENTION_FUNCTIONS.get_interface("eager", eager), home)
    if implementation == "sdpa":
        function = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", eager)
        return not is_defined_in(function, "transformers.integrations.sdpa_attention")
    return False


def rows_reason(root: nn.Module) -> str | None:
    """What in a module may not treat every row alike, or is somebody's to watch, in words, or None."""
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
