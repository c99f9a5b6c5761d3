"""Models of every supported family with every head, masks of every kind, and the rows that a fused encoder computes."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import transformers
from models import SIZES, drawn
from torch import Tensor, nn
from transformers import PreTrainedModel

from bert_fused import fuse
from bert_fused.unpad import attention as fused_attention

HEADS = {
    "Model": "pooler",
    "ForSequenceClassification": "first",
    "ForMultipleChoice": "first",
    "ForTokenClassification": "tokens",
    "ForMaskedLM": "tokens",
    "ForQuestionAnswering": "all",
}
FAMILIES = ("Bert", "Roberta", "XLMRoberta", "Camembert", "Electra")
# Model class -> the readers of its encoder's result. "pooler" and "tokens pooler": every token, and position 0.
MODELS = {f"{family}{head}": reads for family in FAMILIES for head, reads in HEADS.items()}
MODELS |= {
    "BertForNextSentencePrediction": "first",
    "BertForPreTraining": "tokens pooler",
    "ElectraForPreTraining": "tokens",
    "ElectraModel": "tokens",
}


def build(name: str, attention: str = "sdpa", **changes: Any) -> PreTrainedModel:
    """A tiny model in eval mode, its weights and biases unlike those of a fresh one."""
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    no_dropout = {"summary_last_dropout": 0.0} if name == "ElectraForMultipleChoice" else {}
    config = kind.config_class(**(SIZES | no_dropout | changes))
    return drawn(kind._from_config(config, attn_implementation=attention)).eval()


def mask_of(pattern: str) -> Tensor:
    """``[4, 7]``; the first sequence is full, except where said."""
    rows = {
        "none": ("1111111", "1111111", "1111111", "1111111"),
        "right": ("1111111", "1110000", "1111000", "1110000"),
        "left": ("1111111", "0001111", "0111111", "0001111"),
        "interior": ("1111111", "1010110", "1100011", "1001001"),
        "single": ("1111111", "1000000", "1000000", "1111110"),
        "empty row": ("1111111", "0000000", "1110000", "1000000"),
        "empty first": ("0000000", "1110000", "1111111", "0000000"),
        "nothing": ("0000000", "0000000", "0000000", "0000000"),
    }[pattern]
    return torch.tensor([[int(digit) for digit in row] for row in rows])


PATTERNS = ("none", "right", "left", "interior", "single", "empty row", "empty first", "nothing")


def inputs_of(name: str, mask: Tensor) -> dict[str, Tensor]:
    """Token ids under a mask; with multiple choice a batch of two choices each."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, SIZES["vocab_size"], mask.shape, generator=generator) * mask
    if name.endswith("ForMultipleChoice"):
        ids, mask = ids.unflatten(0, (-1, 2)), mask.unflatten(0, (-1, 2))
    return {"input_ids": ids, "attention_mask": mask}


# The batch of most tests: four sequences, three of them padded at the right.
RIGHT = mask_of("right")
KEEP = RIGHT.bool()
BATCH = inputs_of("BertModel", RIGHT)
# The rows of it that an encoder's two layers compute: packed ones; position 0 in the last, if no other is read.
PACKED = [(int(RIGHT.sum()),)] * 2
FIRST = [PACKED[0], (4,)]

# Of results and of gradients, relative to the largest element.
TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4


@contextlib.contextmanager
def watched() -> Iterator[list[tuple[int, ...]]]:
    """The shapes of the rows that each attention of our own computed; empty where Hugging Face's ran."""
    shapes: list[tuple[int, ...]] = []

    def watching(attend: Any, start: int) -> Any:
        def watch(*args: Any) -> Tensor:
            context = attend(*args)
            shapes.append(tuple(context.shape[start:-1]))
            return context

        return watch

    with (
        mock.patch.object(fused_attention, "_attend_packed", watching(fused_attention._attend_packed, 1)),
        mock.patch.object(fused_attention, "_attend_first", watching(fused_attention._attend_first, 0)),
    ):
        yield shapes


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest element of ``b`` if that is over 1."""
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    return float((a - b).detach().abs().max()) / max(1.0, float(b.detach().abs().max())) if b.numel() else 0.0


def pair(
    name: str = "BertModel", attention: str = "sdpa", config: dict[str, Any] | None = None, **options: Any
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A fused model and its unfused twin. options: of ``fuse``; without any, ``unpad`` and ``cls_only="auto"``."""
    theirs = build(name, attention, **(config or {}))
    ours = copy.deepcopy(theirs)
    fuse(ours, **(options or {"unpad": True, "cls_only": "auto"}))
    return ours, theirs


def compare(
    ours: nn.Module, theirs: nn.Module, batch: dict[str, Any] = BATCH, *args: Any, **options: Any
) -> list[tuple[int, ...]]:
    """Call both models: the outputs are the same, bit for bit where the encoder ran dense.

    Where it did not, outputs per token are compared at the real ones. Returns the shapes of the rows that each
    attention of our own computed.
    """
    torch.manual_seed(3)
    other = theirs(*args, **batch, **options)
    torch.manual_seed(3)
    with watched() as shapes:
        mine = ours(*args, **batch, **options)
    keep = batch.get("attention_mask", RIGHT).bool()
    assert list(mine) == list(other)
    for name in other:
        pairs = (mine[name], other[name]) if isinstance(other[name], tuple) else ((mine[name],), (other[name],))
        for a, b in zip(*pairs, strict=True):
            if shapes and a.shape[:2] == keep.shape:
                a, b = a[keep], b[keep]
            assert difference(a, b) <= (TOLERANCE if shapes else 0.0), name
    return shapes
