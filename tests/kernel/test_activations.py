"""Each activation and its derivative alone: K = 1, weight 1, bias 0, so that nothing is accumulated."""

import pytest
import torch
from reference64 import (
    ACTIVATIONS,
    DTYPES,
    UNDERFLOW,
    act64,
    act_grad64,
    assert_within,
    dtype_name,
    grad_bound,
    rounding_bound,
    saved_grad64,
)

from bert_fused.kernels.configs import Config
from bert_fused.kernels.elementwise import BLOCK_N, act_bwd
from bert_fused.kernels.linear_act import linear_act_fwd

pytestmark = pytest.mark.usefixtures("poisoned_empty")

all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
DIFFERENTIABLE = [activation for activation in ACTIVATIONS if activation != "none"]


def sweep(dtype: torch.dtype) -> torch.Tensor:
    """All numbers of a 16-bit dtype up to 16, where every activation has long reached its limit; a grid in fp32."""
    if dtype == torch.float32:
        tiny = torch.tensor([1.4e-45, 1e-40, 1.1754944e-38, 1e-30, 1e-10])
        return torch.cat([torch.linspace(-10, 10, 20001), torch.tensor([0.0, -0.0]), tiny, -tiny])
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    return values[values.abs() <= 16]


def bound(ref: torch.Tensor, z: torch.Tensor, activation: str) -> torch.Tensor:
    """The promise for a call that computes one element only: no other makes its error look small."""
    # fp16's smallest number is in the bound already: twice would hide bf16's polynomial in its place.
    smallest = 0.0 if z.dtype == torch.float16 else torch.finfo(z.dtype).smallest_normal * torch.finfo(z.dtype).eps
    return rounding_bound(ref, z.dtype, activation) + 2.0**-23 * (1 + 1 / 16) * z.double().abs() + smallest


def forward(z: torch.Tensor, activation: str) -> torch.Tensor:
    one, zero = torch.ones(1, 1, dtype=z.dtype), torch.zeros(1, dtype=z.dtype)
    config = Config("pointer", dtype_name(z.dtype), 1024, 16, 16, num_warps=1, num_stages=1)
    args = (z.view(-1, 1), one, zero)
    return linear_act_fwd(*args, activation=activation, save_preact=False, config=config)[0].view(-1)


def derivative(saved: torch.Tensor, activation: str) -> torch.Tensor:
    # Whole tiles: the interpreter's time is per tile, not per element.
    tiles = torch.nn.functional.pad(saved, (0, -len(saved) % BLOCK_N)).view(-1, BLOCK_N)
    d_preact, _ = act_bwd(torch.ones_like(tiles), tiles, activation=activation, bias_grad=False)
    return d_preact.view(-1)[: len(saved)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@all_dtypes
def test_activations_are_within_the_bound_over_a_sweep(dtype: torch.dtype, activation: str) -> None:
    z = sweep(dtype)
    ref = act64(z, activation)
    assert_within(forward(z, activation), ref, bound(ref, z, activation))


@pytest.mark.parametrize("activation", DIFFERENTIABLE)
@all_dtypes
def test_derivatives_are_within_the_bound_over_a_sweep(dtype: torch.dtype, activation: str) -> None:
    z = sweep(dtype)
    saved = act64(z, activation).to(dtype) if activation in ("relu", "tanh") else z
    ref = saved_grad64(saved, activation)
    assert_within(derivative(saved, activation), ref, grad_bound(ref, torch.ones_like(z), activation))


@all_dtypes
def test_the_sweeps_tell_erf_from_tanh(dtype: torch.dtype) -> None:
    """Even exact values of tanh GELU, rounded once, break erf GELU's bound: no sweep takes one for the other."""
    z = sweep(dtype)
    ref, other = act64(z, "gelu"), act64(z, "gelu_tanh").to(dtype)
    with pytest.raises(AssertionError, match="outside the bound"):
        assert_within(other, ref, bound(ref, z, "gelu"))
    ref, other = act_grad64(z, "gelu"), act_grad64(z, "gelu_tanh").to(dtype)
    with pytest.raises(AssertionError, match="outside the bound"):
        assert_within(other, ref, grad_bound(ref, torch.ones_like(z), "gelu"))


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", "quick_gelu"])
@all_dtypes
def test_derivatives_far_out_are_their_limits(dtype: torch.dtype, activation: str) -> None:
    """Far out the derivative is 0 or 1, also where its factors overflow; NaN goes through."""
    far = derivative(torch.tensor([-1e4, -100.0, 100.0, 1e4]).to(dtype), activation)
    assert_within(far, torch.tensor([0.0, 0.0, 1.0, 1.0]).double(), torch.tensor(UNDERFLOW).double())
    assert derivative(torch.tensor([float("nan")], dtype=dtype), activation).isnan().all()


@all_dtypes
def test_relu_passes_the_gradient_of_nan_as_torch_does(dtype: torch.dtype) -> None:
    saved = torch.tensor([float("nan"), 0.0, -0.0, 1.0], dtype=dtype)
    ours = derivative(saved, "relu")
    assert torch.equal(ours, torch.ops.aten.threshold_backward(torch.ones_like(saved), saved, 0))
