"""Fused encoders against Hugging Face's: every family, head, mask and attention, outputs and gradients."""

import pytest
import torch
from encoders import (
    GRADIENT_TOLERANCE,
    MODELS,
    PATTERNS,
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
from torch import nn

from bert_fused import fuse


def is_packed(reads: str, keep: torch.Tensor) -> bool:
    """Whether a batch must have been packed: some but not all is padding, and none of it is read."""
    if keep.all() or not keep.any() or reads == "all":
        return False
    return reads == "tokens" or bool(keep[:, 0].all())


def outputs(model, reads: str, batch: dict, keep: torch.Tensor) -> list[torch.Tensor]:
    """What of a model's output must be Hugging Face's: everything, but of what is per token only the real tokens."""
    results = []
    for value in model(**batch).values():
        per_token = value.shape[:2] == keep.shape and reads not in ("first", "all")
        results.append(value[keep] if per_token else value)
    return results


def assert_same_gradients(ours: nn.Module, theirs: nn.Module) -> None:
    """To the tolerance of the largest gradient in the model."""
    pairs = [(name, p.grad, q.grad) for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True)]
    largest = max(float(b.abs().max()) for _, _, b in pairs if b is not None)
    for name, a, b in pairs:
        assert (a is None) == (b is None), name
        if b is not None:
            assert float((a - b).abs().max()) <= GRADIENT_TOLERANCE * max(1.0, largest), name


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_fused_encoders_give_hugging_faces_outputs_and_gradients(name, attention) -> None:
    reads = MODELS[name]
    ours, theirs = pair(name, attention, unpad=True, cls_only="auto")
    report = fuse(ours, unpad=True, cls_only="auto")
    assert any(where.endswith("encoder") for where in report.fused) == (reads != "all"), report
    # The eager attentions of the families differ in their home only.
    patterns = PATTERNS if attention == "sdpa" or name.startswith("Bert") else ("right", "left")
    for pattern in patterns:
        batch = inputs_of(name, mask_of(pattern))
        keep = mask_of(pattern).bool()
        for training in (False, True):
            for model in (ours, theirs):
                model.train(training)
                model.zero_grad()
            with watched() as shapes:
                mine = outputs(ours, reads, batch, keep)
            other = outputs(theirs, reads, batch, keep)
            packed, cls_only = is_packed(reads, keep), reads == "first" and not training
            last = ((4,) if packed else (4, 1)) if cls_only else (int(keep.sum()),)
            expected = ([(int(keep.sum()),)] if packed else []) + ([last] if packed or cls_only else [])
            assert shapes == expected, (pattern, training)
            for a, b in zip(mine, other, strict=True):
                assert difference(a, b) <= TOLERANCE, (pattern, training)
            sum(a.square().sum() for a in mine).backward()
            sum(b.square().sum() for b in other).backward()
            assert_same_gradients(ours, theirs)


def test_hidden_states_are_zero_at_padding_and_finite() -> None:
    model = build("ElectraModel")
    fuse(model, unpad=True)
    for pattern in ("right", "left", "interior", "empty row"):
        batch = inputs_of("ElectraModel", mask_of(pattern))
        hidden = model(**batch).last_hidden_state
        assert (hidden[batch["attention_mask"] == 0] == 0).all()
        assert (hidden[batch["attention_mask"] == 1] != 0).any(-1).all()


MODELS_OF_HYPOTHESIS = {name: pair(name, unpad=True) for name in ("BertModel", "ElectraModel")}


@pytest.mark.parametrize("name", MODELS_OF_HYPOTHESIS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_mask_gives_hugging_faces_outputs(name, data) -> None:
    batch, sequence = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 9))
    row = st.lists(st.integers(0, 1), min_size=sequence, max_size=sequence)
    mask = torch.tensor(data.draw(st.lists(row, min_size=batch, max_size=batch)))
    keep = mask.bool()
    ours, theirs = MODELS_OF_HYPOTHESIS[name]
    inputs = inputs_of(name, mask)
    with torch.no_grad(), watched() as shapes:
        mine = ours(**inputs)
    with torch.no_grad():
        other = theirs(**inputs)
    assert shapes == [(int(keep.sum()),)] * 2 * is_packed(MODELS[name], keep)
    if keep.any():
        assert difference(mine.last_hidden_state[keep], other.last_hidden_state[keep]) <= TOLERANCE
    if name == "BertModel":
        assert difference(mine.pooler_output, other.pooler_output) <= TOLERANCE
