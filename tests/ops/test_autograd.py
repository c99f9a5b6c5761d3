"""Gradients of ``linear_act``: which there are, what is saved for them, and what eager allows meanwhile."""

import itertools

import pytest
import torch
from tensors import N, tensors
from torch import Tensor

from bert_fused import linear_act, reference
from bert_fused.kernels import linear_act as forward
from bert_fused.kernels.configs import Config
from bert_fused.reference import ACTIVATIONS


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)))
def test_every_subset_of_gradients_is_eagers(activation, wanted, recompute) -> None:
    leaves = tensors(2, 3)
    ours = [t.clone().requires_grad_(flag) for t, flag in zip(leaves, wanted, strict=True)]
    eager = [t.clone().requires_grad_(flag) for t, flag in zip(leaves, wanted, strict=True)]
    out = linear_act(*ours, activation, recompute_preact=recompute)
    expected = reference.linear_act(*eager, activation)
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
def test_gradients_of_tensors_without_elements_are_zero(activation, columns, inputs, shape) -> None:
    x, weight, bias = (torch.ones(s, requires_grad=True) for s in ((*shape, inputs), (columns, inputs), (columns,)))
    out = linear_act(x, weight, bias, activation)
    out.sum().backward()
    assert out.shape == (*shape, columns)
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    expected = reference.linear_act(x.detach(), weight.detach(), bias, activation).sum()
    torch.testing.assert_close(bias.grad, torch.autograd.grad(expected, bias)[0])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "wanted",
    [(True, True, True), (True, True, False), (True, False, False), (False, True, False), (False, False, True)],
)
def test_double_backward_matches_eager(activation, wanted, recompute) -> None:
    leaves = tensors(2, 3, grad=True)
    chosen = [t for t, flag in zip(leaves, wanted, strict=True) if flag]
    arguments = [t if flag else t.detach() for t, flag in zip(leaves, wanted, strict=True)]

    def second(function, **options):
        out = function(*arguments, activation, **options)
        first = torch.autograd.grad(out.square().sum(), chosen, create_graph=True)
        penalty = torch.stack([g.square().sum() for g in first]).sum()
        return [*first, *torch.autograd.grad(penalty, chosen, allow_unused=True)]

    for mine, theirs in zip(second(linear_act, recompute_preact=recompute), second(reference.linear_act), strict=True):
        assert (mine is None) == (theirs is None)
        if theirs is not None:
            assert float((mine - theirs).detach().abs().max()) <= 5e-6 * float(theirs.detach().abs().max())


@pytest.mark.parametrize("activation", ["gelu", "relu", "none"])
@pytest.mark.parametrize("changed", [0, 1, 2], ids=["x", "weight", "bias"])
@pytest.mark.parametrize("wanted", [(True, True, True), (True, False, False), (False, True, True)])
def test_inputs_changed_in_place_are_noticed_as_eager_does(wanted, changed, activation) -> None:
    """Eager refuses what it saved, and allows the rest."""

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


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "tanh"])
def test_batched_and_forward_over_reverse_gradients_are_eagers(activation, recompute) -> None:
    x, weight, bias = tensors(3, grad=True)
    directions = torch.randn(4, 3, N, generator=torch.Generator().manual_seed(1))
    results = []
    for function, options in ((linear_act, {"recompute_preact": recompute}), (reference.linear_act, {})):
        out = function(x, weight, bias, activation, **options)
        batched = torch.autograd.grad(out, (x, weight, bias), directions, is_grads_batched=True, retain_graph=True)
        _, tangent = torch.func.jvp(
            lambda v, out=out: torch.autograd.grad(out, x, v, retain_graph=True)[0], (directions[0],), (directions[1],)
        )
        results.append([*batched, tangent])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
def test_a_result_changed_in_place_is_noticed_where_it_is_saved(activation) -> None:
    """As eager does."""
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
