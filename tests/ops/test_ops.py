"""The public functions: input checks, choice of path, autograd, autocast, torch.compile and torch.func."""

import itertools
import warnings
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

import bert_fused
from bert_fused import cls_pool, linear_act, ops, reference
from bert_fused.kernels.configs import Config
from bert_fused.kernels.plan import Launch
from bert_fused.reference import ACTIVATIONS

K, N = 20, 7


def tensors(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, K, generator=generator)
    weight = torch.randn(N, K, generator=generator) / 4
    bias = torch.randn(N, generator=generator)
    return tuple(t.to(dtype).requires_grad_(grad) for t in (x, weight, bias))


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
def test_cls_pool_wants_sequences(shape) -> None:
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


@pytest.fixture
def launched_on(monkeypatch) -> list[tuple[Any, ...]]:
    """The tensors of each launch."""
    given: list[tuple[Any, ...]] = []
    call = Launch.__call__
    monkeypatch.setattr(Launch, "__call__", lambda self, *tensors: given.append(tensors) or call(self, *tensors))
    return given


def test_cls_pool_copies_no_row(launched_on) -> None:
    for grad in (False, True, True):
        hidden, weight, bias = tensors(3, 4, grad=grad)
        cls_pool(hidden, weight, bias)
        x = launched_on.pop()[0]
        assert (x.data_ptr(), x.stride()) == (hidden.data_ptr(), (4 * K, 1))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)))
def test_gradients_of_every_subset(activation, wanted) -> None:
    leaves = tensors(2, 3)
    ours = [t.clone().requires_grad_(flag) for t, flag in zip(leaves, wanted, strict=True)]
    eager = [t.clone().requires_grad_(flag) for t, flag in zip(leaves, wanted, strict=True)]
    out, expected = linear_act(*ours, activation), reference.linear_act(*eager, activation)
    assert out.requires_grad == any(wanted)
    if not any(wanted):
        return
    d_out = torch.linspace(-1, 1, out.numel()).view_as(out)
    out.backward(d_out)
    expected.backward(d_out)
    for mine, theirs, flag in zip(ours, eager, wanted, strict=True):
        assert (mine.grad is not None) == flag
        if flag:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (2,), (2, 3), (0, 3)])
@pytest.mark.parametrize(("columns", "inputs"), [(2, 0), (0, 3), (0, 0)])
@pytest.mark.parametrize("activation", ["gelu", "relu", "none"])
def test_gradients_of_tensors_without_elements(activation, columns, inputs, shape) -> None:
    x, weight, bias = (torch.ones(s, requires_grad=True) for s in ((*shape, inputs), (columns, inputs), (columns,)))
    out = linear_act(x, weight, bias, activation)
    out.sum().backward()
    assert out.shape == (*shape, columns)
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    expected = reference.linear_act(x.detach(), weight.detach(), bias, activation).sum()
    torch.testing.assert_close(bias.grad, torch.autograd.grad(expected, bias)[0])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "wanted",
    [(True, True, True), (True, True, False), (True, False, False), (False, True, False), (False, False, True)],
)
def test_double_backward_matches_eager(activation, wanted) -> None:
    leaves = tensors(2, 3, grad=True)
    chosen = [t for t, flag in zip(leaves, wanted, strict=True) if flag]
    arguments = [t if flag else t.detach() for t, flag in zip(leaves, wanted, strict=True)]

    def second(function):
        out = function(*arguments, activation)
        first = torch.autograd.grad(out.square().sum(), chosen, create_graph=True)
        penalty = torch.stack([g.square().sum() for g in first]).sum()
        return [*first, *torch.autograd.grad(penalty, chosen, allow_unused=True)]

    for mine, theirs in zip(second(linear_act), second(reference.linear_act), strict=True):
        assert (mine is None) == (theirs is None)
        if theirs is not None:
            assert float((mine - theirs).detach().abs().max()) <= 5e-6 * float(theirs.detach().abs().max())


@pytest.mark.parametrize("activation", ["gelu", "relu", "none"])
@pytest.mark.parametrize("changed", [0, 1, 2], ids=["x", "weight", "bias"])
@pytest.mark.parametrize("wanted", [(True, True, True), (True, False, False), (False, True, True)])
def test_changes_in_place_before_the_backward_pass(wanted, changed, activation) -> None:
    """What eager allows is allowed, what it refuses is refused."""

    def outcome(function):
        leaves = [t.requires_grad_(flag) for t, flag in zip(tensors(2, 3), wanted, strict=True)]
        arguments = [1 * leaf for leaf in leaves]
        out = function(*arguments, activation)
        with torch.no_grad():
            arguments[changed].add_(1)
        try:
            return torch.autograd.grad(out.sum(), [leaf for leaf in leaves if leaf.requires_grad], create_graph=True)
        except RuntimeError as error:
            return str(error).partition(":")[0]

    mine, theirs = outcome(linear_act), outcome(reference.linear_act)
    assert type(mine) is type(theirs)
    if isinstance(theirs, str):
        assert mine == theirs
    else:
        torch.testing.assert_close(mine, theirs)


def test_double_backward_runs_twice_and_changes_nothing() -> None:
    leaves = tensors(5, grad=True)
    before = [(t.detach().clone(), t._version) for t in leaves]
    out = linear_act(*leaves)
    first = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    again = torch.autograd.grad(out.sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for tensor, (value, version) in zip(leaves, before, strict=True):
        assert torch.equal(tensor, value)
        assert tensor._version == version


@pytest.mark.parametrize(
    ("activation", "wanted", "saved"),
    [
        ("gelu", (True, True, True), {"x", "weight", "preact"}),
        ("gelu", (True, True, False), {"x", "weight", "preact"}),
        ("gelu", (True, False, False), {"weight", "preact"}),
        ("gelu", (False, True, True), {"x", "preact"}),
        ("gelu", (False, False, True), {"preact"}),
        ("relu", (True, True, True), {"x", "weight", "out"}),
        ("tanh", (False, False, True), {"out"}),
        ("none", (True, True, True), {"x", "weight"}),
        ("none", (False, False, True), set()),
    ],
)
@pytest.mark.parametrize("kernel", ["pointer", "library"])
def test_nothing_is_saved_that_no_gradient_needs(activation, wanted, saved, kernel, monkeypatch) -> None:
    if kernel == "library":  # whose product could record a graph of its own
        from bert_fused.kernels import linear_act as forward

        monkeypatch.setattr(forward, "get_config", lambda M, N, K, dtype, *_, **__: Config("library", dtype))
    x, weight, bias = (t.requires_grad_(flag) for t, flag in zip(tensors(5), wanted, strict=True))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = linear_act(x, weight, bias, activation)
    names = {x.data_ptr(): "x", weight.data_ptr(): "weight", out.data_ptr(): "out"}
    assert {names.get(t.data_ptr(), "preact") for t in kept} == saved
    assert len(kept) == len(saved)


def test_no_preactivation_without_gradients(launched_on) -> None:
    x, weight, bias = tensors(2, grad=True)
    with torch.no_grad():
        linear_act(x, weight, bias)
    with torch.inference_mode():
        assert linear_act(x, weight, bias).is_inference()
    linear_act(x, weight, bias)
    assert [preact is not None for *_, preact in launched_on] == [False, False, True]


def test_saved_weight_changed_in_place_is_noticed() -> None:
    x, weight, bias = tensors(2, grad=True)
    out = linear_act(x, weight, bias)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


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


@pytest.mark.parametrize("activation", ["gelu", "tanh"])
def test_forward_over_reverse(activation) -> None:
    x, weight, bias = tensors(3, grad=True)
    d_out, direction = torch.randn(2, 3, N, generator=torch.Generator().manual_seed(1))

    def tangent(function):
        out = function(x, weight, bias, activation)
        return torch.func.jvp(lambda v: torch.autograd.grad(out, x, v, retain_graph=True)[0], (d_out,), (direction,))[1]

    torch.testing.assert_close(tangent(linear_act), tangent(reference.linear_act), rtol=1e-5, atol=1e-5)


def test_compiled_transforms() -> None:
    torch._dynamo.reset()
    x, weight, bias = tensors(3)
    cases = [
        lambda f: lambda t: torch.func.jvp(lambda u: f(u, weight, bias, "gelu"), (t,), (torch.ones_like(t),))[1],
        lambda f: torch.func.grad(lambda t: f(t, weight, bias, "gelu").sum()),
        lambda f: torch.func.vmap(lambda t: f(t, weight, bias, "gelu")),
    ]
    for make in cases:
        compiled = torch.compile(make(linear_act), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), make(reference.linear_act)(x))
    compiled = torch.compile(lambda t: linear_act(t, weight, bias), backend="aot_eager")
    compiled(x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        assert torch.autograd.forward_ad.unpack_dual(compiled(dual)).tangent is not None


def test_batched_gradients() -> None:
    x, weight, bias = tensors(3, grad=True)
    directions = torch.randn(4, 3, N, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad(linear_act(x, weight, bias), (x, weight, bias), directions, is_grads_batched=True)
    eager = reference.linear_act(x, weight, bias, "gelu")
    theirs = torch.autograd.grad(eager, (x, weight, bias), directions, is_grads_batched=True)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


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


def test_strided_nested_tensors() -> None:
    _, weight, bias = tensors(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        nested = torch.nested.nested_tensor([torch.randn(2, K), torch.randn(3, K)])
    for mine, theirs in zip(linear_act(nested, weight, bias).unbind(), nested.unbind(), strict=True):
        torch.testing.assert_close(mine, reference.linear_act(theirs, weight, bias, "gelu"))


def test_matrix_results_are_no_views() -> None:
    x, weight, bias = tensors(3, grad=True)
    assert linear_act(x, weight, bias).detach_().is_leaf
    assert cls_pool(torch.randn(3, 2, K), weight, bias).detach_().is_leaf


@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
def test_result_changed_in_place(activation) -> None:
    """Eager notices that a saved output was changed, and allows it where the output is not saved."""
    outcomes = []
    for function in (linear_act, reference.linear_act):
        leaves = tensors(2, 3, grad=True)
        out = function(*leaves, activation)
        out.mul_(2)
        try:
            out.sum().backward()
            outcomes.append(leaves[0].grad)
        except RuntimeError as error:
            outcomes.append("modified by an inplace operation" in str(error))
    mine, theirs = outcomes
    if isinstance(theirs, bool):
        assert mine is theirs is True
    else:
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_interpreted_bfloat16_is_left_to_pytorch_where_it_was_not_repaired(monkeypatch, launches) -> None:
    from bert_fused import fallback

    monkeypatch.setattr(fallback, "INTERPRETER_DTYPES", (torch.float16, torch.float32))
    leaves = tensors(3, dtype=torch.bfloat16)
    assert torch.equal(linear_act(*leaves), reference.linear_act(*leaves, "gelu"))
    assert launches == []


@pytest.mark.parametrize(
    ("capability", "reason"), [((7, 5), "sm_75 is older than sm_80"), ((8, 0), None), ((9, 0), None), ((12, 0), None)]
)
def test_which_gpus_have_kernels(capability, reason, monkeypatch) -> None:
    from bert_fused import fallback
    from bert_fused.kernels import runtime

    runtime._arch_of_index.cache_clear()
    monkeypatch.setattr(runtime, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    try:
        assert fallback.device_reason(torch.device("cuda", 0), torch.bfloat16) == reason
    finally:
        runtime._arch_of_index.cache_clear()


def test_rocm_has_no_kernels(monkeypatch) -> None:
    """ROCm's devices are called cuda as well, and some have a capability past 8.0."""
    from bert_fused import fallback
    from bert_fused.kernels import runtime

    monkeypatch.setattr(runtime, "INTERPRETED", False)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 4))
    assert fallback.device_reason(torch.device("cuda", 0), torch.bfloat16) == "ROCm is not supported"


def test_a_fallback_is_logged_once(caplog) -> None:
    from bert_fused.fallback import log_once

    for _ in range(2):
        log_once("a reason for this test")
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


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "tanh"])
@pytest.mark.parametrize("disabled", ["0", "1"])
def test_opcheck(grad, activation, disabled, monkeypatch) -> None:
    monkeypatch.setenv("BERT_FUSED_DISABLE", disabled)
    x, weight, bias = tensors(5, grad=grad)
    for save_preact in (False, True):
        torch.library.opcheck(torch.ops.bert_fused.linear_act_fwd, (x, weight, bias, activation, save_preact))
    torch.library.opcheck(torch.ops.bert_fused.linear_act_fwd, (x, weight, None, "none", True))
    for bias_grad in (False, True):
        for d_out in (torch.randn(5, N), torch.randn(N, 5).t(), torch.randn(1, N).expand(5, N)):
            arguments = (d_out, torch.randn(5, N), activation, bias_grad)
            torch.library.opcheck(torch.ops.bert_fused.linear_act_bwd, arguments)


def test_one_graph_serves_all_rows() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(linear_act, fullgraph=True, dynamic=True, backend=counter)
    _, weight, bias = tensors(1)
    for rows in (2, 3, 5, 40, 200, 3000):
        x = torch.randn(rows, K)
        torch.testing.assert_close(compiled(x, weight, bias), linear_act(x, weight, bias))
    assert counter.frame_count == 1
    for rows in (1, 0):
        compiled(torch.randn(rows, K), weight, bias)
    assert counter.frame_count <= 3
    names = [node.target for graph in counter.graphs for node in graph.graph.nodes]
    assert torch.ops.bert_fused.linear_act_fwd in names or torch.ops.bert_fused.linear_act_fwd.default in names


def test_dynamo_is_kept_from_eager_modes_questions(monkeypatch) -> None:
    """Dynamo takes a transform for active whenever it is asked, so that the answers that it cannot trace are never
    reached. A Dynamo that knows better must not come to them either."""
    from bert_fused import fallback

    monkeypatch.setattr(fallback, "_peek_interpreter_stack", lambda: None)
    torch._dynamo.reset()
    x, weight, bias = tensors(3)
    compiled = torch.compile(linear_act, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, weight, bias), reference.linear_act(x, weight, bias, "gelu"))


def test_compiled_training_step(launches) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(linear_act, fullgraph=True, backend=counter)
    for rows in ((6,), (2, 3)):
        ours, eager = tensors(*rows, grad=True), tensors(*rows, grad=True)
        compiled(*ours).square().sum().backward()
        linear_act(*eager).square().sum().backward()
        for mine, theirs in zip(ours, eager, strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad)
    assert launches == 4 * ["linear_act_fwd", "act_bwd"]
    assert "linear_act_fwd" in counter.graphs[0].print_readable(print_output=False)


@pytest.mark.parametrize("recompute", [False, True])
def test_double_backward_of_a_traced_operator(recompute) -> None:
    """Dynamo's graph holds the operator, and its gradient in turn has one."""
    torch._dynamo.reset()
    traced = torch.compile(lambda *a: linear_act(*a, recompute_preact=recompute), backend="eager", fullgraph=True)

    def second(function):
        leaves = tensors(2, 3, grad=True)
        first = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    for mine, theirs in zip(second(traced), second(lambda *a: reference.linear_act(*a, "gelu")), strict=True):
        assert float((mine - theirs).abs().max()) <= 5e-6 * float(theirs.abs().max())


@pytest.mark.parametrize("strict", [False, True])
def test_export_takes_the_aten_path(strict) -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return bert_fused.linear_act(x, weight, bias)

    program = torch.export.export(Model(), tensors(6), strict=strict)
    assert not [node for node in program.graph.nodes if "bert_fused" in str(node.target)]
    torch.testing.assert_close(program.module()(*tensors(6)), reference.linear_act(*tensors(6), "gelu"))


def test_inductor() -> None:
    torch._dynamo.reset()
    x, weight, bias = tensors(6)
    compiled = torch.compile(lambda *a: linear_act(*a) * 2 + 1, fullgraph=True)
    torch.testing.assert_close(compiled(x, weight, bias), linear_act(x, weight, bias) * 2 + 1)


def test_the_operator_takes_matrices() -> None:
    with pytest.raises(ValueError, match=r"x must be \[M, K\], got shape \(2, 3, 8\)"):
        torch.ops.bert_fused.linear_act_fwd(torch.randn(2, 3, 8), torch.randn(4, 8), None, "gelu", False)
