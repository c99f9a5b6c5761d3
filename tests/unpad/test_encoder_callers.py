"""Whoever calls a fused model, its head, its base or a wrapper, in whatever way, gets the unfused result."""

import copy

import pytest
import torch
from encoders import (
    TOLERANCE,
    build,
    difference,
    inputs_of,
    mask_of,
    pair,
    watched,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import AdaLoraConfig, IA3Config, LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from torch import nn
from transformers import BertForTokenClassification, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from bert_fused import fuse

BASES = ("BertModel", "RobertaModel", "ElectraModel")
TOKEN_HEADS = ("BertForMaskedLM", "BertForTokenClassification", "ElectraForTokenClassification", "BertForPreTraining")
SEQUENCE_HEADS = tuple(
    f"{family}ForSequenceClassification" for family in ("Bert", "Roberta", "Camembert", "XLMRoberta", "Electra")
)


class Calling(nn.Module):
    """A user's wrapper."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        return self.model(**inputs)


class Bypassing(Calling):
    """One that goes past the hooks of what it wraps."""

    def forward(self, **inputs):
        return self.model.forward(**inputs)


def adapted(config):
    return lambda model: get_peft_model(model, config)


TARGETS = ["query", "value"]
WRAPPERS = {
    "none": lambda model: model,
    "calling": Calling,
    "bypassing": Bypassing,
    "LoRA": adapted(LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False)),
    "AdaLora": adapted(AdaLoraConfig(init_r=2, target_r=1, total_step=10, target_modules=TARGETS)),
    "IA3": adapted(IA3Config(target_modules=["key", "value", "dense"], feedforward_modules=[])),
    "prompt tuning": adapted(PromptTuningConfig(num_virtual_tokens=2, task_type=TaskType.SEQ_CLS)),
}


def wrapped(name: str, model: PreTrainedModel) -> nn.Module:
    torch.manual_seed(7)
    return WRAPPERS[name](model)


def callees(model: nn.Module) -> list[nn.Module]:
    """The outermost module, and each model of transformers in it, from the outside in."""
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    return models if models[0] is model else [model, *models]


def labels_of(name: str, mask: torch.Tensor, ignored: bool) -> dict[str, torch.Tensor]:
    if name in SEQUENCE_HEADS:
        return {"labels": torch.arange(4) % 2}
    if name == "BertForPreTraining" or name not in TOKEN_HEADS:
        return {}
    labels = torch.arange(mask.numel()).view(mask.shape) % 2
    return {"labels": labels.masked_fill(mask == 0, -100) if ignored else labels}


def assert_same(ours: ModelOutput, theirs: ModelOutput, keep: torch.Tensor, first: bool) -> None:
    """first: whether hidden states may be those of position 0."""
    assert list(ours) == list(theirs)
    for name, other in theirs.items():
        mine = ours[name]
        if not isinstance(other, torch.Tensor):
            continue
        if first and name == "last_hidden_state" and mine.shape[1] == 1:
            other = other[:, :1]
        elif other.dim() > 1 and mine.shape[:2] == keep.shape:
            mine, other = mine[keep], other[keep]
        assert difference(mine, other) <= TOLERANCE, name


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_caller_gets_hugging_faces_outputs(data) -> None:
    name = data.draw(st.sampled_from((*BASES, *TOKEN_HEADS, *SEQUENCE_HEADS)), "model")
    wrapper = data.draw(st.sampled_from(list(WRAPPERS)), "wrapper")
    if wrapper == "prompt tuning" and (name not in SEQUENCE_HEADS or name.startswith("Electra")):  # PEFT's own limits
        wrapper = "none"
    options = data.draw(
        st.fixed_dictionaries({"unpad": st.booleans(), "cls_only": st.sampled_from((False, True, "auto"))}), "options"
    )
    theirs = wrapped(wrapper, build(name))
    if data.draw(st.booleans(), "fused before it was wrapped"):
        ours = build(name)
        fuse(ours, **options)
        ours = wrapped(wrapper, ours)
    else:
        ours = copy.deepcopy(theirs)
        fuse(ours, **options)
    for _ in range(data.draw(st.integers(1, 3), "calls")):
        mask = mask_of(data.draw(st.sampled_from(("none", "right", "left", "interior")), "mask"))
        training = data.draw(st.booleans(), "training")
        which = data.draw(st.integers(0, len(callees(theirs)) - 1), "callee")
        past_hooks = data.draw(st.booleans(), "past its hooks")
        inputs = inputs_of(name, mask)
        if which < max(1, len(callees(theirs)) - 1) and name not in BASES:
            inputs |= labels_of(name, mask, data.draw(st.booleans(), "labels at padding are ignored"))
        outputs = []
        for model in (ours, theirs):
            callee = callees(model.train(training))[which]
            outputs.append((callee.forward if past_hooks else callee)(**inputs))
        assert_same(*outputs, mask.bool(), first=name in BASES and options["cls_only"] is True)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForTokenClassification", "ElectraForTokenClassification"])
def test_a_loss_with_labels_at_padding_past_the_hooks_is_the_same(name) -> None:
    ours, theirs = pair(name, unpad=True)
    mask = mask_of("right")
    inputs = inputs_of(name, mask) | labels_of(name, mask, ignored=False)
    assert difference(ours.forward(**inputs).loss, theirs.forward(**inputs).loss) <= TOLERANCE
    with watched() as shapes:
        ours(**inputs_of(name, mask))
    assert shapes == [(int(mask.sum()),)] * 2


@pytest.mark.parametrize("name", SEQUENCE_HEADS)
def test_left_padding_past_the_hooks_gives_the_same_logits(name) -> None:
    ours, theirs = pair(name, unpad=True, cls_only="auto")
    inputs = inputs_of(name, mask_of("left"))
    with torch.no_grad():
        assert difference(ours.forward(**inputs).logits, theirs.forward(**inputs).logits) <= TOLERANCE


def test_a_model_fused_alone_runs_dense_under_a_head() -> None:
    theirs = build("BertForTokenClassification")
    ours = copy.deepcopy(theirs)
    report = fuse(ours.bert, unpad=True, cls_only=True)
    assert "dense where a model of transformers calls it" in report.paths["encoder"]
    inputs = inputs_of("BertModel", mask_of("right"))
    assert ours.bert(**inputs).last_hidden_state.shape == (4, 1, 32)
    for call in (BertForTokenClassification.__call__, BertForTokenClassification.forward):
        assert torch.equal(call(ours, **inputs).logits, call(theirs, **inputs).logits)
    compiled = torch.compile(ours, backend="eager")
    with torch.no_grad():
        assert difference(compiled(**inputs).logits, theirs(**inputs).logits) <= TOLERANCE
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["BertModel", "BertForSequenceClassification"])
def test_the_report_says_what_a_wrapper_makes_impossible(name) -> None:
    model = wrapped("AdaLora", build(name))
    (reason,) = [why for where, why in fuse(model, unpad=True).skipped.items() if where.endswith("encoder")]
    assert reason == "AdaLoraModel calls a model's forward, not the model, and so goes past the hooks"
    for wrapper in ("calling", "LoRA"):
        report = fuse(wrapped(wrapper, build(name)), unpad=True)
        assert any(where.endswith("encoder") for where in report.fused), report
