"""The other linear layers of an encoder on a CPU that oneDNN serves: query, key, value, and the two outputs."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from models import FAMILIES, SIZES, drawn, make
from models import inputs as text
from torch import Tensor, nn
from transformers import BertConfig, BertForQuestionAnswering, BertLMHeadModel
from transformers.models.bert.modeling_bert import BertOutput, BertSelfAttention

import bert_fused

LAYER = [*4 * ["none"], "gelu", "none"]


def differences(got, expected) -> float:
    return max((got[name] - expected[name]).abs().max().item() for name in expected)


def served_by(model: nn.Module, batch: dict[str, Tensor], served: list[str]) -> list[str]:
    """Return what oneDNN serves in a call, whose result must be the unfused model's."""
    bert_fused.unfuse(model)
    expected = model(**batch)
    bert_fused.fuse(model)
    served.clear()
    got = model(**batch)
    calls = list(served)
    assert differences(got, expected) <= 1e-5
    return calls


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{}, {"unpad": True}, {"cls_only": True}, {"unpad": True, "cls_only": True}], ids=str
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", FAMILIES, ids=lambda kind: kind.__name__)
def test_results_are_the_models(kind, attention, options, on_cpu) -> None:
    model = make(kind, attn_implementation=attention)
    batch = text(rows=8, length=9)
    expected = model(**batch)
    report = bert_fused.fuse(model, **options)
    held = {name.rpartition("layer.1.")[2] for name in report.paths if "layer.1." in name}
    assert held == {"attention.self", "attention.output", "intermediate", "output"}
    got = model(**batch)
    real = batch["attention_mask"].bool()
    for name in expected:
        a, b = got[name], expected[name]
        if name == "last_hidden_state" or (name == "logits" and b.dim() == 3):
            a, b = (a, b[:, :1]) if a.shape != b.shape else (a[real], b[real])
        assert (a - b).abs().max() <= 1e-5
    assert on_cpu.count("none") == 10


@torch.no_grad()
def test_attention_weights_and_hidden_states_are_returned(on_cpu) -> None:
    model = make(attn_implementation="eager")
    batch = text(rows=8, length=9) | {"output_attentions": True, "output_hidden_states": True}
    expected = model(**batch)
    bert_fused.fuse(model)
    got = model(**batch)
    for name in ("attentions", "hidden_states"):
        for a, b in zip(got[name], expected[name], strict=True):
            assert (a - b).abs().max() <= 1e-5
    assert on_cpu.count("none") == 2 * 2  # the attentions run Hugging Face's code


@torch.no_grad()
def test_a_head_that_reads_padding_and_a_decoder_are_served(on_cpu) -> None:
    for kind, changes in ((BertForQuestionAnswering, {}), (BertLMHeadModel, {"is_decoder": True})):
        torch.manual_seed(0)
        model = drawn(kind(BertConfig(**SIZES, **changes))).eval()
        batch = text(rows=8, length=9)
        batch.pop("token_type_ids", None)
        expected = model(**batch, use_cache=False)
        bert_fused.fuse(model)
        on_cpu.clear()
        got = model(**batch, use_cache=False)
        name = next(iter(expected))
        assert (got[name] - expected[name]).abs().max() <= 1e-5
        assert on_cpu.count("none") == 10
        if changes:  # the keys and values kept for the next token go through Hugging Face's code
            cached = model(**batch, use_cache=True)
            assert (cached[name] - expected[name]).abs().max() <= 1e-5
            assert on_cpu.count("none") == 10 + 4


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@torch.no_grad()
@pytest.mark.parametrize("name", ["attention.self.query", "attention.output.dense", "output.dense"])
@pytest.mark.parametrize("change", ["hook", "class", "forward", "weight", "bias dropped"])
def test_a_changed_linear_layer_counts_at_once(change, name, on_cpu) -> None:
    model = make()
    batch = text(rows=8, length=9)
    bert_fused.fuse(model)
    linear = model.encoder.layer[0].get_submodule(name)
    if change == "hook":
        linear.register_forward_hook(lambda module, args, out: out + 1)
    elif change == "class":
        linear.__class__ = Doubled
    elif change == "forward":
        linear.forward = lambda x: F.linear(x, linear.weight)
    elif change == "weight":
        linear.weight.mul_(2)
    else:
        linear.bias = None
    on_cpu.clear()
    got = model(**batch)
    plain = change in ("weight", "bias dropped")
    assert on_cpu.count("none") == 10 - (not plain)
    unfused = copy.deepcopy(model) if change != "forward" else model
    bert_fused.unfuse(unfused)
    assert differences(got, unfused(**batch)) <= 1e-5


@torch.no_grad()
def test_adapters_are_reported_when_fusing(on_cpu) -> None:
    model = make()
    model.encoder.layer[0].attention.self.key.__class__ = Doubled
    model.encoder.layer[1].output.dense.register_forward_hook(lambda *_: None)
    report = bert_fused.fuse(model)
    assert "its key layer is a" in report.skipped["encoder.layer.0.attention.self"]
    assert report.skipped["encoder.layer.1.output"] == "its dense layer has hooks"
    assert type(model.encoder.layer[0].attention.self) is BertSelfAttention
    assert type(model.encoder.layer[1].output) is BertOutput


@torch.no_grad()
@pytest.mark.parametrize("kind", [BertSelfAttention, BertOutput])
def test_a_class_patched_after_fusing_runs_the_patch(kind, on_cpu, monkeypatch) -> None:
    model = make()
    bert_fused.fuse(model)
    calls = []
    before = kind.forward

    def patched(self, *args, **kwargs):
        calls.append(self)
        return before(self, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", patched)
    model(**text(rows=8, length=9))
    assert len(calls) == 2


def test_gradients_autocast_and_the_switch_take_pytorch(on_cpu, monkeypatch) -> None:
    model = make()
    batch = text(rows=8, length=9)
    expected = model(**batch)
    bert_fused.fuse(model)
    got = model(**batch)
    assert on_cpu == []
    for name in expected:
        assert torch.equal(got[name], expected[name])
    got.pooler_output.sum().backward()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            model(**batch)
        assert on_cpu == []
        with monkeypatch.context() as patch:
            patch.setenv("BERT_FUSED_DISABLE", "1")
            model(**batch)
            assert on_cpu == []
            assert len(bert_fused.fuse(model).paths) == 3
        model(**{name: value[:1, :7] for name, value in batch.items()})
        assert on_cpu == []


@torch.no_grad()
def test_tied_layers_unfuse_pickle_and_other_devices(on_cpu) -> None:
    model = make()
    first, second = model.encoder.layer
    second.attention.self.query = first.attention.self.query
    kinds = [type(module) for module in model.modules()]
    batch = text(rows=8, length=9)
    assert served_by(model, batch, on_cpu) == 2 * LAYER + ["tanh"]
    loaded = pickle.loads(pickle.dumps(model))
    assert differences(loaded(**batch), model(**batch)) == 0
    assert [type(module) for module in loaded.modules()] == [type(module) for module in model.modules()]
    bert_fused.unfuse(model)
    assert [type(module) for module in model.modules()] == kinds
    with bert_fused.fused(model, unpad=True):
        pass
    assert [type(module) for module in model.modules()] == kinds
    bert_fused.fuse(model, unpad=True)
    bert_fused.fuse(model)
    assert served_by(model, batch, on_cpu) == 2 * LAYER + ["tanh"]
    assert bert_fused.fuse(model.half()).paths.keys() == {
        "encoder.layer.0.intermediate",
        "encoder.layer.1.intermediate",
        "pooler",
    }
    assert type(first.output) is BertOutput


@torch.no_grad()
def test_a_compiled_model_is_torchs_operations(on_cpu) -> None:
    model = make()
    batch = text(rows=8, length=9)
    expected = model(**batch)
    bert_fused.fuse(model)
    got = torch.compile(model, backend="eager")(**batch)
    assert differences(got, expected) <= 1e-6
    assert on_cpu == []
