"""Any shape, dtype, activation, layout and configuration: the bound holds, and memory is touched as it should be.

The same examples in every run, so that CI fails for a change and never by chance. ``make fuzz`` draws new ones, as many
as ``BERT_FUSED_FUZZ`` says, and tries first what failed before; ``--hypothesis-seed`` draws the same again.
"""

import contextlib
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


@profile
@given(
    M=st.integers(0, 70),
    K=st.integers(0, 100),
    N=st.integers(1, 70),
    dtype=dtypes,
    activation=activations,
    regime=st.sampled_from(REGIMES),
    bias=st.booleans(),
    save_preact=st.booleans(),
    x_layout=layouts,
    weight_layout=layouts,
)
def test_forward(
    M: int,
    K: int,
    N: int,
    dtype: torch.dtype,
    activation: str,
    regime: str,
    bias: bool,
    save_preact: bool,
    x_layout: str,
    weight_layout: str,
) -> None:
    i = make_inputs(regime, M, N, K, dtype, bias=bias)
    x, weight = with_layout(i.x, x_layout), with_layout(i.weight, weight_layout)
    with sanitized() as record:
        out, preact = linear_act_fwd(x, weight, i.bias, activation=activation, save_preact=save_preact)
    assert len(record.launches) == (M > 0)
    assert_forward(out, x, weight, i.bias, activation)
    if preact is not None:
        assert_forward(preact, x, weight, i.bias, "none", "preact")


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


@profile
@given(
    data=st.data(),
    sizes=st.tuples(st.integers(1, 90), st.integers(1, 18), st.integers(1, 24)),
    dtype=dtypes,
    activation=activations,
    bias=st.booleans(),
    save_preact=st.booleans(),
)
def test_configurations(
    data: st.DataObject,
    sizes: tuple[int, int, int],
    dtype: torch.dtype,
    activation: str,
    bias: bool,
    save_preact: bool,
) -> None:
    """Exact on integers before the activation, in every configuration; the bound on other numbers after it."""
    config = data.draw(configurations(dtype), label="config")
    step = 16 // dtype.itemsize  # TMA's rows are whole multiples of 16 bytes
    M, N, K = sizes[0], step * sizes[1], step * sizes[2]
    possible = ("contiguous", "row_slice", "cls")
    if config.kernel != "tma":
        N -= data.draw(st.integers(0, step - 1), label="less N")
        K -= data.draw(st.integers(0, step), label="less K")
        possible = LAYOUTS
    x_layout, weight_layout = (data.draw(st.sampled_from(possible), label=name) for name in ("x", "weight"))
    for regime in ("integers", "unit"):
        i = make_inputs(regime, M, N, K, dtype, bias=bias)
        x, weight = with_layout(i.x, x_layout), with_layout(i.weight, weight_layout)
        function = "none" if regime == "integers" else activation
        with sanitized() as record:
            out, preact = linear_act_fwd(x, weight, i.bias, activation=function, save_preact=save_preact, config=config)
        assert len(record.launches) == 1 or config.kernel == "library"
        z = linear64(x, weight, i.bias)
        assert (preact is not None) == save_preact
        if regime == "integers":
            assert torch.equal(out.double(), z)
            assert preact is None or torch.equal(preact.double(), z)
            continue
        if config.kernel != "library":
            assert_forward(out, x, weight, i.bias, activation)
        elif preact is not None:  # two roundings: one in cuBLAS's stead, one here
            one, zero = torch.ones(1, 1, dtype=dtype), torch.zeros(1, dtype=dtype)
            assert_forward(out.view(-1, 1), preact.view(-1, 1), one, zero, activation, "out of the rounded preact")
        if preact is not None:
            assert_forward(preact, x, weight, i.bias, "none", "preact")


@profile
@given(
    M=st.integers(0, 300),
    N=st.integers(1, 200),
    dtype=dtypes,
    activation=st.sampled_from([activation for activation in ACTIVATIONS if activation != "none"]),
    bias_grad=st.booleans(),
    layout=layouts,
)
def test_backward(M: int, N: int, dtype: torch.dtype, activation: str, bias_grad: bool, layout: str) -> None:
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
    x, weight = (with_layout(t, layout) for t, layout in zip((i.x, i.weight), call.layouts, strict=True))
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


@settings(profile, max_examples=FUZZ or 250)  # has the most to choose from
@given(calls)
def test_linear_act(call: Call) -> None:
    """The result, what is differentiable, and every gradient, elementwise within what follows from the promises."""
    if call.called_before:
        linear_act(*arguments(call, seed=1), call.activation, recompute_preact=call.recompute_preact)
    leaves = arguments(call, seed=0)
    autocast = contextlib.nullcontext() if call.autocast is None else torch.autocast("cpu", dtype=call.autocast)
    with autocast:
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
    rows = with_layout(rows, call.d_out_layout)
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
