"""Any shape, dtype, activation, layout and configuration: the bound holds, and memory is touched as it should be.

The same examples in every run, so that CI fails for a change and never by chance. ``make fuzz`` draws new ones, as many
as ``BERT_FUSED_FUZZ`` says, and tries first what failed before; ``--hypothesis-seed`` draws the same again.
"""

import contextlib
import math
import os
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interpreter import sanitized
from reference64 import (
    ACTIVATIONS,
    DTYPES,
    LAYOUTS,
    REGIMES,
    act64,
    act_grad64,
    assert_bias_grad,
    assert_forward,
    assert_within,
    dtype_name,
    forward_bound,
    generator,
    grad_bound,
    linear64,
    make_inputs,
    rounding_bound,
    saved_grad64,
    strided_vector,
    with_layout,
)
from torch import Tensor

from bert_fused import linear_act
from bert_fused.kernels.configs import Config
from bert_fused.kernels.elementwise import act_bwd
from bert_fused.kernels.linear_act import linear_act_fwd

pytestmark = pytest.mark.usefixtures("poisoned_empty")

FUZZ = int(os.environ.get("BERT_FUSED_FUZZ", "0"))

profile = settings(
    max_examples=FUZZ or 40,
    deadline=None,
    # The fixture patches allocation only, so that examples may share it.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    **({"print_blob": True} if FUZZ else {"derandomize": True, "database": None}),
)

layouts = st.sampled_from(LAYOUTS)
dtypes = st.sampled_from(DTYPES)
activations = st.sampled_from(ACTIVATIONS)


# ------------------------------------------------------------------------------------------------------------ launchers


def laid_out(matrix: Tensor, layout: str) -> Tensor:
    """A view among NaNs. oneDNN's bf16 product (AMX) multiplies what follows an odd row by zero: no NaN for that."""
    return with_layout(matrix, layout, around=1000.0 if matrix.dtype is torch.bfloat16 else math.nan)


@st.composite
def configurations(draw: st.DrawFn, dtype: torch.dtype) -> Config:
    """Any kernel with a tile that the interpreter is quick with, and any of the kernel's options."""
    kernel = draw(st.sampled_from(["pointer", "tma", "persistent", "library"]))
    if kernel == "library":
        return Config("library", dtype_name(dtype))
    block_m, block_n, block_k = (draw(st.sampled_from([16, 32, 64])) for _ in range(3))
    options = {"group_m": draw(st.integers(1, 9))}
    if kernel == "persistent":
        options["persistent"] = draw(st.integers(1, 3))
        options["subtiles"] = draw(st.sampled_from([s for s in (1, 2, 4) if block_n // s >= 16]))
    name = "tma" if kernel in ("tma", "persistent") else "pointer"
    return Config(name, dtype_name(dtype), block_m, block_n, block_k, num_warps=4, num_stages=1, **options)


@settings(profile, max_examples=FUZZ or 150)
@given(
    data=st.data(),
    regime=st.sampled_from(REGIMES),
    sizes=st.tuples(st.integers(1, 90), st.integers(1, 18), st.integers(1, 24)),
    dtype=dtypes,
    activation=activations,
    bias=st.sampled_from(["", "contiguous", "strided"]),
    save_preact=st.booleans(),
)
def test_forward_is_exact_on_integers_and_within_the_bound_elsewhere(
    data: st.DataObject,
    regime: str,
    sizes: tuple[int, int, int],
    dtype: torch.dtype,
    activation: str,
    bias: str,
    save_preact: bool,
) -> None:
    """In every configuration; its one launch stores every element once."""
    config = data.draw(configurations(dtype), label="config")
    step = 16 // dtype.itemsize  # TMA's rows are whole multiples of 16 bytes
    M, N, K = sizes[0], step * sizes[1], step * sizes[2]
    possible = ("contiguous", "row_slice", "cls")
    if config.kernel != "tma":
        N -= data.draw(st.integers(0, step - 1), label="less N")
        K -= data.draw(st.integers(0, step), label="less K")
        possible = LAYOUTS
    x_layout, weight_layout = (data.draw(st.sampled_from(possible), label=name) for name in ("x", "weight"))
    i = make_inputs(regime, M, N, K, dtype, bias=bool(bias))
    x, weight = laid_out(i.x, x_layout), laid_out(i.weight, weight_layout)
    b = strided_vector(i.bias) if bias == "strided" and i.bias is not None else i.bias
    with sanitized() as record:
        out, preact = linear_act_fwd(x, weight, b, activation=activation, save_preact=save_preact, config=config)
    stored = [launch.stored for launch in record.launches]
    assert (preact is not None) == save_preact
    if config.kernel == "library" or K == 0:  # torch stores the product; without preact the pass works in place
        in_place = activation == "none" and not save_preact
        assert stored == ([] if in_place else [dict.fromkeys(["out_ptr", "preact_ptr"][: 2 - save_preact], M * N)])
        if preact is not None:  # two roundings: one in cuBLAS's stead, one here
            one, zero = torch.ones(1, 1, dtype=dtype), torch.zeros(1, dtype=dtype)
            assert_forward(out.view(-1, 1), preact.view(-1, 1), one, zero, activation, "out of the rounded preact")
    else:
        assert stored == [dict.fromkeys(["out_ptr", "preact_ptr"][: 1 + save_preact], M * N)]
        assert_forward(out, x, weight, i.bias, activation)
    if preact is not None:
        assert_forward(preact, x, weight, i.bias, "none", "preact")
        assert regime != "integers" or torch.equal(preact.double(), linear64(x, weight, i.bias))


@profile
@given(
    M=st.integers(0, 300),
    N=st.integers(1, 200),
    dtype=dtypes,
    activation=st.sampled_from([activation for activation in ACTIVATIONS if activation != "none"]),
    bias_grad=st.booleans(),
    layout=layouts,
)
def test_backward_is_within_the_bound(
    M: int, N: int, dtype: torch.dtype, activation: str, bias_grad: bool, layout: str
) -> None:
    d_out, z = (2 * torch.randn(M, N, generator=generator(seed)) for seed in (0, 1))
    d_out = with_layout(d_out.to(dtype), layout)
    saved = (act64(z, activation) if activation in ("relu", "tanh") else z).to(dtype)
    with sanitized() as record:
        d_preact, d_bias = act_bwd(d_out, saved, activation=activation, bias_grad=bias_grad)
    assert len(record.launches) == (M > 0)
    ref = d_out.double() * saved_grad64(saved, activation)
    assert_within(d_preact, ref, grad_bound(ref, d_out, activation), "d_preact")
    assert (d_bias is not None) == bias_grad
    if d_bias is not None:
        assert_bias_grad(d_bias, d_out, saved, activation)


# ------------------------------------------------------------------------------------------------- the public function


@dataclass(frozen=True)
class Call:
    """A call of ``linear_act``. x is ``[*leading, K]``; autocast is the dtype that it casts to, if it is on."""

    leading: tuple[int, ...]
    N: int
    K: int
    dtype: torch.dtype
    activation: str
    regime: str
    layouts: tuple[str, str]  # of x and weight
    bias: str  # "", "contiguous" or "strided"
    wanted: tuple[bool, bool, bool]  # gradients of x, weight and bias
    d_out_layout: str
    autocast: torch.dtype | None
    recompute_preact: bool
    called_before: bool


calls = st.builds(
    Call,
    leading=st.lists(st.integers(0, 9), max_size=3).map(tuple) | st.tuples(st.integers(0, 60)),
    N=st.integers(0, 60),
    K=st.integers(0, 60),
    dtype=st.sampled_from([torch.float32, *DTYPES]),  # fp32 twice: its bounds are the sharpest
    activation=activations,
    regime=st.sampled_from(REGIMES),
    layouts=st.tuples(layouts, layouts),
    bias=st.sampled_from(["", "contiguous", "strided"]),
    wanted=st.just((True, True, True)) | st.tuples(st.booleans(), st.booleans(), st.booleans()),
    d_out_layout=layouts,
    autocast=st.sampled_from([None, None, None, None, torch.bfloat16, torch.float16]),
    recompute_preact=st.booleans(),
    called_before=st.booleans(),
)


def arguments(call: Call, seed: int) -> list[Tensor | None]:
    """x, weight and bias as leaves with the layouts of the call."""
    rows = torch.Size(call.leading).numel()
    i = make_inputs(call.regime, rows, call.N, call.K, call.dtype, bias=bool(call.bias), seed=seed)
    x, weight = (laid_out(t, layout) for t, layout in zip((i.x, i.weight), call.layouts, strict=True))
    # To split a dimension, or take its only element, is always a view: the strides stay.
    x = x.view(*call.leading, call.K) if call.leading else x[0]
    bias = strided_vector(i.bias) if call.bias == "strided" and i.bias is not None else i.bias
    return [
        None if t is None else t.detach().requires_grad_(wanted)
        for t, wanted in zip((x, weight, bias), call.wanted, strict=True)
    ]


# The largest second derivative of the activations that have one, a little more than 0.852 (QuickGELU) and 0.798 (GELU).
CURVATURE = 0.9


def d_preact_bound(z: Tensor, z_bound: Tensor, out_bound: Tensor, d_out: Tensor, activation: str) -> Tensor:
    """Elementwise error of d_preact, where the derivative is taken at what was saved: as exact as the forward is."""
    bound = grad_bound(d_out.double() * act_grad64(z, activation), d_out, activation)
    size = d_out.double().abs()
    match activation:
        case "none":
            return bound
        case "relu":  # the saved output is 0 or not
            return bound + size * (z.abs() <= z_bound)
        case "tanh":  # |1 - y^2| has at most the slope 2
            return bound + size * 2 * out_bound
    return bound + size * CURVATURE * z_bound


def product_bound(left: Tensor, left_bound: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Elementwise error of ``left @ right`` where left's is known: one rounding, and accumulation in fp32."""
    sums = left.abs() @ right.abs()
    largest = sums.max() if sums.numel() else 0.0
    accumulation = 2.0**-23 * (1 + left.shape[1] / 16) * largest
    return left_bound @ right.abs() + rounding_bound(left @ right, dtype) + accumulation


@settings(profile, max_examples=FUZZ or 200)  # has the most to choose from
@given(calls)
def test_linear_act_and_its_gradients_are_within_the_bounds(call: Call) -> None:
    """Elementwise, within what follows from the promises; no launch touches memory that is not its own."""
    if call.called_before:
        linear_act(*arguments(call, seed=1), call.activation, recompute_preact=call.recompute_preact)
    leaves = arguments(call, seed=0)
    autocast = contextlib.nullcontext() if call.autocast is None else torch.autocast("cpu", dtype=call.autocast)
    with sanitized(), autocast:
        out = linear_act(*leaves, call.activation, recompute_preact=call.recompute_preact)
    wanted = [flag and leaf is not None for flag, leaf in zip(call.wanted, leaves, strict=True)]
    assert out.shape == (*call.leading, call.N)
    assert out.requires_grad == any(wanted)

    dtype = call.autocast or call.dtype
    x, weight, bias = (None if leaf is None else leaf.detach().to(dtype) for leaf in leaves)
    assert x is not None
    assert weight is not None
    x = x.reshape(torch.Size(call.leading).numel(), call.K)
    assert_forward(out.detach().view(len(x), call.N), x, weight, bias, call.activation)
    if not any(wanted):
        return

    rows = torch.randn(len(x), call.N, generator=generator(2)).to(dtype)
    rows = laid_out(rows, call.d_out_layout)
    with sanitized():
        out.backward(rows.view(out.shape) if call.leading else rows[0])

    z = linear64(x, weight, bias)
    z_bound = forward_bound(z, x, weight, bias, "none")
    y = act64(z, call.activation)
    out_bound = forward_bound(y, x, weight, bias, call.activation)
    d_preact = rows.double() * act_grad64(z, call.activation)
    error = d_preact_bound(z, z_bound, out_bound, rows, call.activation)
    one = torch.ones(1, len(x), dtype=torch.float64)
    expected = {
        "d_x": (d_preact @ weight.double(), product_bound(d_preact, error, weight.double(), dtype)),
        "d_weight": (d_preact.t() @ x.double(), product_bound(d_preact.t(), error.t(), x.double(), dtype)),
        "d_bias": (d_preact.sum(0), (product_bound(one, 0 * one, d_preact, dtype) + one @ error)[0]),
    }
    for (name, (ref, bound)), leaf, flag in zip(expected.items(), leaves, wanted, strict=True):
        assert (leaf is not None and leaf.grad is not None) == flag, name
        if flag:
            assert leaf.grad.dtype == call.dtype
            # Autocast's gradients are rounded once more, to the leaf's dtype.
            assert_within(leaf.grad.view(ref.shape), ref, bound + rounding_bound(ref, call.dtype), name)
