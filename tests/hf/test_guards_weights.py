"""Weights of a fused block that are moved, changed, tied, cast or loaded."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from blocks import (
    KERNELS,
    PYTORCH,
    assert_runs,
    change_both,
    every_kind,
    fused_twins,
    hidden_states,
    linear,
    step,
    twins,
)
from models import SIZES, assert_same, inputs, make
from torch import nn
from transformers import BertConfig, BertModel

from bert_fused import fuse


@pytest.mark.parametrize("name", ["weight", "bias"])
@every_kind
def test_a_weight_on_another_device_is_an_error(kind: str, name: str, launches: list[str]) -> None:
    """PyTorch returns memory that nobody wrote here."""
    ours, _ = twins(kind)
    fused = copy.deepcopy(ours)
    fuse(fused)
    for block in (ours, fused):
        setattr(linear(block), name, nn.Parameter(getattr(linear(block), name).to("meta")))
        assert "it is on the meta device" in fuse(block).skipped[""]
    with pytest.raises(ValueError, match=f"{name} is on meta, but x is on cpu"):
        fused(hidden_states())
    assert launches == PYTORCH


def test_a_model_on_meta_is_fused_once_loaded(launches: list[str]) -> None:
    ids = torch.ones(1, 3, dtype=torch.long, device="meta")
    with torch.device("meta"):
        born = BertModel(BertConfig(**SIZES)).eval()
    assert "it is on the meta device" in fuse(born).skipped["pooler"]
    moved = make()
    fuse(moved)
    moved.to("meta")
    for model in (born, moved):
        out = model(input_ids=ids)
        assert out[0].shape == (1, 3, 32)
        assert out[0].is_meta
    assert launches == PYTORCH
    born.to_empty(device="cpu").load_state_dict(make().state_dict())
    for name, buffer in make().named_buffers():  # some are in no state_dict
        born.get_buffer(name).copy_(buffer)
    assert len(fuse(born).fused) == 3
    assert_same(born(**inputs()), make()(**inputs()))
    assert launches == 3 * ["linear_act_fwd"]


def trained(block: nn.Module) -> None:
    step(block, hidden_states())
    torch.optim.SGD(block.parameters(), lr=0.1).step()


@torch.no_grad()
def shifted(block: nn.Module) -> None:
    linear(block).bias.add_(1)


def loaded(block: nn.Module, assign: bool) -> None:
    block.load_state_dict({name: tensor.flip(0) * 2 for name, tensor in block.state_dict().items()}, assign=assign)


# Name -> what is done to a block after its first call.
CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "weight in place": lambda b: linear(b).weight.data.mul_(2),
    "bias in place": shifted,
    "other memory": lambda b: setattr(linear(b).weight, "data", linear(b).weight.data.flip(0)),
    "a new parameter": lambda b: setattr(
        linear(b), "weight", nn.Parameter(linear(b).weight.detach().t().contiguous().t() / 3)
    ),
    "a step of training": trained,
    "no bias": lambda b: setattr(linear(b), "bias", None),
    "loaded": lambda b: loaded(b, assign=False),
    "loaded and assigned": lambda b: loaded(b, assign=True),
}


@every_kind
def test_weights_changed_after_the_first_call_are_used(kind: str, launches: list[str]) -> None:
    for change in CHANGES.values():
        ours, theirs = fused_twins(kind)
        assert_runs(KERNELS, ours, theirs, launches)
        change_both(ours, theirs, change)
        assert_runs(KERNELS, ours, theirs, launches)


@every_kind
def test_a_cast_block_runs_kernels_in_each_dtype_but_double(kind: str, launches: list[str]) -> None:
    ours, theirs = fused_twins(kind)
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float32):
        change_both(ours, theirs, lambda block, dtype=dtype: block.to(dtype))
        assert_runs(PYTORCH if dtype is torch.float64 else KERNELS, ours, theirs, launches, hidden_states(dtype))


def test_tied_weights_get_hugging_faces_gradients(launches: list[str]) -> None:
    eager, model = make(), make()
    for m in (eager, model):
        m.encoder.layer[1].intermediate.dense.weight = m.encoder.layer[0].intermediate.dense.weight
    fuse(model)
    for _ in range(2):
        launches.clear()
        results = []
        for m in (eager, model):
            m.zero_grad()
            out = m(**inputs())
            out[0].square().sum().backward()
            results.append((out, m.encoder.layer[0].intermediate.dense.weight.grad))
            m.encoder.layer[0].intermediate.dense.weight.data.mul_(2)
        assert launches == [*3 * ["linear_act_fwd"], *2 * ["act_bwd"]]
        (theirs, expected), (ours, gradient) = results
        assert_same(ours, theirs)
        assert float((gradient - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
