"""Gated activations on an NVIDIA GPU. ``make gpu-test`` runs this."""

import pytest
import torch
from gated64 import gated64, gated_bound
from gpu import DEVICE, EMULATED, HAS_GPU, MARKS, inputs
from reference64 import DTYPES, assert_grad, assert_within, dtype_name, generator, linear64

from bert_fused import linear_glu, reference
from bert_fused.kernels.configs import Config
from bert_fused.kernels.gated import gated_configs
from bert_fused.kernels.linear_act import linear_act_fwd
from bert_fused.kernels.runtime import arch_of

pytestmark = MARKS

CONFIGS = (Config("pointer", "float16", 32, 32, 32, 4, 1),)
if HAS_GPU or EMULATED:  # in the emulator a few: tests/ptx runs all
    CONFIGS = tuple(gated_configs(arch_of(DEVICE)))[:: 1 if HAS_GPU else 7]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.dtype} {config}".replace(" ", "-"))
@pytest.mark.parametrize("K", [256, 208], ids=["whole-k", "ragged-k"])
@pytest.mark.usefixtures("poisoned_empty")
def test_every_gated_configuration_is_exact_on_integers(K: int, config: Config) -> None:
    """Halves of whole tiles and, through pointers, of a part of one."""
    dtype = torch.float32 if config.dtype == "tf32" else getattr(torch, config.dtype)
    N = 2 * config.block_n + (0 if config.kernel == "tma" else 8)
    data = inputs("integers", 150, 2 * N, K, dtype)
    out, preact = linear_act_fwd(
        data.x, data.weight, data.bias, activation="relu(a)*b", save_preact=True, config=config
    )
    z = linear64(data.x, data.weight, data.bias)
    assert torch.equal(preact.double(), z)
    assert torch.equal(out, gated64(z, "relu", "first").to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("half", ["first", "second"])
@pytest.mark.usefixtures("poisoned_empty")
def test_a_training_step_is_as_exact_as_eagers(half: str, dtype: torch.dtype) -> None:
    """In 16 bits by a tile, in fp32 by cuBLAS and one pass."""
    data = inputs("unit", 70, 160, 96, dtype)
    leaves = [[t.clone().requires_grad_() for t in (data.x, data.weight, data.bias)] for _ in range(2)]
    out = linear_glu(*leaves[0], activated=half)
    ref, bound = gated_bound(data.x, data.weight, data.bias, "gelu", half)
    assert_within(out.detach(), ref, bound)
    d_out = torch.randn(70, 80, generator=generator(2)).to(DEVICE, dtype)
    name = reference.gated("gelu", half)
    exact = [t.detach().double().requires_grad_() for t in leaves[0]]
    calls = ((out, leaves[0]), *((reference.linear_act(*of, name), of) for of in (leaves[1], exact)))
    ours, eager, refs = (torch.autograd.grad(y, of, d_out.to(y.dtype)) for y, of in calls)
    for what, mine, theirs, wanted in zip(("d_x", "d_weight", "d_bias"), ours, eager, refs, strict=True):
        assert_grad(mine, theirs, wanted, what)
