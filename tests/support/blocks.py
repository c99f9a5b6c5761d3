"""A fused block beside Hugging Face's own: the outputs, the gradients and which path ran."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import blocks, make
from torch import Tensor, nn
from transformers import DistilBertConfig, ViTConfig
from transformers.models.distilbert.modeling_distilbert import FFN
from transformers.models.vit.modeling_vit import ViTMLP

from bert_fused import fuse

KERNELS = ["linear_act_fwd", "act_bwd"]
PYTORCH: list[str] = []

# Of BERT, of ViT and of DistilBERT, whose method is not its forward.
KINDS = ("intermediate", "pooler", "mlp", "ffn")
every_kind = pytest.mark.parametrize("kind", KINDS)
when_fused = pytest.mark.parametrize("when", ["before", "after"])


def twins(kind: str) -> tuple[nn.Module, nn.Module]:
    """Two equal blocks of Hugging Face's: one to be fused, and one to compare it with."""
    if kind in ("mlp", "ffn"):
        torch.manual_seed(0)
        settings = DistilBertConfig(dim=32, hidden_dim=37, dropout=0.0, n_heads=4)
        block = FFN(settings) if kind == "ffn" else ViTMLP(ViTConfig(hidden_size=32, intermediate_size=37))
        return block, copy.deepcopy(block)
    ours, theirs = make(), make()
    return (ours.pooler, theirs.pooler) if kind == "pooler" else (blocks(ours)[0], blocks(theirs)[0])


def hidden_states(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1)).to(dtype)


def fused_twins(kind: str) -> tuple[nn.Module, nn.Module]:
    ours, theirs = twins(kind)
    assert fuse(ours).fused == ("",)
    return ours, theirs


def change_both(ours: nn.Module, theirs: nn.Module, change: Callable[[Any], Any]) -> None:
    """Change both blocks, from the same random state."""
    for block in (ours, theirs):
        torch.manual_seed(2)
        change(block)


def act_of(block: nn.Module) -> str:
    return next(name for name in ("activation", "intermediate_act_fn", "activation_fn") if hasattr(block, name))


def act(block: nn.Module) -> nn.Module:
    return getattr(block, act_of(block))


def linear_name(block: nn.Module) -> str:
    return next(name for name in ("dense", "fc1", "lin1") if hasattr(block, name))


def linear(block: nn.Module) -> nn.Linear:
    return getattr(block, linear_name(block))


def step(block: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    """The output and every gradient of one step."""
    block.zero_grad()
    leaf = x.clone().requires_grad_()
    out = block(leaf)
    out.backward(torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype))
    gradients = {name: p.grad for name, p in block.named_parameters()}
    return {"out": out.detach(), "hidden_states": leaf.grad} | gradients


def assert_runs(
    path: list[str], ours: nn.Module, theirs: nn.Module, launches: list[str], x: Tensor | None = None
) -> None:
    """One step of ``ours`` launches the kernels of ``path`` and gives what ``theirs`` gives."""
    x = hidden_states() if x is None else x
    expected = step(theirs, x)
    launches.clear()
    found = step(ours, x)
    assert launches == path
    assert found.keys() == expected.keys()
    tolerance = 2e-3 if x.dtype == torch.float16 else 0.02 if x.dtype == torch.bfloat16 else 2e-5
    for name, other in expected.items():
        mine = found[name]
        assert (mine is None) == (other is None), name
        if mine is not None and other is not None:
            assert mine.dtype == other.dtype
            assert float((mine - other).abs().max()) <= tolerance * max(1.0, float(other.abs().max())), name


def doubled(*arguments: Any) -> Tensor:
    """A forward hook's or pre-hook's result: its last argument, doubled."""
    value = arguments[-1][0] if isinstance(arguments[-1], tuple) else arguments[-1]
    return value * 2
