"""Drop-in subclasses of Hugging Face's modules that call the fused kernels. Needs transformers.

``FusedBertIntermediate(config)`` and ``FusedBertPooler(config)`` take Hugging Face's arguments and have its parameters.
For every other class of ``ORIGINALS`` there is a ``Fused...`` counterpart in this module, made when it is first asked
for and picklable by name.
"""

import functools
import importlib
import sys
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers import activations as hf
from transformers.models.bert.modeling_bert import BertIntermediate, BertPooler

from .dispatch import device_reason, tensor_reason
from .families import PREFIXES
from .genuine import UNKNOWN, class_is_patched, forwards, hook_reason
from .ops import cls_pool, linear_act

# Class name -> the module of transformers that defines it.
ORIGINALS = {
    f"{prefix}{kind}": home
    for home, prefix in PREFIXES.items()
    for kind in ("Intermediate", "Pooler")
    if f"{prefix}{kind}" != "ElectraPooler"  # ELECTRA has none
}
ENCODERS = {f"{prefix}Encoder": home for home, prefix in PREFIXES.items()}

_ACTIVATION_OF_TYPE = {
    hf.FastGELUActivation: "gelu_tanh",
    hf.QuickGELUActivation: "quick_gelu",
    hf.SiLUActivation: "silu",
    hf.LinearActivation: "none",
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    nn.Tanh: "tanh",
    nn.Identity: "none",
}
_ACTIVATION_OF_FUNCTION = {
    F.gelu: "gelu",
    F.relu: "relu",
    torch.relu: "relu",
    F.silu: "silu",
    F.tanh: "tanh",
    torch.tanh: "tanh",
}


def activation_name(function: Any) -> str | None:
    """The kernels' name for an activation of transformers or torch, a module or a function; None if they have none."""
    if not isinstance(function, nn.Module):
        try:
            return _ACTIVATION_OF_FUNCTION.get(function)
        except TypeError:  # unhashable
            return None
    kind = type(function)
    if hook_reason(function) is not None or class_is_patched(kind):
        return None
    if kind is hf.GELUActivation:
        return "gelu" if function.act is F.gelu or function.act == function._gelu_python else None
    if kind is hf.GELUTanh and isinstance(function.act, functools.partial):
        same = (
            function.act.func is F.gelu and function.act.keywords == {"approximate": "tanh"} and not function.act.args
        )
        return "gelu_tanh" if same else None
    if kind is hf.GELUTanh and function.act != function._gelu_tanh_python:
        return None
    if kind in (hf.GELUTanh, hf.NewGELUActivation, hf.AccurateGELUActivation):
        # Their torch.pow runs in fp32 under autocast, and so does all that follows.
        return None if torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu") else "gelu_tanh"
    if kind is nn.GELU:
        return "gelu" if function.approximate == "none" else "gelu_tanh"
    return _ACTIVATION_OF_TYPE.get(kind)


def linear_reason(linear: Any) -> str | None:
    """Why ``linear`` may compute something else than ``F.linear`` of its weight and bias, or None if it cannot."""
    if type(linear) is not nn.Linear:
        return f"its dense layer is a {type(linear).__module__}.{type(linear).__qualname__}, not a plain nn.Linear"
    if class_is_patched(nn.Linear):
        return "nn.Linear.forward was replaced"
    reason = hook_reason(linear)
    return f"its dense layer has {reason}" if reason is not None else None


def _parts(module: nn.Module, function: str) -> tuple[Any, Any, Any, Any]:
    """A module's activation, its dense layer, and that one's weight and bias. ``getattr`` takes ten times as long."""
    try:
        children: Any = module._modules
        dense = children["dense"]
        parameters = dense._parameters
        return children[function], dense, parameters["weight"], parameters["bias"]
    except (AttributeError, KeyError):  # a function, a layer without parameters, a replica of DataParallel
        dense = module.dense
        return getattr(module, function), dense, getattr(dense, "weight", None), getattr(dense, "bias", None)


def step_aside_reason(module: nn.Module) -> str | None:
    """Why a module of a supported class must run Hugging Face's own forward, or None if a fused one computes the same.

    For the report of ``fuse``. Every call looks again, since users add adapters, hooks and quantised layers any time.
    """
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    if class_is_patched(original_class(module) or type(module)):
        return "its class's forward was replaced"
    dense = getattr(module, "dense", None)
    reason = linear_reason(dense)
    if reason is not None:
        return reason
    dense = cast(nn.Linear, dense)
    for name, parameter in (("weight", dense.weight), ("bias", dense.bias)):
        if parameter is not None:
            reason = None if _is_gathered(dense, parameter) else tensor_reason(parameter)
            if reason is None and parameter.is_meta:
                reason = "it is on the meta device"
            if reason is not None:
                return f"its dense {name} cannot be read by a kernel: {reason}"
    if activation_name(_activation_of(module)) is None:
        return f"its activation, {_describe(_activation_of(module))}, has no kernel"
    return None


def _is_gathered(dense: nn.Module, parameter: Tensor) -> bool:
    """Whether FSDP2 keeps a shard in a parameter's place between calls, and the whole, plain tensor during them.

    A tensor-parallel parameter stays a DTensor; its linear layer has hooks, which are looked for before.
    """
    return type(parameter).__name__ == "DTensor" and bool(getattr(dense, "_is_fsdp_managed_module", False))


def path_of(module: nn.Module) -> str:
    """Which path a fused module takes on its weight's device, in words."""
    weight = cast(nn.Linear, module.dense).weight
    reason = device_reason(weight.device, weight.dtype)
    return "Triton" if reason is None else f"PyTorch ({reason})"


def _activation_of(module: nn.Module) -> Any:
    return getattr(module, "activation", None) or getattr(module, "intermediate_act_fn", None)


def _describe(function: Any) -> str:
    return type(function).__name__ if isinstance(function, nn.Module) else getattr(function, "__name__", repr(function))


def _original_now(module: nn.Module) -> type[nn.Module]:
    """Hugging Face's class, also if another thread has given it back to the module since the call began."""
    kind = type(module)
    return cast(type[nn.Module], getattr(kind, "original", kind))


def _activation_now(original: type[nn.Module], function: Any, dense: Any, hidden_states: Any) -> str | None:
    """The kernels' name for a module's activation, or None if the module must step aside in this call.

    Looks at what can change between calls; ``linear_act`` looks at the tensors.
    """
    if type(hidden_states) is not Tensor or class_is_patched(original):
        return None
    kind = type(function)
    if (
        (kind is hf.GELUActivation or kind in _ACTIVATION_OF_TYPE)
        and type(dense) is nn.Linear
        and _is_untouched(dense, nn.Linear)
        and _is_untouched(function, kind)
        and not _has_any_global_hook()
    ):
        if kind is not hf.GELUActivation:
            return _ACTIVATION_OF_TYPE[kind]
        if function.act is F.gelu:
            return "gelu"
    return activation_name(function) if linear_reason(dense) is None else None


def _is_untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module of class ``kind`` is known to run that class's own forward, global hooks aside."""
    attributes = module.__dict__
    return not (
        kind.forward is not forwards.get(kind, UNKNOWN)
        or attributes["_forward_hooks"]
        or attributes["_forward_pre_hooks"]
        or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"]
        or "forward" in attributes
        or "_hf_hook" in attributes
    )


class _FusedIntermediate(nn.Module):
    original: type[nn.Module]
    # An argument of ``linear_act``. ``fuse`` makes it an attribute of the instance where it is true, and only there.
    recompute_preact = False

    def forward(self, hidden_states: Tensor) -> Tensor:
        original = _original_now(self)
        function, dense, weight, bias = _parts(self, "intermediate_act_fn")
        activation = _activation_now(original, function, dense, hidden_states)
        if activation is None:
            return cast(Tensor, original.forward(self, hidden_states))
        if self.__dict__.get("recompute_preact"):
            return linear_act(hidden_states, weight, bias, activation, recompute_preact=True)
        return linear_act(hidden_states, weight, bias, activation)


class _FusedPooler(nn.Module):
    original: type[nn.Module]
    recompute_preact = False
    # Whether nobody reads the pooled output, so that it need not be computed. Set by ``fuse``, like the above.
    skip = False

    def forward(self, hidden_states: Tensor) -> Tensor | None:
        if self.__dict__.get("skip"):
            return None
        original = _original_now(self)
        function, dense, weight, bias = _parts(self, "activation")
        activation = _activation_now(original, function, dense, hidden_states)
        if activation is None or hidden_states.dim() != 3:
            return cast(Tensor, original.forward(self, hidden_states))
        if self.__dict__.get("recompute_preact"):
            return cls_pool(hidden_states, weight, bias, activation, recompute_preact=True)
        return cls_pool(hidden_states, weight, bias, activation)


class FusedBertIntermediate(_FusedIntermediate, BertIntermediate):  # type: ignore[misc]
    """``BertIntermediate``, ``act(dense(hidden_states))``, in one kernel: ``[..., H]`` to ``[..., I]``."""

    original = BertIntermediate


class FusedBertPooler(_FusedPooler, BertPooler):  # type: ignore[misc]
    """``BertPooler``, ``tanh(dense(hidden_states[:, 0]))``, in one kernel: ``[B, S, H]`` to ``[B, H]``."""

    original = BertPooler


def fused_class(original: type) -> type[nn.Module] | None:
    """The fused counterpart of a block of transformers; None if there is none, or if it is not the class itself."""
    return _counterpart(original, ORIGINALS)


def fused_encoder_class(original: type) -> type[nn.Module] | None:
    """The same for an encoder."""
    return _counterpart(original, ENCODERS)


def _counterpart(original: type, originals: dict[str, str]) -> type[nn.Module] | None:
    if originals.get(original.__name__) != original.__module__:
        return None
    return cast(type[nn.Module], getattr(sys.modules[__name__], f"Fused{original.__name__}"))


def original_class(module: nn.Module) -> type[nn.Module] | None:
    """Hugging Face's class of a fused module; None if the module's class is not one of this module's own.

    Nor one that torch derived from these.
    """
    kind: Any = wrapped_class(module) or type(module)
    ours = kind.__module__ == __name__ and globals().get(kind.__name__) is kind
    return cast(type[nn.Module], kind.original) if ours else None


def wrapped_class(module: nn.Module) -> type[nn.Module] | None:
    """The class from which ``fully_shard`` derived the present one of a module that it made a unit; None elsewhere.

    torch looks up the derived classes by identity, so that none of ours may take the place of one.
    """
    bases = type(module).__bases__
    derived = len(bases) == 2 and bases[0].__module__.startswith("torch.distributed.")
    return cast(type[nn.Module], bases[1]) if derived else None


def __getattr__(name: str) -> type[nn.Module]:
    """Make the fused counterpart of a class of transformers. Unpickling a fused module comes here as well."""
    original_name = name.removeprefix("Fused")
    home = (ORIGINALS | ENCODERS).get(original_name)
    if name == original_name or home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    original = getattr(importlib.import_module(home), original_name)
    mixin: type[nn.Module] = _FusedPooler if name.endswith("Pooler") else _FusedIntermediate
    does = "in one kernel"
    if original_name in ENCODERS:
        # Imported here because it needs parts of transformers that the fused modules do without.
        from .encoder import FusedEncoder as mixin

        does = "without work that nobody reads"
    made = type(
        name,
        (mixin, original),
        {"__module__": __name__, "__doc__": f"``{original_name}`` {does}.", "original": original},
    )
    # Two threads may both get here; all must see the class that came first.
    return cast(type[nn.Module], globals().setdefault(name, made))
