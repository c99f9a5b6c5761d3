"""The public functions: input checks, choice of path, autocast and torch.func."""

import warnings

import pytest
import torch
from tensors import K, N, tensors
from torch import Tensor

from bert_fused import cls_pool, fallback, linear_act, ops, reference
from bert_fused.kernels import runtime


class Tagged(Tensor):
    """A tensor subclass that changes nothing."""


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"bias": 1.0}, TypeError, "bias must be a torch.Tensor, got float"),
        ({"x": torch.ones(2, K, dtype=torch.int64)}, TypeError, "floating point, got torch.int64"),
        ({"weight": torch.ones(N, K, dtype=torch.complex64)}, TypeError, "floating point, got torch.complex64"),
        ({"x": torch.ones(2, K, dtype=torch.float16)}, TypeError, "x torch.float16, weight torch.float32"),
        ({"bias": torch.ones(N, dtype=torch.float64)}, TypeError, "bias torch.float64"),
        ({"x": torch.tensor(1.0)}, ValueError, "scalar"),
        ({"x": torch.ones(2, K + 1)}, ValueError, r"x \(2, 21\) and weight \(7, 20\) differ in K"),
        ({"weight": torch.ones(K)}, ValueError, r"weight must be \[N, K\], got shape \(20,\)"),
        ({"weight": torch.ones(1, N, K)}, ValueError, r"got shape \(1, 7, 20\)"),
        ({"bias": torch.ones(N + 1)}, ValueError, r"bias must be \[7\]"),
        ({"bias": torch.ones(N, 1)}, ValueError, r"got \(7, 1\)"),
        ({"weight": torch.ones(N, K, device="meta")}, ValueError, "weight is on meta, but x is on cpu"),
        ({"activation": "swish"}, ValueError, "unknown activation 'swish'; expected one of gelu"),
    ],
)
def test_bad_input_is_named_before_anything_is_launched(change, error, message, launches) -> None:
    x, weight, bias = tensors(2)
    arguments = {"x": x, "weight": weight, "bias": bias, "activation": "gelu"} | change
    with pytest.raises(error, match=message):
        linear_act(**arguments)
    assert launches == []


@pytest.mark.parametrize("shape", [(2, K), (2, 0, K), (1, 2, 3, K)])
def test_cls_pool_refuses_hidden_states_that_are_no_sequence(shape) -> None:
    _, weight, bias = tensors(1)
    with pytest.raises(ValueError, match=r"\[B, S, K\] with S >= 1"):
        cls_pool(torch.ones(shape), weight, bias)
    with pytest.raises(TypeError, match="hidden_states must be"):
        cls_pool(None, weight, bias)


@pytest.mark.parametrize("shape", [(), (5,), (2, 5), (2, 1, 3), (0,), (2, 0)])
@pytest.mark.parametrize("activation", ["gelu", "tanh"])
def test_leading_dimensions_are_kept(shape, activation, launches) -> None:
    x, weight, bias = tensors(*shape)
    out = linear_act(x, weight, bias, activation)
    assert out.shape == (*shape, N)
    torch.testing.assert_close(out, reference.linear_act(x, weight, bias, activation), rtol=1e-5, atol=1e-6)
    assert launches == (["linear_act_fwd"] if out.numel() else [])


def test_cls_pool_reads_the_first_rows_in_place(launches) -> None:
    hidden, weight, bias = tensors(3, 4)
    expected = torch.tanh(hidden[:, 0] @ weight.t() + bias)
    torch.testing.assert_close(cls_pool(hidden, weight, bias), expected, rtol=1e-5, atol=1e-6)
    hidden[:, 1:] = float("nan")
    torch.testing.assert_close(cls_pool(hidden, weight, bias), expected, rtol=1e-5, atol=1e-6)
    assert launches == 2 * ["linear_act_fwd"]


def test_cls_pool_copies_no_row(launched_on) -> None:
    for grad in (False, True, True):
        hidden, weight, bias = tensors(3, 4, grad=grad)
        cls_pool(hidden, weight, bias)
        x = launched_on.pop()[0]
        assert (x.data_ptr(), x.stride()) == (hidden.data_ptr(), (4 * K, 1))


def test_a_new_and_a_kept_call_copy_rows_that_no_view_can_give() -> None:
    weight, bias = torch.randn(24, 16), torch.randn(24)
    for _ in range(2):
        x = torch.randn(3, 5, 16).transpose(0, 1)
        expected = torch.nn.functional.linear(x, weight, bias)
        torch.testing.assert_close(linear_act(x, weight, bias, "none"), expected, rtol=1e-5, atol=1e-5)


def test_weights_are_read_on_every_call() -> None:
    x, weight, bias = tensors(3)
    first = linear_act(x, weight, bias)
    weight.mul_(2)
    assert not torch.equal(first, linear_act(x, weight, bias))
    torch.testing.assert_close(linear_act(x, weight, bias), reference.linear_act(x, weight, bias, "gelu"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["gelu", "tanh"])
def test_autocast_casts_as_eager(dtype, activation, launches) -> None:
    ours, eager = tensors(2, 3, grad=True), tensors(2, 3, grad=True)
    with torch.autocast("cpu", dtype=dtype):
        out = linear_act(*ours, activation)
        expected = reference.linear_act(*eager, activation)
    assert out.dtype == expected.dtype == dtype
    out.sum().backward()
    expected.sum().backward()
    assert launches == ["linear_act_fwd", "act_bwd"]
    for mine, theirs in zip(ours, eager, strict=True):
        assert mine.grad.dtype == torch.float32
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0.05, atol=0.05)


def test_autocast_leaves_float64_alone() -> None:
    leaves = tensors(2, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear_act(*leaves).dtype == torch.float64


@pytest.mark.parametrize(
    "function",
    [
        lambda f, x, w, b: torch.func.vmap(lambda row: f(row, w, b))(x),
        lambda f, x, w, b: torch.func.grad(lambda t: f(t, w, b).sum())(x),
        lambda f, x, w, b: torch.func.jvp(lambda t: f(t, w, b), (x,), (torch.ones_like(x),))[1],
        lambda f, x, w, b: torch.func.hessian(lambda t: f(x, w, t).sum())(b),
        lambda f, x, w, b: torch.func.vmap(torch.func.grad(lambda row: f(row, w, b).sum()))(x),
    ],
    ids=["vmap", "grad", "jvp", "hessian", "vmap of grad"],
)
def test_function_transforms_take_the_pytorch_path(function, launches) -> None:
    x, weight, bias = tensors(3)
    expected = function(lambda *a: reference.linear_act(*a, "gelu"), x, weight, bias)
    torch.testing.assert_close(function(linear_act, x, weight, bias), expected)
    assert launches == []


def test_jit_trace_records_the_computation() -> None:
    x, weight, bias = tensors(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns of every Python check, and is deprecated
        traced = torch.jit.trace(lambda t: linear_act(t, weight, bias), (x,), check_trace=False)
    other = torch.randn(3, K)
    torch.testing.assert_close(traced(other), reference.linear_act(other, weight, bias, "gelu"))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda t: t.double(), "float64 has no kernel"),
        (lambda t: t.to("meta"), "meta is not an NVIDIA GPU"),
        (lambda t: t.as_subclass(Tagged), "Tagged is a tensor subclass"),
        (lambda t: torch._neg_view(t), "lazily negated"),
    ],
    ids=["float64", "meta", "subclass", "negated"],
)
def test_what_no_kernel_serves_takes_the_pytorch_path(make, reason, launches) -> None:
    arguments = [make(t) for t in tensors(3)]
    assert reason in ops.fallback_reason(*arguments)
    out = linear_act(*arguments)
    assert out.shape == (3, N)
    if not out.is_meta:
        torch.testing.assert_close(out, reference.linear_act(*arguments, "gelu"), rtol=0, atol=0)
    assert launches == []


def test_strided_nested_tensors_take_the_pytorch_path() -> None:
    _, weight, bias = tensors(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        nested = torch.nested.nested_tensor([torch.randn(2, K), torch.randn(3, K)])
    for mine, theirs in zip(linear_act(nested, weight, bias).unbind(), nested.unbind(), strict=True):
        torch.testing.assert_close(mine, reference.linear_act(theirs, weight, bias, "gelu"))


def test_results_are_no_views() -> None:
    x, weight, bias = tensors(3, grad=True)
    assert linear_act(x, weight, bias).detach_().is_leaf
    assert cls_pool(torch.randn(3, 2, K), weight, bias).detach_().is_leaf


def test_interpreted_bfloat16_is_left_to_pytorch_where_it_was_not_repaired(monkeypatch, launches) -> None:
    monkeypatch.setattr(fallback, "INTERPRETER_DTYPES", (torch.float16, torch.float32))
    leaves = tensors(3, dtype=torch.bfloat16)
    assert torch.equal(linear_act(*leaves), reference.linear_act(*leaves, "gelu"))
    assert launches == []


@pytest.mark.parametrize(
    ("capability", "reason"), [((7, 5), "sm_75 is older than sm_80"), ((8, 0), None), ((9, 0), None), ((12, 0), None)]
)
def test_gpus_older_than_sm_80_have_no_kernels(capability, reason, monkeypatch) -> None:
    runtime._arch_of_index.cache_clear()
    monkeypatch.setattr(runtime, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    try:
        assert fallback.device_reason(torch.device("cuda", 0), torch.bfloat16) == reason
    finally:
        runtime._arch_of_index.cache_clear()


def test_rocm_has_no_kernels(monkeypatch) -> None:
    """ROCm's devices are called cuda as well, and some have a capability past 8.0."""
    monkeypatch.setattr(runtime, "INTERPRETED", False)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 4))
    assert fallback.device_reason(torch.device("cuda", 0), torch.bfloat16) == "ROCm is not supported"


def test_a_fallback_is_logged_once(caplog) -> None:
    for _ in range(2):
        fallback.log_once("a reason for this test")
    assert [record.getMessage().endswith("a reason for this test") for record in caplog.records] == [True]


def test_the_switch_turns_every_kernel_off(monkeypatch, launches) -> None:
    monkeypatch.setenv("BERT_FUSED_DISABLE", "1")
    x, weight, bias = tensors(3, grad=True)
    linear_act(x, weight, bias).sum().backward()
    torch.ops.bert_fused.linear_act_fwd(x.detach(), weight.detach(), bias.detach(), "gelu", True)
    assert launches == []
    monkeypatch.setenv("BERT_FUSED_DISABLE", "0")
    linear_act(x, weight, bias)
    assert launches == ["linear_act_fwd"]


@pytest.mark.parametrize(
    ("change", "error"),
    [({"bias": torch.zeros(N - 2)}, ValueError), ({"bias": torch.zeros(N).half()}, TypeError)],
    ids=["short bias", "half bias"],
)
def test_the_operator_leaves_no_plan_for_what_linear_act_refuses(change, error) -> None:
    x, weight, bias = tensors(4)
    arguments = {"x": x, "weight": weight, "bias": bias} | change
    for _ in range(2):
        with pytest.raises(error):
            torch.ops.bert_fused.linear_act_fwd(**arguments, activation="gelu", save_preact=False)
        with pytest.raises(error):
            linear_act(**arguments)


def test_the_backward_operator_refuses_gradients_of_another_shape() -> None:
    saved = torch.randn(4, 12)
    with pytest.raises(ValueError, match="differ in shape"):
        torch.ops.bert_fused.linear_act_bwd(saved[:2], saved, "gelu", True)


def test_no_plan_of_an_empty_tensor_serves_one_on_the_meta_device() -> None:
    x, weight, bias = tensors(0)
    linear_act(x, weight, bias)
    with pytest.raises(ValueError, match="weight is on cpu, but x is on meta"):
        linear_act(x.to("meta"), weight, bias)


def test_the_operator_refuses_what_is_no_matrix() -> None:
    with pytest.raises(ValueError, match=r"x must be \[M, K\], got shape \(2, 3, 8\)"):
        torch.ops.bert_fused.linear_act_fwd(torch.randn(2, 3, 8), torch.randn(4, 8), None, "gelu", False)
