"""The fused encoder: it skips padding and, in the last layer, rows that no head reads. Needs transformers.

Hugging Face's encoder gets the mask that its attention wants, not the caller's, and does not know which positions the
head reads. Hooks pass both to it as a ``Request`` among the keyword arguments (``hooks.py``). Hugging Face's own
encoder and layers then run on packed rows ``[1, T, H]``, with attentions of ours (``attention.py``).
"""

import functools
from typing import Literal, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.utils.generic import ModelOutput
from transformers.utils.output_capturing import _active_collector

from ..fallback import logger, reading_reason
from ..guards import arguments, original_of, signature_of
from .attention import EncoderMask, NotUnderstood, heeded
from .layers import layers_reason
from .packing import Packing, packing_of

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

# Arguments that need Hugging Face's code. They are known, so no warning names them.
_DECODING = ("encoder_hidden_states", "encoder_attention_mask", "past_key_values", "cache", "use_cache")
_RECORDING = ("output_attentions", "output_hidden_states", "return_dict")


class Request(NamedTuple):
    """What the hooks tell an encoder about a call.

    mask: the caller's attention mask, if padding may be dropped. needs_first: position 0 is read even where it is
        padding. only_first: no other position is read.
    """

    mask: Tensor | None
    needs_first: bool
    only_first: bool


class FusedEncoder(nn.Module):
    original: type[nn.Module]
    config: PreTrainedConfig
    # ``fuse`` sets these on the instance. under_head: run dense unless the head's hook took part in the call.
    unpad = False
    cls_only: CLSOnly = False
    under_head = False
    # Another number after every ``fuse``; 0 while a thread changes the attentions.
    fuse_count = 0

    def forward(self, *args: object, **kwargs: object) -> object:
        request = kwargs.pop(REQUEST, None)
        original = original_of(self)
        if isinstance(request, Request):
            output = _run(self, original, request, args, kwargs)
            if output is not None:
                return output
        return original.forward(self, *args, **kwargs)


def _run(
    encoder: FusedEncoder,
    original: type[nn.Module],
    request: Request,
    args: tuple[object, ...],
    kwargs: dict[str, object],
) -> ModelOutput | None:
    """Return the encoder's output, or None if Hugging Face's code must run instead or would do the same work."""
    given = arguments(original, args, kwargs)
    hidden, mask = given.pop("hidden_states", None), given.pop("attention_mask", None)
    unknown = heeded(given)
    for name in unknown:
        if name not in (*_DECODING, *_RECORDING):
            _log_dense(f"{original.__name__} was given {name}")
    if (
        unknown
        or type(hidden) is not Tensor
        or not (mask is None or type(mask) is Tensor)
        or len(args) > len(signature_of(original).positional)
        or encoder.config._attn_implementation not in ("sdpa", "eager")
        or _active_collector.get()
    ):
        return None

    fuse_count = getattr(encoder, "fuse_count", 0)
    packing = _packing(request, hidden)
    # For position 0 only the first row of Hugging Face's mask is needed; it has rows if it has four dimensions.
    only_first = request.only_first and (packing is not None or mask is None or mask.dim() == 4)
    if (packing is None and not only_first) or not fuse_count or layers_reason(encoder, swapped=True) is not None:
        return None

    given["hidden_states"] = hidden if packing is None else packing.pack(hidden)[None]
    given["attention_mask"] = EncoderMask(packing, mask, only_first)
    try:
        output = original.forward(encoder, **given)
        if packing is not None:
            restore = packing.restore_firsts if only_first else packing.restore
            output = type(output)(last_hidden_state=restore(output.last_hidden_state[0]))
        return output
    except NotUnderstood as reason:
        _log_dense(str(reason))
        return None
    except Exception:
        # Another thread may have changed the attentions meanwhile; Hugging Face's take no ``EncoderMask``.
        if getattr(encoder, "fuse_count", 0) == fuse_count:
            raise
        return None


def _packing(request: Request, hidden: Tensor) -> Packing | None:
    """Return how to pack the rows of a call, or None. Packing takes a mask ``[B, S]``, nonzero at real tokens."""
    mask = request.mask
    if mask is None or mask.shape != hidden.shape[:2] or reading_reason(hidden) is not None:
        return None
    needs_first = request.needs_first or request.only_first
    packing: Packing | None = packing_of(mask.to(hidden.device).bool(), needs_first=needs_first)
    return packing


@functools.cache
def _log_dense(reason: str) -> None:
    """Warn once for each reason that an encoder runs Hugging Face's code."""
    logger.warning("the encoder runs without unpad and cls_only: %s, which bert_fused does not know", reason)
