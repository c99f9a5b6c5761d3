"""The kernels' names for the activations of transformers and torch. Needs transformers."""

import functools
import sys

import torch
import torch.nn.functional as F
from torch import nn
from transformers import activations as hf

from ..guards import class_is_patched, hook_reason
from .recognize import Block, formula_of

ACTIVATION_OF_TYPE: dict[type, str] = {
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


def activation_name(function: object) -> str | None:
    """The kernels' name for an activation of transformers or torch, a module or a function; None if unknown."""
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
        # Their torch.pow runs in fp32 under autocast, and so does all that follows.
        return None if torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu") else "gelu_tanh"
    if kind is nn.GELU:
        return "gelu" if function.approximate == "none" else "gelu_tanh"
    return ACTIVATION_OF_TYPE.get(kind)


def activation_of(module: nn.Module, original: type[nn.Module], block: Block) -> object:
    """The present activation: an attribute, or the function of that name in the file of the module's class."""
    if not block.activation.endswith("()"):
        return getattr(module, block.activation, None)
    function: object = sys.modules[original.__module__]
    for name in block.activation[:-2].split("."):
        function = getattr(function, name, None)
    return function


def describe(function: object) -> str:
    return type(function).__name__ if isinstance(function, nn.Module) else getattr(function, "__name__", repr(function))
