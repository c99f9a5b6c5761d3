"""Attention over packed rows: of a GPU, of a user's own, in half precision, with dropout and checkpointing."""

import copy
import inspect
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from encoders import (
    BATCH,
    FIRST,
    KEEP,
    PACKED,
    TOLERANCE,
    build,
    compare,
    difference,
    inputs_of,
    mask_of,
    pair,
    watched,
)
from models import gradients
from transformers import AttentionInterface
from transformers.models.bert import modeling_bert

from bert_fused import fuse
from bert_fused.unpad import packing


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("cls_only", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant, cls_only) -> None:
    ours, theirs = pair("BertForSequenceClassification", unpad=True, cls_only=cls_only)
    ours.train(), theirs.train()
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ours.enable_input_require_grads()
    with watched() as shapes:
        a = ours(**BATCH).logits
        assert shapes == (FIRST if cls_only else PACKED)
        a.square().sum().backward()
        assert len(shapes) == 4, "nothing was computed again"
    b = theirs(**BATCH).logits
    b.square().sum().backward()
    assert difference(a, b) <= TOLERANCE
    torch.testing.assert_close(gradients(ours), gradients(theirs), rtol=1e-4, atol=1e-5)


def test_chunked_feed_forward_is_left_alone() -> None:
    ours, theirs = pair(config={"chunk_size_feed_forward": 7})
    assert "chunk_size_feed_forward" in fuse(ours, unpad=True).skipped["encoder"]
    assert compare(ours, theirs) == []


def uniform(module, query, key, value, attention_mask, **options):
    assert query.shape[2] == key.shape[2] == 7
    return value.mean(2, keepdim=True).expand_as(value).transpose(1, 2).contiguous(), None


@pytest.mark.parametrize("cls_only", [False, True])
def test_attention_of_the_users_own_runs_dense(cls_only) -> None:
    """It may heed padding as it likes."""
    AttentionInterface.register("of_my_own", uniform)
    theirs = build("BertModel")
    theirs.set_attn_implementation("of_my_own")
    ours = copy.deepcopy(theirs)
    fuse(ours, unpad=True, cls_only=cls_only)
    assert compare(ours, theirs) == []
    del AttentionInterface._global_mapping["of_my_own"]


@pytest.mark.parametrize("cls_only", [False, True])
@pytest.mark.parametrize("way", ["sdpa", "eager", "a registered eager"])
def test_attention_replaced_under_its_own_name_runs_dense(way, cls_only, monkeypatch) -> None:
    ours, theirs = pair("BertModel", way.split()[-1], unpad=True, cls_only=cls_only)
    with monkeypatch.context() as patch:
        if way == "eager":
            patch.setattr(modeling_bert, "eager_attention_forward", uniform)
        else:
            patch.setitem(AttentionInterface._global_mapping, way.split()[-1], uniform)
        assert compare(ours, theirs) == []
        assert "is not transformers' own" in fuse(ours, unpad=True, cls_only=cls_only).skipped["encoder"]
    fuse(ours, unpad=True)
    assert compare(ours, theirs) == PACKED


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_as_exact_as_unfused(autocast) -> None:
    ours, theirs = pair()
    exact = theirs(**BATCH)[0][KEEP]
    if not autocast:
        ours.to(torch.bfloat16), theirs.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), watched() as shapes:
        mine, other = ours(**BATCH)[0][KEEP], theirs(**BATCH)[0][KEEP]
    assert shapes == PACKED
    assert mine.dtype == other.dtype
    errors = [float((out - exact).detach().square().mean()) for out in (mine, other)]
    assert errors[0] <= 1.2 * errors[1]


def test_attention_dropout_is_applied_in_training_only(monkeypatch) -> None:
    ours, _ = pair(config={"attention_probs_dropout_prob": 0.5})
    seen = []
    sdpa = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: seen.append(k["dropout_p"]) or sdpa(*a, **k))
    ours(**BATCH)
    ours.train()(**BATCH)
    assert seen == [0.0] * 6 + [0.5] * 6  # three lengths, two layers


def reference_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None):
    """``torch.nn.attention.varlen.varlen_attn`` by its documentation."""
    assert query.dim() == key.dim() == value.dim() == 3
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    out = torch.full_like(query, float("nan"))
    for i in range(len(cu_seq_q) - 1):
        q, k = slice(cu_seq_q[i], cu_seq_q[i + 1]), slice(cu_seq_k[i], cu_seq_k[i + 1])
        assert q.stop - q.start <= max_q
        assert k.stop - k.start <= max_k
        scores = torch.einsum("qhd,khd->hqk", query[q], key[k]) * scale
        out[q] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value[k])
    return out


def test_the_stand_in_has_the_signature_of_torchs_own() -> None:
    real = inspect.signature(packing.varlen_attn)
    real.bind(*range(7), scale=1.0)
    assert list(real.parameters)[:7] == list(inspect.signature(reference_varlen).parameters)[:7]


@pytest.mark.parametrize("way", ["varlen", "padded"])
@pytest.mark.parametrize("pattern", ["right", "left", "interior", "empty row"])
@pytest.mark.parametrize("name", ["ElectraModel", "BertForSequenceClassification"])
def test_attention_as_on_a_gpu_gives_the_same_outputs_and_gradients(way, pattern, name, monkeypatch) -> None:
    if way == "varlen":
        monkeypatch.setattr(packing, "varlen_attn", reference_varlen)
        monkeypatch.setattr(packing, "varlen_serves", lambda query, dropout: True)
    else:
        monkeypatch.setattr(packing, "_by_length", packing._padded)
    ours, theirs = pair(name)
    mask = mask_of(pattern)
    keep = mask.bool()
    shapes = compare(ours, theirs, inputs_of(name, mask))
    if name == "ElectraModel":
        assert shapes == [(int(keep.sum()),)] * 2
    elif pattern == "right":
        assert shapes == FIRST
    for model in (ours, theirs):
        out = model(**inputs_of(name, mask))[0]
        (out[keep] if name == "ElectraModel" else out).square().sum().backward()
    torch.testing.assert_close(gradients(ours), gradients(theirs), rtol=1e-4, atol=1e-4)


def test_varlen_serves_half_precision_on_new_gpus_only(monkeypatch) -> None:
    def serves(dtype=torch.bfloat16, cuda=True, width=64, dropout=0.0, capability=(9, 0)) -> bool:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        query = SimpleNamespace(dtype=dtype, is_cuda=cuda, shape=(5, 3, width), device=None)
        return packing.varlen_serves(query, dropout)

    assert serves()
    assert serves(torch.float16, capability=(8, 0))
    assert not serves(torch.float32)
    assert not serves(cuda=False)
    assert not serves(dropout=0.1)
    assert not serves(width=12)
    assert not serves(width=264)
    assert not serves(capability=(7, 5))
