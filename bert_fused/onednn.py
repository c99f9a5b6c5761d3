"""On a CPU: oneDNN's linear layer with the activation behind its product, in one call, where that was measured faster.

The operator is ``mkldnn::_linear_pointwise``, which Inductor emits for the same pair. It applies the activation to the
sum before that is rounded to 16 bits. It has no derivative, so calls that need one take PyTorch.
"""

import functools
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from . import reference
from .fallback import is_disabled, mode_reason, tensor_reason

# Activation -> the operator's name and algorithm for it; quick_gelu is not among them.
_NAMES = {
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
    "tanh": ("tanh", ""),
    "none": ("none", ""),
}
# CPU vendor and dtype -> the fewest rows from which on oneDNN's call was faster than PyTorch's two. What is not here
# was not faster, or not measured. Eager's time over oneDNN's, one thread, torch 2.13, BERT's layers, November 2026:
# AMD EPYC (AVX-512): fp32 1.98 to 2.44 from 32 rows on, since PyTorch's product there is MKL's, 0.8 at 1 row; bf16
# 1.04 to 1.41. Intel Xeon (AMX): bf16 1.08 to 1.24 with GELU and 1.1 to 2.1 with tanh; fp32 0.5 to 1.06.
_FROM_ROWS = {
    ("AuthenticAMD", torch.float32): 32,
    ("AuthenticAMD", torch.bfloat16): 32,
    ("GenuineIntel", torch.bfloat16): 8,
}
# Largest difference from PyTorch's two calls that is let through, relative to the largest result.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

_get_enabled: Callable[[], bool] = torch._C._get_mkldnn_enabled
_operator = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def cpu_info(field: str) -> str:
    """Return what Linux says of the CPU, as "vendor_id" or "model name"; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(": ")[2] for line in lines if line.startswith(field)), "")


@functools.cache
def vendor() -> str:
    return cpu_info("vendor_id")


@functools.cache
def from_rows() -> dict[torch.dtype, int]:
    """Return the dtypes that oneDNN serves on this CPU, and the fewest rows of each."""
    if _operator is None or not torch.backends.mkldnn.is_available():
        return {}
    return {dtype: rows for (name, dtype), rows in _FROM_ROWS.items() if name == vendor()}


def serves(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> bool:
    """Return whether oneDNN serves a call of ``linear_act`` that needs no gradient and has passed its checks."""
    return (
        x.device.type == "cpu"
        and x.dtype in from_rows()
        and x.shape[:-1].numel() >= from_rows()[x.dtype]
        and weight.numel() > 0
        and not is_disabled()
        and _get_enabled()
        and not torch.is_autocast_enabled("cpu")
        and mode_reason() is None
        and all(tensor is None or tensor_reason(tensor) is None for tensor in (x, weight, bias))
        and _agrees(x.dtype, activation)
    )


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """Return ``act(x @ weight.T + bias)``, ``[..., N]``, for a call that ``serves`` accepts; in no graph."""
    name, algorithm = _NAMES[activation]
    with torch.no_grad():
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, name, [], algorithm)
    return out


@functools.cache
def _agrees(dtype: torch.dtype, activation: str) -> bool:
    """Compare the operator with PyTorch, once in a process; warn if they differ, and then never use it again."""
    if activation not in _NAMES:
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*size, generator=generator).to(dtype) for size in ((33, 48), (40, 48), (40,)))
    expected = reference.linear_act(x, weight, bias, activation)
    try:
        difference = (linear_act(x, weight, bias, activation) - expected).abs().max() / expected.abs().max()
    except RuntimeError as error:
        difference, why = torch.tensor(torch.inf), str(error)
    else:
        why = f"it differs by {difference:.1e}"
    if difference <= _TOLERANCE[dtype]:
        return True
    logging.getLogger("bert_fused").warning(
        "using PyTorch instead of oneDNN for %s in %s: %s", activation, str(dtype).removeprefix("torch."), why
    )
    return False
