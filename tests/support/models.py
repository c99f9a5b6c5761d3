"""Tiny Hugging Face models of every supported family, whose weights and biases are not those of a fresh model."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    CamembertConfig,
    CamembertForTokenClassification,
    CamembertModel,
    ElectraConfig,
    ElectraForSequenceClassification,
    ElectraModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
    XLMRobertaModel,
)

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": 0,
}

# Model class -> configuration class, intermediates and poolers in a model of two layers.
FAMILIES = {
    BertModel: (BertConfig, 2, 1),
    BertForSequenceClassification: (BertConfig, 2, 1),
    BertForMaskedLM: (BertConfig, 2, 0),
    RobertaModel: (RobertaConfig, 2, 1),
    RobertaForSequenceClassification: (RobertaConfig, 2, 0),
    XLMRobertaModel: (XLMRobertaConfig, 2, 1),
    XLMRobertaForSequenceClassification: (XLMRobertaConfig, 2, 0),
    CamembertModel: (CamembertConfig, 2, 1),
    CamembertForTokenClassification: (CamembertConfig, 2, 0),
    ElectraModel: (ElectraConfig, 2, 0),
    ElectraForSequenceClassification: (ElectraConfig, 2, 0),
}


def make(kind: type[PreTrainedModel] = BertModel, **changes: object) -> PreTrainedModel:
    """A model in eval mode. Biases are drawn as well: Hugging Face's are zero, and hide a missing one."""
    torch.manual_seed(0)
    return drawn(kind(FAMILIES[kind][0](**(SIZES | changes)))).eval()


@torch.no_grad()
def drawn(model: PreTrainedModel) -> PreTrainedModel:
    """Scale a fresh model's weights, give it biases that are not zero, and return it."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter) * 0.2)
        else:
            parameter.mul_(4.0)
    return model


def inputs(rows: int = 3, length: int = 7) -> dict[str, Tensor]:
    """Token ids and a mask with padding at the end of every row but the first."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, SIZES["vocab_size"], (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, length - row :] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def tensors_of(output: object) -> Iterator[Tensor]:
    """The floating-point tensors of a model output."""
    values = output.values() if hasattr(output, "values") else [output]
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from (item for item in value if isinstance(item, Tensor) and item.is_floating_point())
        elif isinstance(value, Tensor) and value.is_floating_point():
            yield value


def assert_same(ours: object, theirs: object, tolerance: float = 2e-5) -> None:
    """Every floating-point tensor of two model outputs agrees to ``tolerance`` of its largest element."""
    mine, other = list(tensors_of(ours)), list(tensors_of(theirs))
    assert len(mine) == len(other) > 0
    for a, b in zip(mine, other, strict=True):
        assert a.dtype == b.dtype
        assert float((a - b).detach().abs().max()) <= tolerance * max(1.0, float(b.detach().abs().max()))


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def blocks(model: nn.Module) -> list[nn.Module]:
    """Intermediates and poolers of a model."""
    return [m for m in model.modules() if type(m).__name__.endswith(("Intermediate", "Pooler"))]
