"""Find out which positions of an encoder's result its pooler and its head read. Needs transformers."""

from typing import Literal

from torch import nn
from transformers import PreTrainedModel

from ..guards import class_is_patched
from .encoder import PREFIXES
from .layers import rows_reason

# "first": position 0, through the pooler or a classification head. "watched": the same, but a user's hook sees the
# rest. "tokens": each position independently, so that padding changes results at padding only. "all": padding may
# change any result.
Reads = Literal["first", "watched", "tokens", "all"]
_READS: dict[str | None, Reads] = {
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


def reads_of(head: nn.Module) -> Reads | None:
    """Return which positions of the encoder's result a model with a head reads; None if it is not transformers' own."""
    name = known_name(head)
    reads = _READS.get(name)
    if reads is None:
        return None
    base = base_of(head)
    if base is None:
        return "all"
    summary = head._modules.get("sequence_summary")
    if name == "ForSequenceClassification" and getattr(base, "pooler", None) is None:
        return "first" if known_name(head._modules.get("classifier")) == "ClassificationHead" else "all"
    if name == "ForMultipleChoice" and summary is not None:
        return "first" if summary.summary_type == "first" else "all"
    if reads == "tokens" and any(
        rows_reason(child) is not None for child in head._modules.values() if child is not None and child is not base
    ):
        return "all"
    return "all" if pooler_reads(base) == "all" else reads


def pooler_reads(base: PreTrainedModel) -> Reads | None:
    """Return which positions a model's pooler reads; None if there is no pooler or it is skipped."""
    pooler = getattr(base, "pooler", None)
    if pooler is None or getattr(pooler, "skip", False):
        return None
    return "first" if known_name(pooler) == "Pooler" else "all"


def base_of(head: PreTrainedModel) -> PreTrainedModel | None:
    """Return the model without a head inside a model with one; None if it is not transformers' own."""
    base = getattr(head, head.base_model_prefix, None)
    return base if known_name(base) == "Model" else None


def known_name(module: nn.Module | None) -> str | None:
    """Return the same as ``original_name``, but None if ``forward`` or the mask method was replaced on the instance."""
    return original_name(module) if module is not None and not is_overridden(module) else None


def original_name(module: nn.Module) -> str | None:
    """Return the transformers class whose ``forward`` a module has, by name without the family's prefix, or None."""
    kind = type(module)
    for original in kind.__mro__:
        prefix = PREFIXES.get(original.__module__)
        if prefix is not None:
            ours = kind.__module__.startswith("bert_fused.")
            same = (kind.forward is getattr(original, "forward", None) or ours) and not class_is_patched(original)
            same = same and getattr(kind, _MASKS, None) is getattr(original, _MASKS, None)
            return original.__name__.removeprefix(prefix) if same else None
    return None


def is_overridden(module: nn.Module) -> bool:
    """Tell whether ``forward`` or the mask method was replaced on an instance."""
    attributes = module.__dict__
    return "forward" in attributes or "_hf_hook" in attributes or _MASKS in attributes
