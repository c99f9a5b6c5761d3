"""Parts of a fused model that are replaced: the encoder runs dense where one may mix tokens or read padding."""

import functools
import types

import pytest
import torch
from encoders import (
    FIRST,
    build,
    compare,
    pair,
)
from torch import nn
from transformers.models.bert import modeling_bert

from bert_fused import fuse, unfuse

NAME = "BertForSequenceClassification"


class MeanPooler(nn.Module):
    def forward(self, hidden_states):
        return hidden_states.mean(1)


class MeanClassifier(nn.Module):
    def forward(self, features):
        return features.mean(1)[:, :2]


CHANGES = {
    "pooler": (NAME, lambda m: setattr(m.bert, "pooler", MeanPooler())),
    "patched pooler": (NAME, lambda m: setattr(m.bert.pooler, "forward", lambda hidden: hidden.mean(1))),
    "classifier": ("RobertaForSequenceClassification", lambda m: setattr(m, "classifier", MeanClassifier())),
    "pooler of the model itself": ("BertModel", lambda m: setattr(m, "pooler", MeanPooler())),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_pooler_or_classifier_that_reads_padding_runs_dense(change, when) -> None:
    name, apply = CHANGES[change]
    theirs, ours = build(name), build(name)
    apply(theirs)
    if when == "before":
        apply(ours)
    report = fuse(ours, unpad=True, cls_only="auto")
    assert any(where.endswith("encoder") for where in report.skipped) == (when == "before")
    if when == "after":
        apply(ours)
    assert compare(ours, theirs) == []


@pytest.mark.parametrize("part", ["BertLayer", "BertAttention", "BertSelfAttention", NAME, "BertModel"])
def test_a_forward_replaced_on_a_class_runs_dense(part, monkeypatch) -> None:
    ours, theirs = pair(NAME)
    kind = getattr(modeling_bert, part)
    original = kind.forward
    calls = []

    @functools.wraps(original)
    def replaced(self, *args, **kwargs):
        calls.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", replaced)
    assert compare(ours, theirs) == []
    assert calls


def mean_instead(model: nn.Module) -> None:
    """What is at padding has a say in the logits."""

    def forward(self, input_ids, attention_mask=None, **kwargs):
        hidden = self.bert(input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state
        return {"logits": self.classifier(hidden.mean(1))}

    model.forward = types.MethodType(forward, model)


def another_mask(module: nn.Module) -> None:
    """More tokens than the caller said, for what runs below."""
    theirs = type(module).forward

    def forward(self, *args, attention_mask=None, **kwargs):
        if attention_mask is not None:
            attention_mask = torch.ones_like(attention_mask)
        return theirs(self, *args, attention_mask=attention_mask, **kwargs)

    module.forward = types.MethodType(forward, module)


def no_mask(module: nn.Module) -> None:
    theirs = type(module).forward

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        return theirs(self, hidden_states, None, **kwargs)

    module.forward = types.MethodType(forward, module)


REPLACED = {
    "head": ("", mean_instead, "what BertForSequenceClassification reads of it is not known"),
    "base": ("bert", another_mask, "BertModel has a forward of its own"),
    "encoder": ("bert.encoder", no_mask, "BertEncoder has a forward of its own"),
}


@pytest.mark.parametrize("part", REPLACED)
@pytest.mark.parametrize("cls_only", [False, "auto"])
def test_a_forward_replaced_on_an_instance_runs_dense(part, cls_only) -> None:
    where, replace, said = REPLACED[part]
    ours, theirs = pair(NAME, unpad=True, cls_only=cls_only)
    for model in (ours, theirs):
        replace(model.get_submodule(where))
    assert compare(ours, theirs) == []
    unfuse(ours)
    assert said in fuse(ours, unpad=True, cls_only=cls_only).skipped["bert.encoder"]
    assert compare(ours, theirs) == []
    del ours.get_submodule(where).forward
    fuse(ours, unpad=True, cls_only="auto")
    assert compare(ours, build(NAME)) == FIRST


def test_accelerates_hooks_run_dense() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    ours, theirs = pair(NAME)
    hooks.add_hook_to_module(ours, hooks.ModelHook())
    assert compare(ours, theirs) == []


class Quiet(nn.Module):
    def forward(self, hidden):
        return hidden - hidden.mean((0, 1), keepdim=True)


class Neighbours(nn.LSTM):
    """As wide as its input, and its output alone."""

    __module__ = nn.LSTM.__module__

    def __init__(self, width=32):
        super().__init__(32, width // 2, bidirectional=True, batch_first=True)

    def forward(self, hidden):
        return super().forward(hidden)[0]


# Modules that take a layer's hidden states and mix tokens, and sequences, or take other dimensions for them.
MIXING = {
    "a user's own": Quiet,
    "LSTM": Neighbours,
    "convolution": lambda: nn.Conv1d(7, 7, 3, padding=1),
    "pooling": lambda: nn.AvgPool2d((3, 1), 1, (1, 0)),
    "softmax": lambda: nn.Softmax(-2),
    "group norm": lambda: nn.GroupNorm(1, 7),
    "channels of an activation": lambda: nn.PReLU(7),
    "channels of dropout": lambda: nn.Dropout1d(0.0),
}


@pytest.mark.parametrize("part", MIXING)
def test_a_layer_with_a_part_that_mixes_tokens_runs_dense(part) -> None:
    ours, theirs = pair()
    torch.manual_seed(0)
    mixing = MIXING[part]()
    for model in (ours, theirs):
        model.encoder.layer[0].output.dropout = mixing
    assert compare(ours, theirs) == []
    assert type(mixing).__name__ in fuse(ours, unpad=True).skipped["encoder"]


READERS = {
    "BertForTokenClassification": ("classifier", 2),
    "ElectraForTokenClassification": ("dropout", 32),
    "BertForMaskedLM": ("cls.predictions.transform", 32),
    "RobertaForMaskedLM": ("lm_head.layer_norm", 32),
    "ElectraForPreTraining": ("discriminator_predictions.dense", 32),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_head_that_mixes_tokens_runs_dense(name, when) -> None:
    ours, theirs = build(name), build(name)
    where, width = READERS[name]
    torch.manual_seed(0)
    mixing = Neighbours(width)
    theirs.set_submodule(where, mixing)
    if when == "before":
        ours.set_submodule(where, mixing)
    report = fuse(ours, unpad=True)
    said = report.skipped.get(f"{ours.base_model_prefix}.encoder", "")
    assert ("reads padded positions" in said) == (when == "before")
    ours.set_submodule(where, mixing)
    assert compare(ours, theirs) == []
