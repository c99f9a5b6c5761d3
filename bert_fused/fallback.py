"""Decide which path serves a call: a Triton kernel, or plain PyTorch and the reason for it."""

import functools
import importlib.util
import logging
import os
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

logger = logging.getLogger("bert_fused")

HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:
    from .kernels import runtime

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# The interpreter computes bfloat16 on its bit patterns (triton-lang/triton#11584).
INTERPRETER_DTYPES = (torch.float16, torch.float32)
MIN_ARCH = 80

_PLAIN = (torch.nn.Parameter, Tensor)
# os.environ encodes and decodes on every look-up, which costs as much as a launch.
_environment: Any = getattr(os.environ, "_data", os.environ)
_SWITCH = b"BERT_FUSED_DISABLE" if _environment is not os.environ and os.name == "posix" else "BERT_FUSED_DISABLE"
_NOT_SET = (None, b"", b"0", "", "0")

_peek_interpreter_stack = torch._C._functorch.peek_interpreter_stack
_len_torch_dispatch_stack = torch._C._len_torch_dispatch_stack
_is_tracing = torch._C._is_tracing
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled


def _gpu_reason(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "ROCm is not supported"
    arch = runtime.arch_of(device)
    return None if arch >= MIN_ARCH else f"sm_{arch} is older than sm_{MIN_ARCH}"


def interpreted() -> bool:
    """Return whether kernels run in Triton's interpreter (``TRITON_INTERPRET=1`` when Triton was imported)."""
    return HAS_TRITON and runtime.INTERPRETED


def is_disabled() -> bool:
    """Return whether ``BERT_FUSED_DISABLE`` is set."""
    return _environment.get(_SWITCH) not in _NOT_SET


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def device_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why tensors of this device and dtype take the PyTorch path, or None if a kernel serves them."""
    if is_disabled():
        return "BERT_FUSED_DISABLE is set"
    if dtype not in KERNEL_DTYPES:
        return f"{str(dtype).removeprefix('torch.')} has no kernel"
    if not HAS_TRITON:
        return "Triton is not installed"
    if device.type not in ("cpu", "cuda"):
        return f"{device.type} is not an NVIDIA GPU"
    if interpreted():
        return None if dtype in INTERPRETER_DTYPES else "Triton's interpreter computes bfloat16 wrongly"
    return "cpu is not an NVIDIA GPU" if device.type == "cpu" else _gpu_reason(device)


def tensor_reason(tensor: Tensor) -> str | None:
    """Return why a kernel cannot read a tensor as a plain block of numbers, or None."""
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return f"{type(tensor).__name__} is a tensor subclass"
    if tensor.layout is not torch.strided or tensor.is_nested:
        return f"layout {tensor.layout} is not strided"
    if not torch.compiler.is_compiling() and (tensor.is_neg() or tensor._is_zerotensor()):
        return "the tensor is lazily negated or zero"
    return None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _tracer_reason() -> str | None:
    # Dynamo must not trace this: it takes both conditions for true in every case (is_exporting up to torch 2.11).
    if torch.compiler.is_exporting():
        return "torch.export is tracing"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a torch.func transform is active"
    return None


def forward_ad_is_active() -> bool:
    """Return whether forward-mode automatic differentiation is on; kernels have no rule for it."""
    return torch.autograd.forward_ad._current_level >= 0


def mode_reason() -> str | None:
    """Return why PyTorch must see this call's operations, which a raw launch would hide; None if it need not."""
    reason = _tracer_reason()
    if reason is not None:
        return cast(str, reason)
    if forward_ad_is_active():
        return "forward-mode automatic differentiation is active"
    if torch.compiler.is_compiling():
        return None
    if torch._C._len_torch_dispatch_stack() > 0:
        return "a TorchDispatchMode is active"
    if torch._C._is_tracing():
        return "torch.jit is tracing"
    return None


def reading_reason(tensor: Tensor) -> str | None:
    """Return why this call cannot read a tensor's values, or must not let them decide what it computes, or None."""
    reason = _tracer_reason()
    if reason is not None:
        return cast(str, reason)
    if tensor.is_meta:
        return "it is on the meta device"
    if torch.compiler.is_compiling():
        return None
    if torch._C._is_tracing():
        return "torch.jit is tracing"
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured"
    return None


def is_plain(x: Any, weight: Any, bias: Any) -> bool:
    """Return whether there are kernels, and no subclass, mode, transform, tracing, autocast or negated tensor.

    Assumes that torch.compile and torch.export are not tracing. These are the checks of ``fallback_reason`` that do not
    depend on dtype, device or shape, in the fewest steps: a new reason belongs into both. A lazily zero tensor passes;
    its key has no plan.
    """
    return (
        HAS_TRITON
        and type(x) is Tensor
        and type(weight) in _PLAIN
        and (bias is None or type(bias) in _PLAIN)
        and _environment.get(_SWITCH) in _NOT_SET
        and _peek_interpreter_stack() is None
        and not _len_torch_dispatch_stack()
        and not _is_tracing()
        and forward_ad._current_level < 0
        and not _is_any_autocast_enabled()
        and not (x.is_neg() or weight.is_neg())
        and (bias is None or not bias.is_neg())
    )


def fallback_reason(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Return why this call takes the PyTorch path, or None if a kernel serves it."""
    reason = mode_reason() or device_reason(x.device, x.dtype) or tensor_reason(x) or tensor_reason(weight)
    return reason or (tensor_reason(bias) if bias is not None else None)


@functools.cache
def log_once(reason: str) -> None:
    """Warn, once for each reason, that a call on an NVIDIA GPU takes the PyTorch path."""
    logger.warning("using PyTorch instead of a fused kernel: %s", reason)
