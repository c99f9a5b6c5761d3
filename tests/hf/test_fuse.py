"""fuse, unfuse and fused on whole models: what they change, what they leave, when they step aside."""

import copy

import pytest
import torch
from models import assert_same, blocks, gradients, inputs, make
from torch import nn
from transformers import BertForSequenceClassification
from transformers.models.bert.modeling_bert import BertIntermediate, BertPooler

from bert_fused import FusedBertIntermediate, FusedBertPooler, fuse, fused, unfuse, verify

FIRST = "encoder.layer.0.intermediate"


def test_report_names_what_was_fused() -> None:
    report = fuse(make())
    assert report.fused == (FIRST, "encoder.layer.1.intermediate", "pooler")
    assert report.skipped == {}
    assert str(report).splitlines()[0].split() == [FIRST, "fused", "Triton"]
    assert str(report).endswith("3 fused, 0 skipped")


def test_report_says_that_a_model_has_nothing_to_fuse() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.GELU())
    report = fuse(model)
    assert report.fused == ()
    assert "Sequential holds no module of transformers that can be fused" in report.skipped[""]
    assert "(model)" in str(report)
    assert [type(m) for m in model] == [nn.Linear, nn.GELU]


@pytest.mark.parametrize("function", [fuse, unfuse, verify])
def test_a_model_that_is_no_module_is_a_type_error(function) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        function("bert-base-uncased")
    with pytest.raises(TypeError, match="got dict"), fused({}):
        pass


def test_fusing_twice_is_fusing_once() -> None:
    model = make()
    first = fuse(model)
    assert fuse(model) == first
    unfuse(model)
    assert [type(m) for m in blocks(model)] == [BertIntermediate, BertIntermediate, BertPooler]
    unfuse(model)


def test_the_context_manager_undoes_what_it_did() -> None:
    model = make()
    model.pooler.__class__ = FusedBertPooler

    def fail_while_fused() -> None:
        with fused(model) as report:
            assert len(report.fused) == 3
            assert type(model.encoder.layer[0].intermediate) is FusedBertIntermediate
            raise KeyError

    with pytest.raises(KeyError):
        fail_while_fused()
    assert type(model.encoder.layer[0].intermediate) is BertIntermediate
    assert type(model.pooler) is FusedBertPooler


def test_training_step_gives_eagers_loss_and_gradients() -> None:
    eager = make(BertForSequenceClassification, num_labels=3).train()
    model = copy.deepcopy(eager)
    original_classes, original_keys = [type(m) for m in model.modules()], list(model.state_dict())
    fuse(model)
    batch = inputs() | {"labels": torch.tensor([0, 2, 1])}
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (model, eager)]
    for _ in range(3):
        losses = [m(**batch).loss for m in (model, eager)]
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=2e-5)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
        for (name, mine), theirs in zip(model.named_parameters(), eager.parameters(), strict=True):
            error = float((mine.grad - theirs.grad).norm())
            assert error <= 1e-4 * float(theirs.grad.norm()) + 1e-7, name
        for optimizer in optimizers:
            optimizer.step()
    unfuse(model)
    assert [type(m) for m in model.modules()] == original_classes
    assert list(model.state_dict()) == original_keys
    eager.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(**batch).logits, eager.eval()(**batch).logits)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_hidden_states_and_attentions_are_recorded(attention) -> None:
    eager, model = make(), make()
    for m in (eager, model):
        m.set_attn_implementation(attention)
    fuse(model)
    options = {"output_hidden_states": True, "output_attentions": attention == "eager"}
    ours, theirs = model(**inputs(), **options), eager(**inputs(), **options)
    assert len(ours.hidden_states) == len(theirs.hidden_states) == 3
    assert_same(ours, theirs)
    if attention == "eager":
        assert len(ours.attentions) == 2


def test_gradient_checkpointing_gives_hugging_faces_gradients() -> None:
    eager, model = make().train(), make().train()
    fuse(model)
    model.gradient_checkpointing_enable()
    for m in (model, eager):
        m(**inputs())[0].square().sum().backward()
    torch.testing.assert_close(gradients(model), gradients(eager), rtol=1e-4, atol=1e-4)


def test_chunked_feed_forward_gives_hugging_faces_output() -> None:
    eager, model = make(chunk_size_feed_forward=2), make(chunk_size_feed_forward=2)
    fuse(model)
    batch = inputs(length=8)
    assert_same(model(**batch), eager(**batch))


def test_compiled_model_has_no_graph_break() -> None:
    torch._dynamo.reset()
    model, eager = make(num_hidden_layers=1), make(num_hidden_layers=1)
    fuse(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_same(compiled(**inputs()), eager(**inputs()))
    for m in (compiled, eager):
        m(**inputs())[1].square().sum().backward()
    torch.testing.assert_close(gradients(model), gradients(eager), rtol=1e-4, atol=1e-4)


def test_subclasses_of_a_fused_class_are_left_alone() -> None:
    class Mine(FusedBertIntermediate):
        pass

    model = make()
    model.encoder.layer[0].intermediate = Mine(model.config)
    fuse(model)
    unfuse(model)
    assert type(model.encoder.layer[0].intermediate) is Mine
    verify(model, **inputs())


def test_report_names_a_block_that_is_the_whole_model() -> None:
    assert str(fuse(make().pooler)).startswith("(model)  fused")


def test_classes_that_others_find_by_name_are_left_alone() -> None:
    model = make()
    model._no_split_modules = ["BertIntermediate"]
    report = fuse(model)
    assert report.fused == ("pooler",)
    assert "_no_split_modules" in report.skipped[FIRST]
