"""``linear_glu``: gradients, what is saved for them, the operator under torch.compile, and the PyTorch path."""

import contextlib
import itertools
from collections.abc import Iterator

import pytest
import torch
import torch._dynamo.testing
from gated64 import EVERY, NAMES, gated_bound
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import sanitized
from reference64 import DTYPES, LAYOUTS, REGIMES, assert_within, generator, make_inputs, with_layout
from tensors import saved_bytes
from torch import Tensor

from bert_fused import linear_act, linear_glu, reference
from bert_fused.kernels import linear_act as launcher
from bert_fused.kernels.configs import Config

pytestmark = pytest.mark.usefixtures("poisoned_empty")

N, K = 7, 20  # columns of each half


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def leaves(
    *shape: int, wanted: tuple[bool, ...] = (True, True, True), dtype: torch.dtype = torch.float32, N: int = N
) -> list[Tensor]:
    g = generator(0)
    x, weight = torch.randn(*shape, K, generator=g), torch.randn(2 * N, K, generator=g) / 4
    bias = torch.randn(2 * N, generator=g)
    return [t.to(dtype).requires_grad_(flag) for t, flag in zip((x, weight, bias), wanted, strict=True)]


def eager(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "gelu", activated: str = "first") -> Tensor:
    a, b = torch.nn.functional.linear(x, weight, bias).chunk(2, dim=-1)
    return reference.act(a, activation) * b if activated == "first" else a * reference.act(b, activation)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("activation", "half"), EVERY)
def test_every_subset_of_gradients_is_eagers(activation: str, half: str, recompute: bool, launches: list[str]) -> None:
    for wanted in itertools.product([False, True], repeat=3):
        ours, theirs = leaves(2, 3, wanted=wanted), leaves(2, 3, wanted=wanted)
        out = linear_glu(*ours, activation, activated=half, recompute_preact=recompute)
        expected = eager(*theirs, activation, half)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        assert out.requires_grad == any(wanted)
        kernels = ["linear_act_fwd"]
        if any(wanted):
            d_out = torch.linspace(-1, 1, out.numel()).view_as(out)
            out.backward(d_out)
            expected.backward(d_out)
            kernels += ["linear_act_fwd", "act_bwd"] if recompute else ["act_bwd"]
        for mine, yours, flag in zip(ours, theirs, wanted, strict=True):
            assert (mine.grad is not None) == flag
            if flag:
                torch.testing.assert_close(mine.grad, yours.grad, rtol=1e-5, atol=1e-5)
        assert launches == kernels
        launches.clear()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("activation", "half"), [*EVERY[:2], ("relu", "first"), ("tanh", "second"), ("none", "first")])
def test_double_backward_matches_eager(activation: str, half: str, recompute: bool) -> None:
    for wanted in ((True, True, True), (True, False, False), (False, True, False)):
        inputs = leaves(2, 3, wanted=wanted)
        chosen = [t for t in inputs if t.requires_grad]

        def second(function, inputs=inputs, chosen=chosen, **options):
            out = function(*inputs, activation, activated=half, **options)
            first = torch.autograd.grad(out.square().sum(), chosen, create_graph=True)
            penalty = torch.stack([g.square().sum() for g in first]).sum()
            return [*first, *torch.autograd.grad(penalty, chosen, allow_unused=True)]

        for mine, theirs in zip(second(linear_glu, recompute_preact=recompute), second(eager), strict=True):
            assert (mine is None) == (theirs is None)
            if theirs is not None:
                assert float((mine - theirs).detach().abs().max()) <= 5e-6 * float(theirs.detach().abs().max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", ["pointer", "tma", "library"])
def test_recompute_gives_the_same_bits_from_less_memory(
    kernel: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chosen(M: int, N: int, K: int, dtype: str, *args: object, **kwargs: object) -> Config:
        return Config(kernel, dtype, *(() if kernel == "library" else (16, 32, 32, 1, 1)))

    monkeypatch.setattr(launcher, "get_config", chosen)
    results, kept = [], []
    for recompute in (False, True):
        i = make_inputs("unit", 19, 96, 72, dtype)
        inputs = [t.requires_grad_() for t in (i.x, i.weight, i.bias) if t is not None]
        out, saved = saved_bytes(lambda inputs=inputs, r=recompute: linear_glu(*inputs, recompute_preact=r))
        d_out = torch.randn(19, 48, generator=generator(1)).to(dtype)
        results.append([out, *torch.autograd.grad(out, inputs, d_out)])
        kept.append(set(saved))
    assert kept == [{(19, 72), (96, 72), (19, 96)}, {(19, 72), (96, 72), (96,)}]
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("shape", [(), (5,), (2, 1, 3), (0,), (2, 0)])
def test_leading_dimensions_are_kept(shape: tuple[int, ...], launches: list[str]) -> None:
    x, weight, bias = leaves(*shape)
    out = linear_glu(x, weight, bias)
    torch.testing.assert_close(out, eager(x, weight, bias), rtol=1e-5, atol=1e-5)
    out.sum().backward()
    assert launches == (["linear_act_fwd", "act_bwd"] if out.numel() else [])
    assert [t.grad.shape for t in (x, weight, bias)] == [(*shape, K), (2 * N, K), (2 * N,)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activated": "third"}, "activated must be one of first, second, got 'third'"),
        ({"activation": "swish"}, "unknown activation 'swish'; expected one of gelu"),
        ({"weight": torch.ones(7, K), "bias": None}, r"even number of rows, two halves, got shape \(7, 20\)"),
        ({"bias": torch.ones(N)}, r"bias must be \[14\]"),
    ],
)
def test_bad_input_is_named_before_anything_is_launched(change, message: str, launches: list[str]) -> None:
    x, weight, bias = leaves(2)
    with pytest.raises(ValueError, match=message):
        linear_glu(**{"x": x, "weight": weight, "bias": bias} | change)
    assert launches == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_eager(dtype: torch.dtype, launches: list[str]) -> None:
    ours, theirs = leaves(2, 3), leaves(2, 3)
    with torch.autocast("cpu", dtype=dtype):
        out, expected = linear_glu(*ours), eager(*theirs)
    assert out.dtype == expected.dtype == dtype
    out.sum().backward()
    expected.sum().backward()
    assert launches == ["linear_act_fwd", "act_bwd"]
    for mine, yours in zip(ours, theirs, strict=True):
        assert mine.grad.dtype == torch.float32
        torch.testing.assert_close(mine.grad, yours.grad, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    "function",
    [
        lambda f, x, w, b: f(x.double(), w.double(), b.double()),
        lambda f, x, w, b: f(torch._neg_view(x), w, b),
        lambda f, x, w, b: torch.func.vmap(lambda row: f(row, w, b))(x),
        lambda f, x, w, b: torch.func.jvp(lambda t: f(t, w, b), (x,), (torch.ones_like(x),))[1],
        lambda f, x, w, b: torch.func.hessian(lambda t: f(x, w, t).sum())(b),
    ],
    ids=["float64", "negated", "vmap", "jvp", "hessian"],
)
def test_what_no_kernel_serves_takes_the_pytorch_path(function, launches: list[str]) -> None:
    inputs = leaves(3, wanted=(False, False, False))
    torch.testing.assert_close(function(linear_glu, *inputs), function(eager, *inputs))
    assert launches == []


def test_the_switch_turns_the_kernels_off(monkeypatch: pytest.MonkeyPatch, launches: list[str]) -> None:
    monkeypatch.setenv("BERT_FUSED_DISABLE", "1")
    ours, theirs = leaves(3), leaves(3)
    linear_glu(*ours).sum().backward()
    eager(*theirs).sum().backward()
    assert all(torch.equal(mine.grad, yours.grad) for mine, yours in zip(ours, theirs, strict=True))
    assert launches == []


def test_a_plan_of_another_activation_or_half_is_never_used() -> None:
    """The four calls agree in all else that a plan depends on."""
    x, weight, bias = leaves(4, wanted=(False, False, False))
    for _ in range(2):
        for half in ("first", "second"):
            torch.testing.assert_close(
                linear_glu(x, weight, bias, activated=half), eager(x, weight, bias, "gelu", half)
            )
        assert linear_act(x, weight, bias).shape == (4, 2 * N)
        torch.testing.assert_close(linear_glu(x, weight, bias, "silu"), eager(x, weight, bias, "silu"))


@pytest.mark.parametrize("disabled", ["0", "1"])
@pytest.mark.parametrize("name", ["gelu(a)*b", "a*relu(b)"])
def test_the_operators_pass_opcheck(name: str, disabled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BERT_FUSED_DISABLE", disabled)
    for save_preact in (False, True):
        arguments = (*leaves(5), name, save_preact)
        torch.library.opcheck(torch.ops.bert_fused.linear_act_fwd, arguments)
    arguments = (torch.randn(N, 5).t(), torch.randn(5, 2 * N), name, True)
    torch.library.opcheck(torch.ops.bert_fused.linear_act_bwd, arguments)
    with pytest.raises(ValueError, match="differ in shape"):
        torch.ops.bert_fused.linear_act_bwd(torch.randn(5, N), torch.randn(5, N), name, True)


def test_a_compiled_training_step_has_eagers_gradients(launches: list[str]) -> None:
    """One graph for all rows, the same gradients, and the fused backward pass."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(linear_glu, fullgraph=True, dynamic=True, backend=counter)
    for rows in ((6,), (2, 3), (3, 4)):
        ours, theirs = leaves(*rows), leaves(*rows)
        out = compiled(*ours)
        out.square().sum().backward()
        expected = linear_glu(*theirs)
        expected.square().sum().backward()
        torch.testing.assert_close(out, expected)
        for mine, yours in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine.grad, yours.grad)
    assert launches == 6 * ["linear_act_fwd", "act_bwd"]
    assert counter.frame_count == 2  # of two and of three dimensions


def test_export_takes_the_aten_path() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return linear_glu(x, weight, bias)

    inputs = tuple(leaves(6, wanted=(False, False, False)))
    program = torch.export.export(Model(), inputs)
    assert not [node for node in program.graph.nodes if "bert_fused" in str(node.target)]
    torch.testing.assert_close(program.module()(*inputs), eager(*inputs))


layouts = st.sampled_from(LAYOUTS)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    sizes=st.tuples(st.integers(1, 60), st.integers(1, 60), st.integers(0, 60)),
    dtype=st.sampled_from(DTYPES),
    each=st.sampled_from(EVERY),
    regime=st.sampled_from(REGIMES),
    layout=st.tuples(layouts, layouts, layouts),
    bias=st.booleans(),
    grad=st.booleans(),
    autocast=st.sampled_from([None, None, torch.bfloat16]),
)
def test_any_call_is_within_the_bound_and_touches_its_own_memory_alone(
    sizes, dtype: torch.dtype, each, regime: str, layout, bias: bool, grad: bool, autocast: torch.dtype | None
) -> None:
    (rows, columns, inner), (activation, half) = sizes, each
    i = make_inputs(regime, rows, 2 * columns, inner, dtype, bias=bias)
    x, weight = (with_layout(t, name).requires_grad_(grad) for t, name in zip((i.x, i.weight), layout[:2], strict=True))
    cast = contextlib.nullcontext() if autocast is None else torch.autocast("cpu", dtype=autocast)
    with sanitized() as record, cast:
        out = linear_glu(x, weight, i.bias, activation, activated=half)
    assert len(record.launches) == 1
    x64, w64 = x.detach().to(out.dtype), weight.detach().to(out.dtype)
    b64 = i.bias.to(out.dtype) if i.bias is not None else None
    ref, bound = gated_bound(x64, w64, b64, activation, half)
    assert_within(out.detach(), ref, bound)
    if grad:
        d_out = with_layout(torch.randn(rows, columns, generator=generator(2)).to(out.dtype), layout[2])
        with sanitized() as record:
            ours = torch.autograd.grad(out, (x, weight), d_out)
        assert len(record.launches) == 1
        leaf = [t.double().requires_grad_() for t in (x64, w64)]
        exact = eager(*leaf, b64.double() if b64 is not None else None, activation, half)
        largest = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[out.dtype]
        for mine, ref in zip(ours, torch.autograd.grad(exact, leaf, d_out.double()), strict=True):
            assert mine.dtype == dtype
            if ref.numel() and activation != "relu":  # near zero a rounded pre-activation may have the other sign
                assert (mine.double() - ref).abs().max() <= largest * max(ref.abs().max(), 1e-3)


def test_names_cover_every_activation() -> None:
    assert set(NAMES.values()) == reference.GATED
