"""``cls_only``: when the last layer computes position 0 alone."""

import pytest
import torch
from encoders import BATCH, FIRST, PACKED, TOLERANCE, compare, difference, inputs_of, mask_of, pair, watched

from bert_fused import fuse, verify


def test_the_model_under_a_head_called_directly_runs_dense() -> None:
    ours, theirs = pair("BertForSequenceClassification")
    fuse(ours, cls_only="auto")
    assert compare(ours.bert, theirs.bert) == []
    assert compare(ours, theirs) == [(4, 1)]
    ours.train(), theirs.train()
    assert compare(ours, theirs) == []


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_position_0_sees_what_its_own_row_of_the_mask_says(attention) -> None:
    ours, theirs = pair("BertModel", attention, cls_only=True)
    causal = torch.ones(4, 1, 7, 7).tril()
    mask = torch.where(causal.bool(), 0.0, torch.finfo(torch.float32).min)
    batch = {"input_ids": BATCH["input_ids"], "attention_mask": mask}
    with watched() as shapes:
        mine = ours(**batch).last_hidden_state
    assert shapes == [(4, 1)]
    assert difference(mine, theirs(**batch).last_hidden_state[:, :1]) <= TOLERANCE


@pytest.mark.parametrize("name", ["BertModel", "ElectraModel"])
@pytest.mark.parametrize("unpad", [False, True])
def test_cls_only_true_computes_position_0_alone(name, unpad) -> None:
    ours, theirs = pair(name, unpad=unpad, cls_only=True)
    report = fuse(ours, unpad=unpad, cls_only=True)
    assert "position 0 only" in report.paths["encoder"]
    for training in (False, True):
        for pattern in ("right", "left", "empty row"):
            batch = inputs_of(name, mask_of(pattern))
            with watched() as shapes:
                mine = ours.train(training)(**batch)
            other = theirs.train(training)(**batch)
            packed = unpad and pattern == "right"
            assert shapes == (FIRST if packed else [(4, 1)])
            assert mine.last_hidden_state.shape == (4, 1, 32)
            assert difference(mine.last_hidden_state, other.last_hidden_state[:, :1]) <= TOLERANCE
            if name == "BertModel":
                assert difference(mine.pooler_output, other.pooler_output) <= TOLERANCE
    assert verify(ours, **BATCH).max_abs_error < TOLERANCE


def test_cls_only_true_is_refused_under_a_head_that_reads_every_token() -> None:
    ours, theirs = pair("BertForTokenClassification", cls_only=True)
    report = fuse(ours, cls_only=True)
    assert "BertForTokenClassification reads every position" in report.skipped["bert.encoder"]
    assert compare(ours, theirs) == []
    report = fuse(ours, cls_only=True, unpad=True)
    assert "no work on padding" in report.paths["bert.encoder"]
    assert compare(ours, theirs) == PACKED
    fuse(ours.bert, cls_only=True, unpad=True)
    assert compare(ours, theirs) == PACKED
