"""On a CPU: oneDNN's linear layer with the activation behind its product, in one call, where that was measured faster.

The operator is ``mkldnn::_linear_pointwise``, which Inductor emits for the same pair. It applies the activation to the
sum before that is rounded to 16 bits. Two calls serve a gated activation: one for the half that is activated, one for
the other half, which multiplies by the first's result. The operator has no derivative, so calls that need one take
PyTorch.
"""

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from . import reference
from .fallback import interpreted, is_disabled, mode_reason, tensor_reason
from .kernels.gated import parse

# Activation -> the operator's name and algorithm for it; quick_gelu is not among them.
_NAMES = {
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
    "tanh": ("tanh", ""),
    "none": ("none", ""),
}
# Whether an activation follows the linear layer, or none does, or it is a gated one.
Kind = Literal["activation", "alone", "gated"]
# CPU vendor and dtype -> the fewest rows from which on oneDNN's call was faster than PyTorch's two, by whole models,
# where every layer's weight comes from memory: a layer alone, called again and again, gains where a model loses. What
# is not here was not faster, or not measured. Eager's time over oneDNN's, MiniLM on one thread, torch 2.13, Nov. 2026.
# AMD EPYC (AVX-512): fp32 1.36 at 16 rows, 1.2 to 1.3 from 128 on, since PyTorch's product there is MKL's; bf16 0.9 to
# 1.05, and 1.36 at 4096. Intel Xeon (AMX): bf16 0.93 at 16 rows, 1.01 at 256, 1.03 at 512, 1.14 at 1024, 1.16 at 2048;
# fp32 not faster: a layer alone 0.5 to 1.14.
_FROM_ROWS = {
    ("AuthenticAMD", torch.float32): 8,
    ("AuthenticAMD", torch.bfloat16): 4096,
    ("GenuineIntel", torch.bfloat16): 512,
}
# The same for a gated activation, by ModernBERT-base. Intel Xeon: bf16 0.96 at 16 rows, 0.99 at 128, 1.03 at 256 and
# 512, 1.00 at 1024, 1.07 at 2048 (the layer alone 1.02 to 1.07 at 128 rows, 1.2 at 2048); fp32 not faster.
_FROM_ROWS_GATED = {("GenuineIntel", torch.bfloat16): 256}
# The same for a linear layer without an activation, on top of those with one. AMD EPYC: fp32 1.38 to 2.08 for every
# layer of MiniLM. Intel Xeon: bf16 0.97 at 256 rows, 0.99 at 512 and 1024, 1.07 at 2048.
_FROM_ROWS_ALONE = {("AuthenticAMD", torch.float32): 8, ("GenuineIntel", torch.bfloat16): 2048}
# Largest difference from PyTorch's two calls that is let through, relative to the largest result.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

_get_enabled: Callable[[], bool] = torch._C._get_mkldnn_enabled
# Looked up here once: a module asks in each call, and torch's namespace is seldom in a CPU's cache.
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_operator: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


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
def from_rows(kind: Kind = "activation") -> dict[torch.dtype, int]:
    """Return the dtypes that oneDNN serves on this CPU, and the fewest rows of each."""
    if _operator is None or not torch.backends.mkldnn.is_available() or interpreted():
        return {}
    table = {"activation": _FROM_ROWS, "alone": _FROM_ROWS_ALONE, "gated": _FROM_ROWS_GATED}[kind]
    return {dtype: rows for (name, dtype), rows in table.items() if name == vendor()}


def serves(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> bool:
    """Return whether oneDNN serves a call of ``linear_act`` that needs no gradient and has passed its checks."""
    kind: Kind = "gated" if parse(activation)[1] else "alone" if activation == "none" else "activation"
    fewest = from_rows(kind).get(x.dtype)
    return (
        x.device.type == "cpu"
        and fewest is not None
        and x.shape[:-1].numel() >= fewest
        and weight.numel() > 0
        and not is_disabled()
        and _get_enabled()
        and not torch.is_autocast_enabled("cpu")
        and mode_reason() is None
        and all(tensor is None or tensor_reason(tensor) is None for tensor in (x, weight, bias))
        and _agrees(x.dtype, activation)
    )


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """Return what ``reference.linear_act`` does, for a call that ``serves`` accepts."""
    if not _get_enabled():  # by torch.backends.mkldnn, since an equal call was served
        return reference.linear_act(x, weight, bias, activation)
    name, half = parse(activation)
    pointwise, algorithm = _NAMES[name]
    if not half:
        out: Tensor = _operator(x, weight, bias, pointwise, [], algorithm)
        return out
    act, other = (0, 1) if half == "first" else (1, 0)
    weights, biases = weight.chunk(2), (None, None) if bias is None else bias.chunk(2)
    activated = _operator(x, weights[act], biases[act], pointwise, [], algorithm)
    out = _operator.binary(x, activated, weights[other], biases[other], "mul")
    return out


def may_serve(dtype: torch.dtype, rows: int, kind: Kind = "activation") -> bool:
    """Tell whether oneDNN may serve a call now, before its tensors are looked at."""
    if _is_compiling() or _is_grad_enabled():
        return False
    fewest = from_rows(kind).get(dtype)
    return fewest is not None and rows >= fewest


@functools.cache
def _agrees(dtype: torch.dtype, activation: str) -> bool:
    """Compare the operator with PyTorch, once in a process; warn if they differ, and then never use it again."""
    if parse(activation)[0] not in _NAMES:
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
