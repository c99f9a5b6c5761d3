"""Hooks and recorded outputs of a fused encoder: they see what they always saw, and the encoder packs otherwise."""

import pytest
from encoders import BATCH, FIRST, PACKED, compare, pair
from torch import nn


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_recorded_outputs_are_dense_and_leave_no_trace(attention) -> None:
    for name, packed in (("BertModel", PACKED), ("BertForSequenceClassification", FIRST)):
        ours, theirs = pair(name, attention)
        assert compare(ours, theirs, BATCH, output_hidden_states=True) == []
        if attention == "eager":
            assert compare(ours, theirs, BATCH, output_attentions=True) == []
        # transformers' hooks stay on the layers, and are not the user's.
        layers = [m for m in ours.modules() if type(m).__name__ == "BertLayer"]
        assert all(layer._forward_hooks for layer in layers)
        assert compare(ours, theirs) == packed
        for model in (ours, theirs):
            model.config.output_hidden_states = True
        assert compare(ours, theirs) == []


HOOKED = (
    "encoder.layer.0",
    "encoder.layer.1.attention",
    "encoder.layer.0.attention.self.query",
    "encoder.layer.1.output.LayerNorm",
)


@pytest.mark.parametrize("where", HOOKED)
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_hooks_inside_an_encoder_see_the_shapes_of_the_unfused_one(where, kind) -> None:
    ours, theirs = pair()
    seen = {}
    handles = []
    for model in (ours, theirs):
        shapes = seen.setdefault(id(model), [])

        def look(*arguments, shapes=shapes) -> None:
            last = arguments[-1][0] if isinstance(arguments[-1], tuple) else arguments[-1]
            shapes.append(tuple(last.shape))

        handles.append(getattr(model.get_submodule(where), kind)(look))
    assert compare(ours, theirs) == []
    for model in (ours, theirs):
        model(**BATCH)[0].square().sum().backward()
    assert seen[id(ours)] == seen[id(theirs)] != []
    handles[0].remove()
    assert compare(ours, theirs) == PACKED


def test_global_hooks_run_dense() -> None:
    ours, theirs = pair()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(type(m).__name__))
    try:
        assert compare(ours, theirs) == []
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
    assert compare(ours, theirs) == PACKED
    assert shapes == [(4, 7, 32)]
    look.remove()
    assert compare(ours, theirs) == FIRST
