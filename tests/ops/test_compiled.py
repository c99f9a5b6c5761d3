"""``linear_act`` under torch.compile, torch.export and opcheck."""

from collections.abc import Iterator

import pytest
import torch
import torch._dynamo.testing
from tensors import K, N, saved_bytes, tensors
from torch import Tensor

import bert_fused
from bert_fused import fallback, linear_act, reference


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("grad", "activation", "disabled"),
    [(False, "gelu", "0"), (True, "gelu", "0"), (True, "tanh", "0"), (True, "gelu", "1")],
)
def test_the_operators_pass_opcheck(grad, activation, disabled, monkeypatch) -> None:
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


def test_dynamo_never_traces_the_checks_of_eager_mode(monkeypatch) -> None:
    """Dynamo takes a transform for active whenever it is asked, so that the answers that it cannot trace are never
    reached. A Dynamo that knows better must not come to them either."""
    monkeypatch.setattr(fallback, "_peek_interpreter_stack", lambda: None)
    x, weight, bias = tensors(3)
    compiled = torch.compile(linear_act, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, weight, bias), reference.linear_act(x, weight, bias, "gelu"))


def test_a_compiled_training_step_has_eagers_gradients(launches) -> None:
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
def test_double_backward_of_a_traced_operator_matches_eager(recompute) -> None:
    """Dynamo's graph holds the operator, and its gradient in turn has one."""
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


def test_compiled_transforms_match_the_reference() -> None:
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


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_gradients_have_the_same_bits_and_recompute_keeps_no_preact(backend) -> None:
    """The partitioner must not move the second product into the forward, to keep its result."""
    inputs = tensors(5, grad=True)
    eager = torch.autograd.grad(2 * linear_act(*inputs).sum(), inputs)
    for recompute in (False, True):
        function = torch.compile(
            lambda *a, recompute=recompute: 2 * linear_act(*a, recompute_preact=recompute),
            backend=backend,
            fullgraph=True,
        )
        out, kept = saved_bytes(lambda function=function: function(*inputs))
        assert ((5, N) in kept) == (not recompute)
        for expected, actual in zip(eager, torch.autograd.grad(out.sum(), inputs), strict=True):
            assert torch.equal(expected, actual)
