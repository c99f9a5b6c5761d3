"""oneDNN's linear layer with its activation."""

import logging
import re

import pytest
import torch
from cpu import GATED, NAMES
from gated64 import gated64
from models import blocks, make
from models import inputs as text
from reference64 import act64, linear64
from torch import Tensor, nn
from transformers import ModernBertConfig, ModernBertModel

import bert_fused
from bert_fused import linear_act, onednn
from bert_fused.kernels.gated import parse

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"vocab_size": 50, "pad_token_id": 0, "cls_token_id": 1, "bos_token_id": 1, "eos_token_id": 2}


def drawn(M: int, N: int, K: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(M)
    return [t.to(dtype) for t in (torch.randn(M, K), torch.randn(N, K) / K**0.5, torch.randn(N))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", [*NAMES, *GATED])
def test_errors_are_no_larger_than_eagers(activation, dtype, on_cpu) -> None:
    for M, with_bias in ((8, True), (33, False), (200, True)):
        x, weight, bias = drawn(M, 72, 96, dtype)
        bias = bias if with_bias else None
        preact = linear64(x, weight, bias)
        name, half = parse(activation)
        exact = gated64(preact, name, half) if half else act64(preact, name)
        ours = (linear_act(x, weight, bias, activation).double() - exact).abs()
        eager = (bert_fused.reference.linear_act(x, weight, bias, activation).double() - exact).abs()
        # In fp32 both round sums and activation alike, in another order.
        slack = 4e-6 if dtype == torch.float32 else 0.0
        if half and dtype == torch.bfloat16:  # it rounds twice, eager four times, which may add up to less
            assert (ours <= 1.01 * 2 * 2**-8 * exact.abs() + 1e-5).all()
        else:
            assert ours.max() <= 1.001 * eager.max() + slack
        assert ours.square().mean().sqrt() <= 1.001 * eager.square().mean().sqrt() + slack
    assert on_cpu == [activation] * 3


def test_erf_gelu_is_not_the_tanh_form(on_cpu) -> None:
    z = torch.linspace(-4, 4, 801)[:, None]
    one, none = torch.ones(1, 1), torch.zeros(1)
    for activation in ("gelu", "gelu_tanh"):
        out = linear_act(z, one, none, activation)
        assert (out.double() - act64(z, activation)).abs().max() <= 1e-6
    assert len(on_cpu) == 2


def test_a_changed_weight_or_bias_counts_at_once(on_cpu) -> None:
    x, weight, bias = drawn(16, 24, 32, torch.float32)
    before = linear_act(x, weight, bias)
    weight.mul_(2)
    bias.add_(1)
    after = linear_act(x, weight, bias)
    assert (after - bert_fused.reference.linear_act(x, weight, bias, "gelu")).abs().max() <= 1e-5
    assert (after - before).abs().max() > 0.1
    assert on_cpu == ["gelu", "gelu"]


@pytest.mark.parametrize("layout", ["3-D", "sliced", "transposed", "expanded", "first tokens"])
def test_any_strides_and_dimensions(layout, on_cpu) -> None:
    x, weight, bias = drawn(40, 24, 32, torch.float32)
    x = {
        "3-D": x.view(4, 10, 32),
        "sliced": torch.cat((x, x), 1)[:, 16:48],
        "transposed": x.t().contiguous().t(),
        "expanded": x[:1].expand(40, 32),
        "first tokens": x.view(20, 2, 32)[:, 0],
    }[layout]
    weight = weight.t().contiguous().t() if layout == "transposed" else weight
    out = linear_act(x, weight, bias)
    assert out.shape == (*x.shape[:-1], 24)
    assert (out - bert_fused.reference.linear_act(x, weight, bias, "gelu")).abs().max() <= 1e-5
    assert on_cpu == ["gelu"]


def test_pytorch_serves_what_onednn_does_not(on_cpu, monkeypatch) -> None:
    x, weight, bias = drawn(16, 24, 32, torch.float32)

    def expect_pytorch(*arguments) -> None:
        out = linear_act(*arguments)
        assert torch.equal(out, bert_fused.reference.linear_act(*arguments))
        assert on_cpu == []

    expect_pytorch(x[:7], weight, bias, "gelu")
    expect_pytorch(x, weight, bias, "quick_gelu")
    expect_pytorch(x.half(), weight.half(), bias.half(), "gelu")
    expect_pytorch(x.double(), weight.double(), bias.double(), "gelu")
    expect_pytorch(x[:, :0], weight[:, :0], bias, "gelu")
    with monkeypatch.context() as patch:
        patch.setenv("BERT_FUSED_DISABLE", "1")
        expect_pytorch(x, weight, bias, "gelu")
    with monkeypatch.context() as patch:
        patch.setattr(onednn, "_get_enabled", lambda: False)
        expect_pytorch(x, weight, bias, "gelu")
    with torch.autocast("cpu", torch.bfloat16):
        linear_act(x, weight, bias)
    assert on_cpu == []
    monkeypatch.setattr(onednn, "vendor", lambda: "another")
    onednn.from_rows.cache_clear()
    expect_pytorch(x, weight, bias, "gelu")


@pytest.mark.parametrize("which", [0, 1, 2])
def test_calls_that_need_a_gradient_take_pytorch(which, on_cpu) -> None:
    leaves = drawn(16, 24, 32, torch.float32)
    leaves[which].requires_grad_()
    for activation in ("gelu", "tanh"):
        out = linear_act(*leaves, activation)
        assert out.grad_fn is not None
        torch.autograd.grad(out.sum(), leaves[which])
    assert on_cpu == []
    with torch.no_grad():
        assert not linear_act(*leaves).requires_grad
    assert on_cpu == ["gelu"]


def test_transforms_and_compilers_see_torchs_operations(on_cpu) -> None:
    x, weight, bias = drawn(16, 24, 32, torch.float32)
    torch.func.vmap(lambda row: linear_act(row.expand(16, 32), weight, bias))(x)
    torch.compile(lambda x: linear_act(x, weight, bias), backend="eager", fullgraph=True)(x)
    assert on_cpu == []


def test_a_kept_call_asks_again_what_may_change(on_cpu, monkeypatch) -> None:
    x, weight, bias = drawn(16, 24, 32, torch.float32)
    expected = bert_fused.reference.linear_act(x, weight, bias, "gelu")
    for _ in range(2):
        linear_act(x, weight, bias)
    assert on_cpu == ["gelu"] * 2
    with monkeypatch.context() as patch:
        patch.setattr(onednn, "_get_enabled", lambda: False)
        assert torch.equal(linear_act(x, weight, bias), expected)
    monkeypatch.setenv("BERT_FUSED_DISABLE", "1")
    assert torch.equal(linear_act(x, weight, bias), expected)
    monkeypatch.delenv("BERT_FUSED_DISABLE")
    assert linear_act(x.requires_grad_(), weight, bias).grad_fn is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert linear_act(x.detach(), weight, bias).dtype == torch.bfloat16


def test_an_operator_that_differs_is_never_used(on_cpu, monkeypatch, caplog) -> None:
    x, weight, bias = drawn(16, 24, 32, torch.float32)
    onednn._agrees.cache_clear()
    monkeypatch.setattr(onednn, "linear_act", lambda x, w, b, a: bert_fused.reference.linear_act(x, w, None, a))
    with caplog.at_level(logging.WARNING, "bert_fused"):
        for _ in range(2):
            out = linear_act(x, weight, bias)
    assert torch.equal(out, bert_fused.reference.linear_act(x, weight, bias, "gelu"))
    assert len(caplog.messages) == 1
    assert re.match(r"using PyTorch instead of oneDNN for gelu in float32: it differs by \d", caplog.messages[0])


# -------------------------------------------------------------------------------------------------------------- modules


@torch.no_grad()
def test_a_fused_model_takes_it_and_says_so(on_cpu) -> None:
    model = make(hidden_size=64, intermediate_size=128)
    batch = text(rows=9)
    expected = model(**batch)
    with bert_fused.fused(model) as report:
        assert set(report.paths.values()) == {"oneDNN where no gradient is wanted"}
        assert len(report.paths) == 2 * 4 + 1
        got = model(**batch)
    for name in expected:
        assert (got[name] - expected[name]).abs().max() <= 1e-5
    assert on_cpu == 2 * [*4 * ["none"], "gelu", "none"] + ["tanh"]


@torch.no_grad()
def test_a_fused_gated_model_takes_it_and_says_so(on_cpu) -> None:
    model = ModernBertModel(ModernBertConfig(**SIZES)).eval()
    batch = {"input_ids": torch.arange(3, 27).view(2, 12)}
    expected = model(**batch).last_hidden_state
    with bert_fused.fused(model) as report:
        assert report.paths["layers.1.mlp"] == "oneDNN where no gradient is wanted"
        assert (model(**batch).last_hidden_state - expected).abs().max() <= 1e-5
        assert on_cpu == 2 * ["gelu(a)*b"]
        model(input_ids=batch["input_ids"][:1, :7])
        assert on_cpu == 2 * ["gelu(a)*b"]  # too few rows


@torch.no_grad()
def test_a_compiled_fused_model_is_one_graph_of_torchs_operations(on_cpu) -> None:
    model = make(hidden_size=64, intermediate_size=128)
    intermediate, pooler = blocks(model)[0], model.pooler
    bert_fused.fuse(model)
    hidden = torch.randn(16, 3, 64)
    for module in (intermediate, pooler):
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        assert torch.equal(compiled(hidden), type(module).original.forward(module, hidden))
    assert on_cpu == []


@torch.no_grad()
@pytest.mark.parametrize("guard", ["hook", "patched activation", "few rows", "gradients"])
def test_a_module_runs_hugging_faces_code_where_it_must(guard, on_cpu, monkeypatch) -> None:
    model = make(hidden_size=64, intermediate_size=128)
    intermediate = blocks(model)[0]
    bert_fused.fuse(model)
    hidden = torch.randn(7 if guard == "few rows" else 16, 64)
    if guard == "hook":
        intermediate.dense.register_forward_hook(lambda *_: None)
    elif guard == "patched activation":
        intermediate.intermediate_act_fn = nn.ReLU6()
    expected = type(intermediate).original.forward(intermediate, hidden)
    with torch.set_grad_enabled(guard == "gradients"):
        assert torch.equal(intermediate(hidden), expected)
    assert on_cpu == []
