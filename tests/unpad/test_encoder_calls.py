"""When a fused encoder packs, when it runs dense, and that the results are Hugging Face's either way."""

import copy
import functools
import inspect
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from encoders import build, difference, inputs_of, mask_of, watched
from torch import nn
from transformers import AttentionInterface
from transformers.models.bert import modeling_bert

from bert_fused import fuse, verify
from bert_fused.unpad import packing

TOLERANCE = 1e-5
FEATURES = {"BertModel": "last_hidden_state", "BertForSequenceClassification": "logits"}


@pytest.fixture(autouse=True)
def _plain_kernels(monkeypatch) -> None:
    monkeypatch.setenv("BERT_FUSED_DISABLE", "1")


def pair(name: str = "BertModel", attention: str = "sdpa", **changes):
    theirs = build(name, attention, **changes)
    ours = copy.deepcopy(theirs)
    fuse(ours, unpad=True, cls_only="auto")
    return ours, theirs


def compare(ours, theirs, batch, keep=None, *args, **options) -> list:
    """Call both; every output agrees, per token at the real ones. The shapes that our own layers computed."""
    torch.manual_seed(3)
    other = theirs(*args, **batch, **options)
    torch.manual_seed(3)
    with watched() as shapes:
        mine = ours(*args, **batch, **options)
    assert list(mine) == list(other)
    for name in other:
        pairs = (
            zip(mine[name], other[name], strict=True) if isinstance(other[name], tuple) else [(mine[name], other[name])]
        )
        for a, b in pairs:
            if keep is not None and a.shape[:2] == keep.shape:
                a, b = a[keep], b[keep]
            assert difference(a, b) <= TOLERANCE, name
    return shapes


RIGHT = mask_of("right")
KEEP = RIGHT.bool()
PACKED = [(int(RIGHT.sum()),)] * 2


def batch_of(name: str = "BertModel", **changes):
    return inputs_of(name, RIGHT) | changes


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_mask_of_any_dtype_by_keyword_and_by_position(dtype) -> None:
    ours, theirs = pair()
    mask = RIGHT.to(dtype) * (1 if dtype is torch.bool else 3)
    assert compare(ours, theirs, batch_of(attention_mask=mask), KEEP) == PACKED
    assert compare(ours, theirs, {}, KEEP, batch_of()["input_ids"], mask) == PACKED
    roberta = pair("RobertaForMultipleChoice")
    batch = inputs_of("RobertaForMultipleChoice", RIGHT)
    assert compare(*roberta, {}, None, batch["input_ids"], None, batch["attention_mask"]) == [PACKED[0], (4,)]


def test_no_mask_is_no_padding() -> None:
    assert compare(*pair(), {"input_ids": batch_of()["input_ids"]}) == []


ROWS = KEEP[:, None, None, :].expand(4, 1, 7, 7)
MASKS = {
    "padding": ROWS,
    "padding, one row": ROWS[:, :, :1],
    "padding, float": torch.where(ROWS, 0.0, torch.finfo(torch.float32).min),
    "causal": ROWS & torch.ones(7, 7, dtype=torch.bool).tril(),
    "by head": ROWS.expand(4, 4, 7, 7),
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", MASKS)
def test_four_dimensional_masks_are_not_unpadded(kind, attention) -> None:
    ours, theirs = pair("BertModel", attention)
    assert compare(ours, theirs, batch_of(attention_mask=MASKS[kind])) == []
    head = pair("BertForSequenceClassification", attention)
    assert compare(*head, batch_of(attention_mask=MASKS[kind])) == [(4, 1)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_recorded_outputs_are_dense_and_leave_no_trace(attention) -> None:
    for name, packed in (("BertModel", PACKED), ("BertForSequenceClassification", [PACKED[0], (4,)])):
        ours, theirs = pair(name, attention)
        assert compare(ours, theirs, batch_of(), output_hidden_states=True) == []
        if attention == "eager":
            assert compare(ours, theirs, batch_of(), output_attentions=True) == []
        # transformers' hooks stay on the layers, and are not the user's.
        layers = [m for m in ours.modules() if type(m).__name__ == "BertLayer"]
        assert all(layer._forward_hooks for layer in layers)
        assert compare(ours, theirs, batch_of(), KEEP) == packed
        for model in (ours, theirs):
            model.config.output_hidden_states = True
        assert compare(ours, theirs, batch_of()) == []


HOOKED = (
    "encoder.layer.0",
    "encoder.layer.1.attention",
    "encoder.layer.0.attention.self.query",
    "encoder.layer.1.output.LayerNorm",
)


@pytest.mark.parametrize("where", HOOKED)
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_hooks_inside_see_what_they_always_saw(where, kind) -> None:
    ours, theirs = pair()
    seen = {}
    handles = []
    for model in (ours, theirs):
        shapes = seen.setdefault(id(model), [])

        def look(*arguments, shapes=shapes) -> None:
            last = arguments[-1][0] if isinstance(arguments[-1], tuple) else arguments[-1]
            shapes.append(tuple(last.shape))

        handles.append(getattr(model.get_submodule(where), kind)(look))
    assert compare(ours, theirs, batch_of(), KEEP) == []
    for model in (ours, theirs):
        model(**batch_of())[0].square().sum().backward()
    assert seen[id(ours)] == seen[id(theirs)] != []
    handles[0].remove()
    assert compare(ours, theirs, batch_of(), KEEP) == PACKED


def test_global_hooks_run_dense() -> None:
    ours, theirs = pair()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(type(m).__name__))
    try:
        assert compare(ours, theirs, batch_of(), KEEP) == []
    finally:
        handle.remove()
    assert seen.count("BertLayer") == 4


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "RobertaForSequenceClassification"])
@pytest.mark.parametrize("where", ["base", "encoder", "reader"])
def test_hooks_that_see_the_last_layer_see_all_of_it(name, where) -> None:
    ours, theirs = pair(name)
    base = ours.base_model
    reader = base.pooler if base.pooler is not None else ours.classifier
    module = {"base": base, "encoder": base.encoder, "reader": reader}[where]
    shapes = []
    look = module.register_forward_hook(lambda m, i, o: shapes.append((i[0] if where == "reader" else o[0]).shape))
    assert compare(ours, theirs, batch_of()) == PACKED
    assert shapes == [(4, 7, 32)]
    look.remove()
    assert compare(ours, theirs, batch_of()) == [PACKED[0], (4,)]


def test_a_later_pre_hook_that_changes_the_mask() -> None:
    ours, theirs = pair()

    def change(module, args, kwargs):
        return args, kwargs | {"attention_mask": mask_of("interior")}

    for model in (ours, theirs):
        model.register_forward_pre_hook(change, with_kwargs=True)
    assert compare(ours, theirs, batch_of()) == []


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("cls_only", [False, "auto"])
def test_a_pre_hook_on_the_encoder_that_changes_the_mask(name, cls_only) -> None:
    theirs = build(name)
    ours = copy.deepcopy(theirs)
    fuse(ours, unpad=True, cls_only=cls_only)

    def change(module, args, kwargs):
        return args, kwargs | {"attention_mask": mask_of("interior").bool()[:, None, None].expand(4, 1, 7, 7)}

    handles = [m.base_model.encoder.register_forward_pre_hook(change, with_kwargs=True) for m in (ours, theirs)]
    assert compare(ours, theirs, batch_of()) == []
    report = fuse(ours, unpad=True, cls_only=cls_only)
    assert "may change its mask" in next(reason for at, reason in report.skipped.items() if at.endswith("encoder"))
    for handle in handles:
        handle.remove()
    fuse(ours, unpad=True)
    assert compare(ours, theirs, batch_of(), KEEP) == PACKED


def ignore_the_mask(self, attention_mask, encoder_attention_mask, **kwargs):
    return None, encoder_attention_mask


class Unmasked(transformers.BertModel):
    """Its ``forward`` is inherited."""

    _create_attention_masks = ignore_the_mask


@pytest.mark.parametrize("where", ["class", "instance"])
def test_masks_made_by_a_method_of_ones_own(where) -> None:
    ours, theirs = pair()
    if where == "class":
        theirs = Unmasked(ours.config).eval()
        theirs.load_state_dict(ours.state_dict())
        ours = copy.deepcopy(theirs)
        fuse(ours, unpad=True)
    else:
        for model in (ours, theirs):
            model._create_attention_masks = functools.partial(ignore_the_mask, model)
    assert compare(ours, theirs, batch_of()) == []


def test_the_model_under_a_head_called_directly_is_unchanged() -> None:
    ours, theirs = pair("BertForSequenceClassification")
    fuse(ours, cls_only="auto")
    assert compare(ours.bert, theirs.bert, batch_of()) == []
    assert compare(ours, theirs, batch_of()) == [(4, 1)]
    ours.train(), theirs.train()
    assert compare(ours, theirs, batch_of()) == []


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_position_0_sees_what_its_own_row_of_the_mask_says(attention) -> None:
    theirs = build("BertModel", attention)
    ours = copy.deepcopy(theirs)
    fuse(ours, cls_only=True)
    causal = torch.ones(4, 1, 7, 7).tril()
    mask = torch.where(causal.bool(), 0.0, torch.finfo(torch.float32).min)
    batch = {"input_ids": batch_of()["input_ids"], "attention_mask": mask}
    with watched() as shapes:
        mine = ours(**batch).last_hidden_state
    assert shapes == [(4, 1)]
    assert difference(mine, theirs(**batch).last_hidden_state[:, :1]) <= TOLERANCE


@pytest.mark.parametrize("name", ["BertModel", "ElectraModel"])
@pytest.mark.parametrize("unpad", [False, True])
def test_cls_only_on_request(name, unpad) -> None:
    theirs = build(name)
    ours = copy.deepcopy(theirs)
    report = fuse(ours, unpad=unpad, cls_only=True)
    assert "position 0 only" in report.paths["encoder"]
    for training in (False, True):
        for pattern in ("right", "left", "empty row"):
            batch = inputs_of(name, mask_of(pattern))
            with watched() as shapes:
                mine = ours.train(training)(**batch)
            other = theirs.train(training)(**batch)
            packed = unpad and pattern == "right"
            assert shapes == ([PACKED[0], (4,)] if packed else [(4, 1)])
            assert mine.last_hidden_state.shape == (4, 1, 32)
            assert difference(mine.last_hidden_state, other.last_hidden_state[:, :1]) <= TOLERANCE
            if name == "BertModel":
                assert difference(mine.pooler_output, other.pooler_output) <= TOLERANCE
    assert verify(ours, **batch_of()).max_abs_error < TOLERANCE


def test_cls_only_true_is_not_for_heads_that_read_every_token() -> None:
    theirs = build("BertForTokenClassification")
    ours = copy.deepcopy(theirs)
    report = fuse(ours, cls_only=True)
    assert "BertForTokenClassification reads every position" in report.skipped["bert.encoder"]
    assert compare(ours, theirs, batch_of()) == []
    report = fuse(ours, cls_only=True, unpad=True)
    assert "no work on padding" in report.paths["bert.encoder"]
    assert compare(ours, theirs, batch_of(), KEEP) == PACKED
    fuse(ours.bert, cls_only=True, unpad=True)
    assert compare(ours, theirs, batch_of(), KEEP) == PACKED


@pytest.mark.parametrize("name", ["BertForTokenClassification", "RobertaForMaskedLM", "BertForPreTraining"])
def test_a_loss_over_padding_reads_padding(name) -> None:
    ours, theirs = pair(name)
    labels = torch.where(KEEP, 1, -100)
    more = {"next_sentence_label": torch.tensor([0, 1, 0, 1])} if name == "BertForPreTraining" else {}
    assert compare(ours, theirs, batch_of(labels=labels, **more), KEEP) == PACKED
    labels[1, 6] = 0
    assert compare(ours, theirs, batch_of(labels=labels, **more)) == []


def test_the_discriminator_leaves_padding_out_of_its_loss() -> None:
    name = "ElectraForPreTraining"
    assert compare(*pair(name), inputs_of(name, RIGHT) | {"labels": torch.ones(4, 7)}, KEEP) == PACKED


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("cls_only", [False, True])
def test_gradient_checkpointing(reentrant, cls_only) -> None:
    theirs = build("BertForSequenceClassification").train()
    ours = copy.deepcopy(theirs)
    fuse(ours, unpad=True, cls_only=cls_only)
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ours.enable_input_require_grads()
    with watched() as shapes:
        a = ours(**batch_of()).logits
        expected = [PACKED[0], (4,)] if cls_only else PACKED
        assert shapes == expected
        a.square().sum().backward()
        assert len(shapes) == 4, "nothing was computed again"
    b = theirs(**batch_of()).logits
    b.square().sum().backward()
    assert difference(a, b) <= TOLERANCE
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)


def test_chunked_feed_forward_is_left_alone() -> None:
    theirs = build("BertModel", chunk_size_feed_forward=7)
    ours = copy.deepcopy(theirs)
    assert "chunk_size_feed_forward" in fuse(ours, unpad=True).skipped["encoder"]
    assert compare(ours, theirs, batch_of()) == []


@pytest.mark.parametrize("cls_only", [False, True])
def test_attention_of_the_users_own_runs_dense(cls_only) -> None:
    """Also what it sees of padding is its own business."""

    def attend(module, query, key, value, attention_mask, **options):
        assert query.shape[2] == key.shape[2] == 7
        return value.mean(2, keepdim=True).expand_as(value).transpose(1, 2).contiguous(), None

    AttentionInterface.register("of_my_own", attend)
    theirs = build("BertModel")
    theirs.set_attn_implementation("of_my_own")
    ours = copy.deepcopy(theirs)
    fuse(ours, unpad=True, cls_only=cls_only)
    assert compare(ours, theirs, batch_of()) == []
    del AttentionInterface._global_mapping["of_my_own"]


def uniform(module, query, key, value, attention_mask, **options):
    return value.mean(2, keepdim=True).expand_as(value).transpose(1, 2).contiguous(), None


@pytest.mark.parametrize("cls_only", [False, True])
@pytest.mark.parametrize("way", ["sdpa", "eager", "a registered eager"])
def test_attention_replaced_under_its_own_name(way, cls_only, monkeypatch) -> None:
    theirs = build("BertModel", way.split()[-1])
    ours = copy.deepcopy(theirs)
    fuse(ours, unpad=True, cls_only=cls_only)
    if way == "eager":
        monkeypatch.setattr(modeling_bert, "eager_attention_forward", uniform)
    else:
        monkeypatch.setitem(AttentionInterface._global_mapping, way.split()[-1], uniform)
    assert compare(ours, theirs, batch_of()) == []
    assert "is not transformers' own" in fuse(ours, unpad=True, cls_only=cls_only).skipped["encoder"]
    monkeypatch.undo()
    monkeypatch.setenv("BERT_FUSED_DISABLE", "1")
    fuse(ours, unpad=True)
    assert compare(ours, theirs, batch_of(), KEEP) == PACKED


def test_autocast() -> None:
    ours, theirs = pair()
    with torch.autocast("cpu", torch.bfloat16), watched() as shapes:
        mine, other = ours(**batch_of())[0][KEEP], theirs(**batch_of())[0][KEEP]
    assert shapes == PACKED
    assert mine.dtype == other.dtype
    exact = theirs(**batch_of())[0][KEEP]
    errors = [float((out - exact).detach().square().mean()) for out in (mine, other)]
    assert errors[0] <= 1.2 * errors[1]


def test_half_precision() -> None:
    ours, theirs = pair()
    exact = theirs(**batch_of())[0][KEEP]
    mine, other = (m.to(torch.bfloat16)(**batch_of())[0][KEEP].float() for m in (ours, theirs))
    errors = [float((out - exact).detach().square().mean()) for out in (mine, other)]
    assert errors[0] <= 1.2 * errors[1]


def test_attention_dropout_is_applied_in_training_only(monkeypatch) -> None:
    ours, _ = pair(attention_probs_dropout_prob=0.5)
    seen = []
    sdpa = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: seen.append(k["dropout_p"]) or sdpa(*a, **k))
    ours(**batch_of())
    ours.train()(**batch_of())
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
def test_attention_as_on_a_gpu(way, pattern, name, monkeypatch) -> None:
    if way == "varlen":
        monkeypatch.setattr(packing, "varlen_attn", reference_varlen)
        monkeypatch.setattr(packing, "varlen_serves", lambda query, dropout: True)
    else:
        monkeypatch.setattr(packing, "_by_length", packing._padded)
    ours, theirs = pair(name)
    mask = mask_of(pattern)
    keep = mask.bool()
    shapes = compare(ours, theirs, inputs_of(name, mask), keep)
    if name == "ElectraModel":
        assert shapes == [(int(keep.sum()),)] * 2
    elif pattern == "right":
        assert shapes == [PACKED[0], (4,)]
    for model in (ours, theirs):
        out = model(**inputs_of(name, mask))[0]
        (out[keep] if name == "ElectraModel" else out).square().sum().backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4)


def test_what_varlen_serves(monkeypatch) -> None:
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


@pytest.mark.parametrize("extra", [{"is_causal": True}, {"unheard_of": torch.ones(2)}])
def test_arguments_that_attention_may_heed(extra) -> None:
    ours, theirs = pair()
    assert compare(ours, theirs, batch_of() | extra, KEEP) == []
    assert compare(ours, theirs, batch_of() | {"num_items_in_batch": torch.tensor(3)}, KEEP) == PACKED
