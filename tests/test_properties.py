"""Any shape, dtype, activation and layout: the bound holds, and memory is touched as it should be."""

import pytest
import torch
from checks import (
    ACTIVATIONS,
    DTYPES,
    LAYOUTS,
    REGIMES,
    act64,
    assert_bias_grad,
    assert_forward,
    assert_within,
    generator,
    grad_bound,
    make_inputs,
    saved_grad64,
    with_layout,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interpreter import sanitized

from bert_fused.kernels.act_grad import act_bwd
from bert_fused.kernels.linear_act import linear_act_fwd

pytestmark = pytest.mark.usefixtures("poisoned_empty")

# The same examples in every run; the fixture patches allocation only, so that examples may share it.
deterministic = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@deterministic
@given(
    M=st.integers(0, 70),
    K=st.integers(0, 100),
    N=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(ACTIVATIONS),
    regime=st.sampled_from(REGIMES),
    bias=st.booleans(),
    save_preact=st.booleans(),
    x_layout=st.sampled_from(LAYOUTS),
    weight_layout=st.sampled_from(LAYOUTS),
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


@deterministic
@given(
    M=st.integers(0, 300),
    N=st.integers(1, 200),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from([activation for activation in ACTIVATIONS if activation != "none"]),
    bias_grad=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
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
