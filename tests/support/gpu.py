"""Inputs, gradients and markers that the tests on a GPU share.

BERT_FUSED_TEST_GPU=1 TRITON_INTERPRET=1 rehearses them on a CPU, without the tests of streams, graphs and devices.
``tests/ptx/test_whole_path.py`` runs the same ones with the compiled kernels, in the PTX emulator.
"""

import os
from collections.abc import Callable

import pytest
import torch
from reference64 import Inputs, make_inputs
from torch import Tensor

HAS_GPU = torch.cuda.is_available()
EMULATED = "BERT_FUSED_EMULATE" in os.environ
DEVICE = torch.device("cuda", 0) if HAS_GPU else torch.device("cpu")

# A warning that another version of torch gives must not fail a run on a GPU.
MARKS = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU")


def inputs(regime: str, M: int, N: int, K: int, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """``reference64.make_inputs`` on the GPU."""
    made = make_inputs(regime, M, N, K, dtype, seed=seed)
    return Inputs(made.x.to(DEVICE), made.weight.to(DEVICE), made.bias.to(DEVICE))


def gradients(function: Callable[..., Tensor], data: Inputs, activation: str, d_out: Tensor) -> tuple[Tensor, ...]:
    """Gradients of ``function(x, weight, bias, activation)`` with respect to the three tensors."""
    leaves = [tensor.clone().requires_grad_() for tensor in (data.x, data.weight, data.bias)]
    return torch.autograd.grad(function(*leaves, activation), leaves, d_out)
