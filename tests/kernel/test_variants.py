"""The forward kernel where blocks stay for many tiles, and store each in one piece or in slices."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from interpreter import Sanitizer
from reference64 import (
    ACTIVATIONS,
    DTYPES,
    act64,
    act_grad64,
    assert_forward,
    assert_grad,
    assert_no_worse_than_eager,
    dtype_name,
    generator,
    linear64,
    make_inputs,
    shape_name,
)

from bert_fused import ops
from bert_fused.kernels import linear_act
from bert_fused.kernels.configs import Config
from bert_fused.kernels.linear_act import linear_act_fwd
from bert_fused.reference import linear_act as eager

pytestmark = pytest.mark.usefixtures("poisoned_empty")

all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)

# 3 x 5 tiles with 7 steps of K: no number of blocks divides them. TMA needs multiples of 8.
RAGGED = (37, 136, 200)

_persistent = Config("tma", "float16", 16, 32, 32, num_warps=1, num_stages=1, group_m=2, persistent=1)
VARIANTS = {
    "persistent": _persistent,
    "persistent-2": dataclasses.replace(_persistent, persistent=2),
    "subtiles2": dataclasses.replace(_persistent, subtiles=2),
    "subtiles4": dataclasses.replace(_persistent, block_n=64, subtiles=4),
}
variants = pytest.mark.parametrize("variant", VARIANTS)


def config_of(variant: str, dtype: torch.dtype) -> Config:
    return dataclasses.replace(VARIANTS[variant], dtype=dtype_name(dtype))


@pytest.mark.parametrize(
    ("variant", "activation"),
    [(variant, "gelu") for variant in VARIANTS]
    + [("subtiles2", activation) for activation in ACTIVATIONS if activation != "gelu"],
)
@all_dtypes
def test_every_element_within_the_bound(variant: str, dtype: torch.dtype, activation: str) -> None:
    i = make_inputs("unit", *RAGGED, dtype)
    config = config_of(variant, dtype)
    out, preact = linear_act_fwd(i.x, i.weight, i.bias, activation=activation, save_preact=True, config=config)
    assert preact is not None
    assert_forward(out, i.x, i.weight, i.bias, activation)
    assert_forward(preact, i.x, i.weight, i.bias, "none", "preact")
    if dtype != torch.float32:
        ref = act64(linear64(i.x, i.weight, i.bias), activation)
        assert_no_worse_than_eager(out, eager(i.x, i.weight, i.bias, activation), ref)
    alone, _ = linear_act_fwd(i.x, i.weight, i.bias, activation=activation, save_preact=False, config=config)
    assert torch.equal(alone, out)


@pytest.mark.parametrize("bias", [False, True], ids=["nobias", "bias"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (16, 32, 32), (21, 72, 40), (64, 64, 104), (5, 264, 256)], ids=shape_name)
@variants
def test_integers_are_exact(variant: str, shape: tuple[int, int, int], bias: bool) -> None:
    """From one tile, fewer than there are blocks, to many; K ragged."""
    i = make_inputs("integers", *shape, torch.float16, bias=bias)
    config = config_of(variant, torch.float16)
    out, preact = linear_act_fwd(i.x, i.weight, i.bias, activation="relu", save_preact=True, config=config)
    ref = linear64(i.x, i.weight, i.bias)
    assert preact is not None
    assert torch.equal(preact.double(), ref)
    assert torch.equal(out.double(), ref.clamp_min(0))


@pytest.mark.parametrize("save_preact", [False, True], ids=["out", "out+preact"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (19, 72, 40), (40, 72, 96)], ids=shape_name)
@variants
def test_memory(sanitized: Sanitizer, variant: str, shape: tuple[int, int, int], save_preact: bool) -> None:
    """Nothing outside the tensors is touched; outputs are written exactly once."""
    i = make_inputs("unit", *shape, torch.float16)
    config = config_of(variant, torch.float16)
    out, _ = linear_act_fwd(i.x, i.weight, i.bias, activation="gelu", save_preact=save_preact, config=config)
    assert_forward(out, i.x, i.weight, i.bias, "gelu")
    (launch,) = sanitized.launches
    assert launch.stored == dict.fromkeys(["out_ptr", "preact_ptr"][: 1 + save_preact], out.numel())


@variants
def test_nan_stays_in_its_row_and_column(variant: str) -> None:
    i = make_inputs("unit", *RAGGED, torch.float16)
    expected = torch.zeros(37, 136, dtype=torch.bool)
    i.x[36, 199] = i.weight[135, 1] = float("nan")
    expected[36] = expected[:, 135] = True
    config = config_of(variant, torch.float16)
    out, preact = linear_act_fwd(i.x, i.weight, i.bias, activation="gelu", save_preact=True, config=config)
    assert preact is not None
    assert torch.equal(out.isnan(), expected)
    assert torch.equal(preact.isnan(), expected)


@pytest.mark.parametrize("activation", ["gelu", "relu", "none"])
@pytest.mark.parametrize("variant", ["persistent", "subtiles2"])
@all_dtypes
def test_gradients(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, variant: str, activation: str) -> None:
    """What a variant saves for the backward pass is what it should be."""
    monkeypatch.setattr(linear_act, "get_config", lambda *args, **kwargs: config_of(variant, dtype))
    i = make_inputs("unit", *RAGGED, dtype)
    assert i.bias is not None
    d_out = torch.randn(37, 136, generator=generator(2)).to(dtype)

    def grads(function: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in (i.x, i.weight, i.bias)]
        function(*leaves, activation).backward(d_out)
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    d_preact = d_out.double() * act_grad64(linear64(i.x, i.weight, i.bias), activation)
    refs = (d_preact @ i.weight.double(), d_preact.t() @ i.x.double(), d_preact.sum(0))
    for name, actual, baseline, ref in zip(
        ("d_x", "d_weight", "d_bias"), grads(ops.linear_act), grads(eager), refs, strict=True
    ):
        assert_grad(actual, baseline, ref, name)
