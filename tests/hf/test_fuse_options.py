"""Options of ``fuse``: what is refused, what a later call takes back, and what ``verify`` compares under them."""

import pytest
import torch
from encoders import build, inputs_of, mask_of, watched
from torch import nn

from bert_fused import fuse, fused, unfuse, verify
from bert_fused.hf import verify as verification
from bert_fused.unpad.encoder import FusedEncoder

RIGHT = mask_of("right")


@pytest.fixture(autouse=True)
def _plain_kernels(monkeypatch) -> None:
    monkeypatch.setenv("BERT_FUSED_DISABLE", "1")


def hooks_of(model: nn.Module) -> list[int]:
    return [len(module._forward_pre_hooks) for module in model.modules()]


@pytest.mark.parametrize("name", ["recompute_preact", "unpad", "cls_only", "skip_pooler"])
@pytest.mark.parametrize("value", [1, None, torch.tensor([1, 2])], ids=["int", "None", "tensor"])
def test_options_that_are_not_bools_are_type_errors(name, value) -> None:
    model = build("BertModel")
    for function in (fuse, lambda *args, **kwargs: fused(*args, **kwargs).__enter__()):
        with pytest.raises(TypeError, match=f"{name} must be a bool, got {type(value).__name__}"):
            function(model, **{name: value})
    assert not isinstance(model.encoder, FusedEncoder)


def test_options_that_are_other_strings_are_refused() -> None:
    with pytest.raises(ValueError, match="cls_only must be True, False or 'auto', got 'always'"):
        fuse(build("BertModel"), cls_only="always")
    with pytest.raises(TypeError, match="unpad must be a bool, got str"):
        fuse(build("BertModel"), unpad="no")


def test_fuse_takes_back_an_option_that_a_later_call_does_not_grant() -> None:
    model = build("BertModel")
    hooks = hooks_of(model)
    fuse(model, cls_only=True)
    assert model(**inputs_of("BertModel", RIGHT)).last_hidden_state.shape[1] == 1
    report = fuse(model, cls_only="auto")
    assert "encoder" in report.skipped
    assert model(**inputs_of("BertModel", RIGHT)).last_hidden_state.shape[1] == 7
    assert hooks_of(model) == hooks


def test_options_behind_a_hook_do_not_come_back_with_its_removal() -> None:
    model = build("BertModel")
    fuse(model, unpad=True, cls_only=True)
    hook = model.encoder.layer[0].register_forward_hook(lambda *args: None)
    assert "hooks" in fuse(model, unpad=True).skipped["encoder"]
    hook.remove()
    with watched() as shapes:
        assert model(**inputs_of("BertModel", RIGHT)).last_hidden_state.shape[1] == 7
    assert shapes == []


def test_plain_fuse_takes_the_hooks_away() -> None:
    model = build("BertForSequenceClassification")
    hooks = hooks_of(model)
    fuse(model, unpad=True, cls_only="auto")
    assert hooks_of(model) != hooks
    fuse(model)
    assert hooks_of(model) == hooks
    unfuse(model)


def test_a_skip_that_is_false_on_the_instance_leaves_the_pooler_in() -> None:
    model = build("BertModel")
    fuse(model)
    model.pooler.skip = False
    assert model(**inputs_of("BertModel", RIGHT)).pooler_output is not None


def test_a_pooler_that_cannot_be_skipped_is_read() -> None:
    model, theirs = build("BertModel"), build("BertModel")
    for each in (model, theirs):
        each.pooler.dense.register_forward_hook(lambda *args: None)
    report = fuse(model, unpad=True, skip_pooler=True)
    assert "hooks" in report.skipped["pooler"]
    assert "dense where position 0" in report.paths["encoder"]
    batch = inputs_of("BertModel", mask_of("left"))
    torch.testing.assert_close(model(**batch).pooler_output, theirs(**batch).pooler_output)


def test_verify_leaves_out_a_skipped_pooler() -> None:
    model = build("BertModel")
    fuse(model, unpad=True, skip_pooler=True)
    for return_dict in (True, False):
        verified = verify(model, **inputs_of("BertModel", RIGHT), return_dict=return_dict)
        assert verified.outputs == 1
        assert verified.max_abs_error < 1e-5


@pytest.mark.parametrize("name", ["BertModel", "BertForSequenceClassification"])
def test_verify_takes_features_and_labels_for_no_tokens(name, monkeypatch) -> None:
    """As many of them as positions, and an error where the mask has padding."""
    length = {"BertModel": 32, "BertForSequenceClassification": 7}[name]
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, 3:] = 0
    model = build(name, num_labels=7)
    fuse(model, unpad=True)
    outputs, calls = verification.outputs_of, []

    def wrong_once(*args):
        found = outputs(*args)
        calls.append(found)
        last = found[list(found)[-1]]
        assert last.shape == mask.shape
        if len(calls) == 1:
            last[1, -1] += 100
        return found

    monkeypatch.setattr(verification, "outputs_of", wrong_once)
    assert verify(model, **inputs_of(name, mask)).max_abs_error > 99


def test_verify_leaves_out_the_discriminators_padding() -> None:
    model = build("ElectraForPreTraining")
    fuse(model, unpad=True)
    assert verify(model, **inputs_of("ElectraForPreTraining", RIGHT)).max_abs_error < 1e-5
