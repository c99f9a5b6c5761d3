"""Masks and arguments of a call: which let a fused encoder pack, and which make it run dense."""

import copy
import functools

import pytest
import torch
import transformers
from encoders import (
    BATCH,
    FIRST,
    KEEP,
    PACKED,
    RIGHT,
    compare,
    inputs_of,
    mask_of,
    pair,
)

from bert_fused import fuse


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_a_mask_of_any_dtype_packs_by_keyword_and_by_position(dtype) -> None:
    ours, theirs = pair()
    mask = RIGHT.to(dtype) * (1 if dtype is torch.bool else 3)
    assert compare(ours, theirs, BATCH | {"attention_mask": mask}) == PACKED
    assert compare(ours, theirs, {}, BATCH["input_ids"], mask) == PACKED
    roberta = pair("RobertaForMultipleChoice")
    batch = inputs_of("RobertaForMultipleChoice", RIGHT)
    assert compare(*roberta, {}, batch["input_ids"], None, batch["attention_mask"]) == FIRST


def test_a_call_without_a_mask_runs_dense() -> None:
    assert compare(*pair(), {"input_ids": BATCH["input_ids"]}) == []


def four_dimensional(kind: str) -> torch.Tensor:
    rows = KEEP[:, None, None, :].expand(4, 1, 7, 7)
    lowest = torch.finfo(torch.float32).min
    by_query = rows.clone()
    by_query[1, 0, 2, 1] = False
    return {
        "bool": rows,
        "bool, one row": rows[:, :, :1],
        "lowest": torch.where(rows, 0.0, lowest),
        "-inf": torch.where(rows, 0.0, float("-inf")),
        "-10000": torch.where(rows, 0.0, -10000.0),
        "a bias": torch.where(rows, 0.5, lowest),
        "by query": by_query,
        "by query, float": torch.where(by_query, 0.0, lowest),
        "by head": rows.expand(4, 4, 7, 7),
    }[kind]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "kind", ["bool", "bool, one row", "lowest", "-inf", "-10000", "a bias", "by query", "by query, float", "by head"]
)
def test_four_dimensional_masks_run_dense(kind, attention) -> None:
    ours, theirs = pair("BertModel", attention)
    assert compare(ours, theirs, BATCH | {"attention_mask": four_dimensional(kind)}) == []


def test_a_later_pre_hook_on_the_model_runs_dense() -> None:
    ours, theirs = pair()

    def change(module, args, kwargs):
        return args, kwargs | {"attention_mask": mask_of("interior")}

    for model in (ours, theirs):
        model.register_forward_pre_hook(change, with_kwargs=True)
    assert compare(ours, theirs) == []


@pytest.mark.parametrize("name", ["BertModel", "BertForSequenceClassification"])
@pytest.mark.parametrize("cls_only", [False, "auto"])
def test_a_pre_hook_on_the_encoder_runs_dense_until_removed(name, cls_only) -> None:
    ours, theirs = pair(name, unpad=True, cls_only=cls_only)

    def change(module, args, kwargs):
        return args, kwargs | {"attention_mask": mask_of("interior").bool()[:, None, None].expand(4, 1, 7, 7)}

    handles = [m.base_model.encoder.register_forward_pre_hook(change, with_kwargs=True) for m in (ours, theirs)]
    assert compare(ours, theirs) == []
    report = fuse(ours, unpad=True, cls_only=cls_only)
    assert "may change its mask" in next(reason for at, reason in report.skipped.items() if at.endswith("encoder"))
    for handle in handles:
        handle.remove()
    fuse(ours, unpad=True)
    assert compare(ours, theirs) == PACKED


def ignore_the_mask(self, attention_mask, encoder_attention_mask, **kwargs):
    return None, encoder_attention_mask


class Unmasked(transformers.BertModel):
    """Its ``forward`` is inherited."""

    _create_attention_masks = ignore_the_mask


@pytest.mark.parametrize("where", ["class", "instance"])
def test_a_model_with_its_own_mask_method_runs_dense(where) -> None:
    ours, theirs = pair()
    if where == "class":
        theirs = Unmasked(ours.config).eval()
        theirs.load_state_dict(ours.state_dict())
        ours = copy.deepcopy(theirs)
        fuse(ours, unpad=True)
    else:
        for model in (ours, theirs):
            model._create_attention_masks = functools.partial(ignore_the_mask, model)
    assert compare(ours, theirs) == []


@pytest.mark.parametrize("name", ["BertForTokenClassification", "RobertaForMaskedLM", "BertForPreTraining"])
def test_a_loss_over_padding_runs_dense(name) -> None:
    ours, theirs = pair(name)
    labels = torch.where(KEEP, 1, -100)
    more = {"next_sentence_label": torch.tensor([0, 1, 0, 1])} if name == "BertForPreTraining" else {}
    assert compare(ours, theirs, BATCH | more | {"labels": labels}) == PACKED
    labels[1, 6] = 0
    assert compare(ours, theirs, BATCH | more | {"labels": labels}) == []


def test_the_discriminators_loss_leaves_padding_out_and_packs() -> None:
    assert compare(*pair("ElectraForPreTraining"), BATCH | {"labels": torch.ones(4, 7)}) == PACKED


@pytest.mark.parametrize("extra", [{"is_causal": True}, {"unheard_of": torch.ones(2)}])
def test_arguments_that_attention_may_heed_run_dense(extra) -> None:
    ours, theirs = pair()
    assert compare(ours, theirs, BATCH | extra) == []
    assert compare(ours, theirs, BATCH | {"num_items_in_batch": torch.tensor(3)}) == PACKED
