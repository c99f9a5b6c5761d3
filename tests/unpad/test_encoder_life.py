"""What fusing an encoder leaves as it was; copies and threads of a fused model."""

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from encoders import (
    BATCH,
    FAMILIES,
    FIRST,
    MODELS,
    PACKED,
    RIGHT,
    build,
    compare,
    difference,
    inputs_of,
    mask_of,
    pair,
    watched,
)
from torch import nn

from bert_fused import fuse, fused, unfuse, verify
from bert_fused.unpad.encoder import FusedEncoder
from bert_fused.unpad.hooks import sentence_transformer_pre_hook
from bert_fused.unpad.packing import Packing

NAME = "BertForSequenceClassification"


def state_of(model: nn.Module) -> list:
    """All that fusing might touch."""
    hooks = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks")
    return [
        (type(m), sorted(m.__dict__), [list(getattr(m, h).values()) for h in hooks], list(m._parameters.values()))
        for m in model.modules()
    ]


@pytest.mark.parametrize("name", MODELS)
def test_unfuse_restores_every_attribute_of_any_model(name) -> None:
    model = build(name)
    before, keys, batch = state_of(model), list(model.state_dict()), inputs_of(name, RIGHT)
    expected = model(**batch)[0]
    options = {"unpad": True, "cls_only": "auto", "skip_pooler": True, "recompute_preact": True}
    fuse(model, **options)
    assert list(model.state_dict()) == keys
    model(**batch)
    unfuse(model)
    assert state_of(model) == before
    assert torch.equal(model(**batch)[0], expected)
    with fused(model, **options):
        assert state_of(model) != before
    assert state_of(model) == before


def test_fusing_again_changes_options_and_fused_leaves_them() -> None:
    model, theirs = pair(NAME)
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    report = fuse(model, unpad=True, cls_only="auto")
    assert "bert.encoder" in report.fused
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks
    with fused(model) as report:
        assert compare(model, theirs) == FIRST
    with fused(model, unpad=True):
        assert compare(model, theirs) == FIRST
    assert compare(model, theirs) == FIRST
    fuse(model, unpad=True)
    assert compare(model, theirs) == PACKED
    fuse(model)
    assert not isinstance(model.bert.encoder, FusedEncoder)
    assert compare(model, theirs) == []


def test_verify_compares_real_tokens_and_restores_options() -> None:
    for name in ("BertModel", "BertForTokenClassification", "BertForSequenceClassification"):
        model = pair(name)[0]
        before = state_of(model)
        with watched() as shapes:
            assert verify(model, **inputs_of(name, RIGHT)).max_abs_error < 1e-5
        assert len(shapes) == 2
        assert verify(model, *inputs_of(name, RIGHT).values()).max_abs_error < 1e-5
        assert state_of(model) == before


def test_verify_sees_an_error_at_a_real_token(monkeypatch) -> None:
    restore = Packing.restore
    monkeypatch.setattr(Packing, "restore", lambda packing, rows: restore(packing, rows.roll(1, 0)))
    assert verify(pair("BertModel")[0], **BATCH).max_abs_error > 0.1


def test_copies_and_pickles_of_a_fused_model_are_fused() -> None:
    model, theirs = pair(NAME)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert isinstance(other.bert.encoder, FusedEncoder)
        assert compare(other, theirs) == FIRST
        unfuse(other)
        assert [type(m) for m in other.modules()] == [type(m) for m in theirs.modules()]
        assert not any(m._forward_pre_hooks for m in other.modules())
    assert compare(model, theirs) == FIRST


def test_save_pretrained_writes_an_unfused_model(tmp_path) -> None:
    model = pair(NAME)[0]
    model.save_pretrained(tmp_path)
    loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    assert type(loaded.bert.encoder).__name__ == "BertEncoder"
    assert compare(model, loaded) == FIRST


def test_data_parallel_replicas_use_their_own_weights() -> None:
    model, theirs = pair("ElectraModel")
    replica = model._replicate_for_data_parallel()
    replica.encoder = model.encoder._replicate_for_data_parallel()
    replica.encoder.layer = copy.deepcopy(model.encoder.layer)
    with torch.no_grad():
        for m in (replica, theirs):
            for parameter in m.encoder.layer.parameters():
                parameter.mul_(1.5)
    assert compare(replica, theirs) == PACKED
    model, theirs = pair(NAME)
    assert compare(nn.DataParallel(model), theirs) == FIRST


def test_an_encoder_unfused_alone_runs_dense() -> None:
    model, theirs = pair(NAME)
    unfuse(model.bert.encoder)
    assert compare(model, theirs) == []


def test_skip_pooler_leaves_out_the_pooler_of_a_model_without_a_head() -> None:
    for family in FAMILIES[:4]:
        name = f"{family}Model"
        model, theirs = pair(name, skip_pooler=True, unpad=True)
        for pattern in ("right", "left"):
            batch, keep = inputs_of(name, mask_of(pattern)), mask_of(pattern).bool()
            with watched() as shapes:
                mine = model(**batch)
            assert len(shapes) == 2
            assert mine.pooler_output is None
            assert difference(mine.last_hidden_state[keep], theirs(**batch).last_hidden_state[keep]) <= 1e-5
        unfuse(model)
        assert model(**batch).pooler_output is not None
    model, theirs = pair(NAME, skip_pooler=True)
    assert "left out" not in fuse(model, skip_pooler=True).paths["bert.pooler"]
    assert compare(model, theirs) == []


def test_export_runs_dense() -> None:
    model, theirs = pair()
    with torch.no_grad():
        exported = torch.export.export(model, (), BATCH).module()
        assert difference(exported(**BATCH)[0], theirs(**BATCH)[0]) <= 1e-5


def test_a_fused_model_on_meta_gives_shapes() -> None:
    model = pair("BertModel")[0].to("meta")
    ids = torch.zeros(4, 7, dtype=torch.long, device="meta")
    mask = torch.zeros(4, 1, 7, 7, dtype=torch.bool, device="meta")
    assert model(ids, mask)[0].shape == (4, 7, 32)


def test_threads_that_share_a_model_get_the_same_results() -> None:
    model, theirs = pair()

    @torch.no_grad()
    def work(pattern: str) -> None:
        batch, keep = inputs_of("BertModel", mask_of(pattern)), mask_of(pattern).bool()
        expected = theirs(**batch)[0][keep]
        for turn in range(20):
            if pattern == "right":
                [fuse, unfuse][turn % 2](model, **[{"unpad": True}, {}][turn % 2])
            assert difference(model(**batch)[0][keep], expected) <= 1e-5

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, ("right", "left", "single", "interior")))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("where", ["", "bert", "bert.embeddings"])
def test_a_model_unfused_during_a_call_runs_dense(where, attention) -> None:
    """As another thread would, between any two steps of the call."""
    model, theirs = build(NAME, attention), build(NAME, attention)
    calls = []

    def interrupt(module, args):
        calls.append(module)
        unfuse(model)

    model.get_submodule(where).register_forward_pre_hook(interrupt)
    fuse(model, unpad=True, cls_only="auto")
    assert compare(model, theirs) == []
    assert len(calls) == 1


@pytest.mark.parametrize("where", ["", "bert"])
def test_a_hook_called_after_unfuse_does_nothing(where) -> None:
    """The hook was looked up before ``unfuse`` in another thread, which has not come to the encoder's class yet."""
    model = pair(NAME)[0]
    module = model.get_submodule(where)
    (hook,) = module._forward_pre_hooks.values()
    unfuse(model)
    model.bert.encoder.__class__ = FusedEncoder
    assert hook(module, (), BATCH) is None
    assert hook(module, ()) is None


def test_hooks_called_without_keyword_arguments_run_dense() -> None:
    """``fuse`` enters a hook before it is known that the hook takes keyword arguments."""
    model, theirs = pair(NAME)
    for module in (model, model.bert):
        module._forward_pre_hooks_with_kwargs.clear()
    assert compare(model, theirs) == []


def test_sentence_transformers_hook_without_keyword_arguments_does_nothing() -> None:
    assert sentence_transformer_pre_hook(nn.Identity(), ({},)) is None


def test_a_model_unfused_and_fused_again_during_a_call_gives_the_same_result(monkeypatch) -> None:
    """As other threads would: the second layer is Hugging Face's, and when it fails the model is fused again."""
    model, theirs = pair(NAME)
    attend, second = Packing.attend, model.bert.encoder.layer[1].attention.self

    def fuse_again(module, args):
        module._forward_pre_hooks.clear()
        fuse(model, unpad=True)

    def unfuse_first(packing, *args, **options):
        monkeypatch.setattr(Packing, "attend", attend)
        unfuse(model)
        second.query.register_forward_pre_hook(fuse_again)
        return attend(packing, *args, **options)

    monkeypatch.setattr(Packing, "attend", unfuse_first)
    assert compare(model, theirs) == PACKED[:1]
