"""``recompute_preact``: the same gradients from less memory."""

import copy
import math
import pickle

import pytest
import torch
from models import make
from reference64 import ACTIVATIONS, dtype_name, make_inputs
from tensors import saved_bytes
from torch import Tensor

import bert_fused
from bert_fused import cls_pool, linear_act
from bert_fused.kernels import linear_act as launcher
from bert_fused.kernels.configs import Config
from bert_fused.reference import NEEDS_PREACT

pytestmark = pytest.mark.usefixtures("poisoned_empty")

M, N, K = 19, 40, 72

all_activations = pytest.mark.parametrize("activation", ACTIVATIONS)


def leaves(dtype: torch.dtype = torch.float32, *, bias: bool = True) -> list[Tensor | None]:
    i = make_inputs("unit", M, N, K, dtype, bias=bias)
    return [t.requires_grad_() if t is not None else None for t in (i.x, i.weight, i.bias)]


@pytest.fixture(params=["pointer", "tma", "library"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    def chosen(M: int, N: int, K: int, dtype: str, *args: object, **kwargs: object) -> Config:
        tile = () if request.param == "library" else (16, 32, 32, 1, 1)
        return Config(request.param, dtype, *tile)

    monkeypatch.setattr(launcher, "get_config", chosen)
    return str(request.param)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    ("activation", "dtype"),
    [("gelu", torch.float16), ("gelu", torch.bfloat16), *((a, torch.float32) for a in ACTIVATIONS)],
)
def test_recompute_gives_gradients_of_the_same_bits(activation: str, dtype: torch.dtype) -> None:
    results = []
    for recompute in (False, True):
        inputs = leaves(dtype)
        out = linear_act(*inputs, activation, recompute_preact=recompute)
        d_out = torch.randn(M, N, generator=torch.Generator().manual_seed(1)).to(dtype)
        results.append([out, *torch.autograd.grad(out, inputs, d_out)])
    for kept, recomputed in zip(*results, strict=True):
        assert torch.equal(kept, recomputed)
        assert bool(kept.isfinite().all())


@all_activations
def test_recompute_keeps_no_preactivation(activation: str) -> None:
    """x, weight and bias are there anyway; the pre-activation is the one large tensor that only we would keep alive."""
    inputs = leaves(torch.float16)
    _, kept = saved_bytes(lambda: linear_act(*inputs, activation))
    _, recomputing = saved_bytes(lambda: linear_act(*inputs, activation, recompute_preact=True))
    if activation in NEEDS_PREACT:
        assert kept == {(M, K): 2 * M * K, (N, K): 2 * N * K, (M, N): 2 * M * N}
        assert recomputing == {(M, K): 2 * M * K, (N, K): 2 * N * K, (N,): 2 * N}
    else:
        assert kept == recomputing
        assert ((M, N) in kept) == (activation != "none")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
def test_recompute_under_autocast_gives_the_same_bits(dtype: torch.dtype) -> None:
    """The backward pass runs outside the autocast region, and computes again in its dtype all the same."""
    results = []
    for recompute in (False, True):
        inputs = leaves()
        with torch.autocast("cpu", dtype=dtype):
            out = linear_act(*inputs, recompute_preact=recompute)
        assert out.dtype == dtype
        results.append(torch.autograd.grad(out.float().square().sum(), inputs))
    for kept, recomputed in zip(*results, strict=True):
        assert recomputed.dtype == torch.float32
        assert torch.equal(kept, recomputed)


@pytest.mark.parametrize("which", [0, 1, 2], ids=["x", "weight", "bias"])
def test_an_input_changed_before_it_is_recomputed_is_noticed(which: int) -> None:
    inputs = leaves()
    out = linear_act(*inputs, recompute_preact=True)
    with torch.no_grad():
        inputs[which].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_cls_pool_recomputes_too() -> None:
    _, weight, bias = leaves()
    hidden = torch.randn(M, 3, K, generator=torch.Generator().manual_seed(0))
    _, kept = saved_bytes(lambda: cls_pool(hidden, weight, bias, "gelu"))
    _, recomputing = saved_bytes(lambda: cls_pool(hidden, weight, bias, "gelu", recompute_preact=True))
    assert (M, N) in kept
    assert (M, N) not in recomputing


# --------------------------------------------------------------------------------------------------------- whole models

IDS = torch.arange(2, 26).view(3, 8)


def train(model: torch.nn.Module) -> tuple[list[Tensor], dict[tuple[int, ...], int]]:
    model.zero_grad()
    out, kept = saved_bytes(lambda: model(IDS).pooler_output)
    out.square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None], kept


def test_a_fused_model_trains_in_less_memory() -> None:
    model = make().train()
    preact = (*IDS.shape, model.config.intermediate_size)
    bert_fused.fuse(model)
    gradients, kept = train(model)
    bert_fused.fuse(model, recompute_preact=True)
    same, recomputing = train(model)
    assert all(torch.equal(a, b) for a, b in zip(gradients, same, strict=True))
    preacts = model.config.num_hidden_layers * 4 * math.prod(preact)
    assert kept[preact] - recomputing.get(preact, 0) == preacts
    assert sum(kept.values()) - sum(recomputing.values()) >= 0.9 * preacts


def flags(model: torch.nn.Module) -> list[bool]:
    return [m.recompute_preact for m in model.modules() if hasattr(m, "recompute_preact")]


def test_recompute_stays_until_a_later_fuse_or_unfuse() -> None:
    model = make()
    before = [dict(module.__dict__) for module in model.modules()]
    bert_fused.fuse(model, recompute_preact=True)
    assert flags(model) == [True] * 3
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert flags(other) == [True] * 3
    bert_fused.verify(model, input_ids=IDS)
    with bert_fused.fused(model):
        assert flags(model) == [True] * 3
    assert flags(model) == [True] * 3
    bert_fused.fuse(model)
    assert flags(model) == [False] * 3
    bert_fused.fuse(model, recompute_preact=True)
    bert_fused.unfuse(model)
    assert flags(model) == []
    assert [dict(module.__dict__).keys() for module in model.modules()] == [state.keys() for state in before]


def test_recompute_ends_with_the_context() -> None:
    model = make()
    with bert_fused.fused(model, recompute_preact=True):
        assert flags(model) == [True] * 3
    assert flags(model) == []
    bert_fused.fuse(model)
    assert flags(model) == [False] * 3
    with bert_fused.fused(model, recompute_preact=True):
        assert flags(model) == [False] * 3
