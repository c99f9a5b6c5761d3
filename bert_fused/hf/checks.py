"""Decide whether a module of Hugging Face's may run its kernel: when it is fused, and again in every call.

Users add adapters, hooks and quantised layers at any time, so a call checks all that may have changed since fusing.
Needs transformers.
"""

import functools
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers import activations as hf

from .. import onednn
from ..fallback import interpreted, tensor_reason
from ..guards import class_is_patched, forwards, hook_reason, is_defined_in, touched
from ..ops import path_name
from .recognize import Block, formula_of

# Whether a kernel serves CPU tensors: in the interpreter. Read once: asking in each call would take microseconds.
_CPU_HAS_KERNELS = interpreted()

_ACTIVATION_OF_TYPE: dict[type, str] = {
    hf.GELUActivation: "gelu",
    hf.FastGELUActivation: "gelu_tanh",
    hf.QuickGELUActivation: "quick_gelu",
    hf.SiLUActivation: "silu",
    hf.LinearActivation: "none",
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    nn.Tanh: "tanh",
    nn.Identity: "none",
}
_ACTIVATION_OF_FUNCTION: dict[object, str] = {
    F.gelu: "gelu",
    F.relu: "relu",
    torch.relu: "relu",
    F.silu: "silu",
    F.tanh: "tanh",
    torch.tanh: "tanh",
}


def step_aside_reason(module: nn.Module, original: type[nn.Module], block: Block) -> str | None:
    """Return why a module must run the code of ``original``, its class in transformers, or None."""
    for name in ("forward", block.method):
        if name in module.__dict__:
            return f"its {name} was replaced on the instance"
    if class_is_patched(original) or not is_defined_in(getattr(original, block.method), original.__module__):
        return "its class's forward was replaced"
    linear = getattr(module, block.linear, None)
    reason = linear_reason(linear, block.linear)
    if reason is not None or not isinstance(linear, nn.Linear):
        return reason
    for name, parameter in (("weight", linear.weight), ("bias", linear.bias)):
        if parameter is not None:
            reason = None if _is_gathered(linear, parameter) else tensor_reason(parameter)
            if reason is None and parameter.is_meta:
                reason = "it is on the meta device"
            if reason is not None:
                return f"its {block.linear} {name} cannot be read by a kernel: {reason}"
    function = activation_of(module, original, block)
    if activation_name(function) is None:
        return f"its activation, {_describe(function)}, has no kernel"
    return None


def linear_reason(linear: object, name: str = "dense") -> str | None:
    """Return why ``linear`` may compute something else than ``F.linear`` of its weight and bias, or None."""
    if type(linear) is not nn.Linear:
        return f"its {name} layer is a {type(linear).__module__}.{type(linear).__qualname__}, not a plain nn.Linear"
    if class_is_patched(nn.Linear):
        return "nn.Linear.forward was replaced"
    reason = hook_reason(linear)
    return f"its {name} layer has {reason}" if reason is not None else None


def _is_gathered(linear: nn.Module, parameter: Tensor) -> bool:
    """Tell whether FSDP2 holds a parameter as a shard between calls and as a whole, plain tensor during them.

    A tensor-parallel parameter is a DTensor during calls too; its linear layer has hooks, which are checked before.
    """
    return type(parameter).__name__ == "DTensor" and bool(getattr(linear, "_is_fsdp_managed_module", False))


def path_of(module: nn.Module, block: Block) -> str:
    """Return which path a fused module takes on its weight's device, as the report prints it."""
    weight: Tensor = getattr(module, block.linear).weight
    path = path_name(weight.device, weight.dtype, "gated" if block.half else "activation")
    return f"{path} in eval mode, since dropout comes first" if block.dropout else path


def activation_now(function: Any, linear: Any, hidden: Tensor, first: bool, half: str) -> str | None:
    """Return the kernels' name for a module's activation, or None if the module must step aside in this call.

    first: the module reads position 0 only. half: the half that a gated module activates, or "".

    Checks everything that can change between calls, but not the tensors, which ``linear_act`` checks. The usual case
    comes first, since every call pays for it.
    """
    if type(hidden) is not Tensor or not (hidden.is_cuda or _CPU_HAS_KERNELS or _onednn_may_serve(hidden, first, half)):
        return None
    kind = type(function)
    name = _ACTIVATION_OF_TYPE.get(kind)
    if (
        name is not None
        and type(linear) is nn.Linear
        and nn.Linear.forward is forwards.get(nn.Linear)
        and kind.forward is forwards.get(kind)
        and not touched((linear, function))
        and not _has_any_global_hook()
        and (kind is not hf.GELUActivation or function.act is F.gelu)
    ):
        return name
    return activation_name(function) if linear_reason(linear) is None else None


def _onednn_may_serve(hidden: Tensor, first: bool, half: str) -> bool:
    """Tell whether oneDNN may serve a call on a CPU. Others go to Hugging Face's code, which costs nothing more."""
    if not hidden.dim():
        return False
    rows = hidden.shape[0] if first else hidden.shape[:-1].numel()
    return onednn.may_serve(hidden.dtype, rows, "gated" if half else "activation")


def dropout_is_active(module: nn.Module) -> bool:
    """Tell whether a module's attribute ``dropout`` may change its input; True if it is not a plain dropout."""
    dropout = getattr(module, "dropout", None)
    if type(dropout) is not nn.Dropout or hook_reason(dropout) is not None or class_is_patched(nn.Dropout):
        return True
    return dropout.training and dropout.p > 0


def activation_name(function: object) -> str | None:
    """Return the kernels' name for an activation of transformers or torch, a module or a function; None if unknown."""
    if not isinstance(function, nn.Module):
        try:
            return _ACTIVATION_OF_FUNCTION.get(function) or formula_of(function)
        except TypeError:  # unhashable
            return None
    kind, act = type(function), getattr(function, "act", None)
    if hook_reason(function) is not None or class_is_patched(kind):
        return None
    if kind is hf.GELUActivation:
        return "gelu" if act is F.gelu or act == function._gelu_python else None
    if kind is hf.GELUTanh and isinstance(act, functools.partial):
        same = act.func is F.gelu and act.keywords == {"approximate": "tanh"} and not act.args
        return "gelu_tanh" if same else None
    if kind is hf.GELUTanh and act != function._gelu_tanh_python:
        return None
    if kind in (hf.GELUTanh, hf.NewGELUActivation, hf.AccurateGELUActivation):
        # Under autocast their torch.pow runs in fp32, and so do the operations after it.
        return None if torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu") else "gelu_tanh"
    if kind is nn.GELU:
        return "gelu" if function.approximate == "none" else "gelu_tanh"
    return _ACTIVATION_OF_TYPE.get(kind)


def activation_of(module: nn.Module, original: type[nn.Module], block: Block) -> object:
    """Return the present activation: an attribute, or the function of that name in the file of the module's class."""
    if not block.activation.endswith("()"):
        return getattr(module, block.activation, None)
    function: object = sys.modules[original.__module__]
    for name in block.activation[:-2].split("."):
        function = getattr(function, name, None)
    return function


def _describe(function: object) -> str:
    return type(function).__name__ if isinstance(function, nn.Module) else getattr(function, "__name__", repr(function))
