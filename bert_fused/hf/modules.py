"""Drop-in subclasses of Hugging Face's modules that call the fused kernels. Needs transformers.

``FusedBertIntermediate(config)`` and ``FusedBertPooler(config)`` take Hugging Face's arguments and have its parameters.
Every other class that ``recognize.py`` knows gets a ``Fused...`` counterpart when it is first asked for.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers import activations as hf
from transformers.models.bert.modeling_bert import BertIntermediate, BertPooler

from ..fallback import device_reason, interpreted, tensor_reason
from ..guards import class_is_patched, forwards, hook_reason, is_defined_in
from ..ops import cls_pool, linear_act
from ..unpad.encoder import PREFIXES, FusedAttention, FusedEncoder, FusedSelfAttention
from .recognize import INTERMEDIATE, POOLER, Block, block_of, formula_of

# The classes of the five families that are swapped with an encoder: name -> module that defines it, class to mix in.
_ENCODER_CLASSES: dict[str, tuple[str, type[nn.Module]]] = {
    f"{prefix}{part}": (home, mixin)
    for home, prefix in PREFIXES.items()
    for part, mixin in (("Encoder", FusedEncoder), ("SelfAttention", FusedSelfAttention), ("Attention", FusedAttention))
}

# Without the interpreter no kernel serves a CPU tensor, and asking which path does would cost microseconds.
_CPU_HAS_KERNELS = interpreted()

_ACTIVATION_OF_TYPE = {
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
_ACTIVATION_OF_FUNCTION = {
    F.gelu: "gelu",
    F.relu: "relu",
    torch.relu: "relu",
    F.silu: "silu",
    F.tanh: "tanh",
    torch.tanh: "tanh",
}


def activation_name(function: Any) -> str | None:
    """The kernels' name for an activation of transformers or torch, a module or a function; None if unknown."""
    if not isinstance(function, nn.Module):
        try:
            return _ACTIVATION_OF_FUNCTION.get(function) or formula_of(function)
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


def linear_reason(linear: Any, name: str = "dense") -> str | None:
    """Why ``linear`` may not compute ``F.linear`` of its weight and bias, or None."""
    if type(linear) is not nn.Linear:
        return f"its {name} layer is a {type(linear).__module__}.{type(linear).__qualname__}, not a plain nn.Linear"
    if class_is_patched(nn.Linear):
        return "nn.Linear.forward was replaced"
    reason = hook_reason(linear)
    return f"its {name} layer has {reason}" if reason is not None else None


def _parts(module: nn.Module, function: str) -> tuple[Any, Any, Any, Any]:
    """A module's activation, dense layer, weight and bias. ``getattr`` would take ten times as long."""
    try:
        children: Any = module._modules
        dense = children["dense"]
        parameters = dense._parameters
        return children[function], dense, parameters["weight"], parameters["bias"]
    except (AttributeError, KeyError):  # a function, a layer without parameters, a replica of DataParallel
        dense = module.dense
        return getattr(module, function), dense, getattr(dense, "weight", None), getattr(dense, "bias", None)


def step_aside_reason(module: nn.Module, block: Block) -> str | None:
    """Why a module must run Hugging Face's own code, or None.

    For the report of ``fuse``. Every call checks again, since users add adapters, hooks and quantised layers any time.
    """
    for name in ("forward", block.method):
        if name in module.__dict__:
            return f"its {name} was replaced on the instance"
    original = original_class(module) or type(module)
    if class_is_patched(original) or not is_defined_in(getattr(original, block.method), original.__module__):
        return "its class's forward was replaced"
    linear = getattr(module, block.linear, None)
    reason = linear_reason(linear, block.linear)
    if reason is not None:
        return reason
    linear = cast(nn.Linear, linear)
    for name, parameter in (("weight", linear.weight), ("bias", linear.bias)):
        if parameter is not None:
            reason = None if _is_gathered(linear, parameter) else tensor_reason(parameter)
            if reason is None and parameter.is_meta:
                reason = "it is on the meta device"
            if reason is not None:
                return f"its {block.linear} {name} cannot be read by a kernel: {reason}"
    function = _activation_of(module, original, block)
    if activation_name(function) is None:
        return f"its activation, {_describe(function)}, has no kernel"
    return None


def _is_gathered(linear: nn.Module, parameter: Tensor) -> bool:
    """Whether FSDP2 holds a parameter as a shard between calls and as a whole, plain tensor during them.

    A tensor-parallel parameter is a DTensor during calls too; its linear layer has hooks, which are checked before.
    """
    return type(parameter).__name__ == "DTensor" and bool(getattr(linear, "_is_fsdp_managed_module", False))


def path_of(module: nn.Module, block: Block) -> str:
    """The path of a fused module on its weight's device, as the report prints it."""
    weight = cast(nn.Linear, getattr(module, block.linear)).weight
    reason = device_reason(weight.device, weight.dtype)
    path = "Triton" if reason is None else f"PyTorch ({reason})"
    return f"{path} in eval mode, since dropout comes first" if block.dropout else path


def _activation_of(module: nn.Module, original: type[nn.Module], block: Block) -> Any:
    """The present activation: an attribute, or the function of that name in the file of the module's class."""
    if not block.activation.endswith("()"):
        return getattr(module, block.activation, None)
    function: Any = sys.modules[original.__module__]
    for name in block.activation[:-2].split("."):
        function = getattr(function, name, None)
    return function


def _describe(function: Any) -> str:
    return type(function).__name__ if isinstance(function, nn.Module) else getattr(function, "__name__", repr(function))


def _original_now(module: nn.Module) -> type[nn.Module]:
    """Hugging Face's class, even if another thread has unfused the module since the call began."""
    kind = type(module)
    return cast(type[nn.Module], getattr(kind, "original", kind))


def _activation_now(original: type[nn.Module], function: Any, dense: Any, hidden_states: Any) -> str | None:
    """The kernels' name for a module's activation, or None if the module must step aside in this call.

    Checks what can change between calls, the usual case first and in the fewest steps; ``linear_act`` checks the
    tensors.
    """
    if (
        type(hidden_states) is not Tensor
        or not (hidden_states.is_cuda or _CPU_HAS_KERNELS)
        or (original.forward is not forwards.get(original) and class_is_patched(original))
    ):
        return None
    kind = type(function)
    name = _ACTIVATION_OF_TYPE.get(kind)
    if (
        name is not None
        and type(dense) is nn.Linear
        and nn.Linear.forward is forwards.get(nn.Linear)
        and kind.forward is forwards.get(kind)
        and not _is_touched(dense.__dict__)
        and not _is_touched(function.__dict__)
        and not _has_any_global_hook()
        and (kind is not hf.GELUActivation or function.act is F.gelu)
    ):
        return name
    return activation_name(function) if linear_reason(dense) is None else None


def _is_touched(attributes: dict[str, Any]) -> Any:
    """Whether a module's attributes add to or replace its class's ``forward``. Global hooks are checked apart."""
    return (
        attributes["_forward_hooks"]
        or attributes["_forward_pre_hooks"]
        or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"]
        or "forward" in attributes
        or "_hf_hook" in attributes
    )


class _FusedIntermediate(nn.Module):
    original: type[nn.Module]
    # An argument of ``linear_act``. ``fuse`` sets it on the instance if it is true.
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
    # Whether to leave out the pooled output. Set by ``fuse``, like the above.
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


def _drops(module: nn.Module) -> bool:
    """Whether a module's dropout may change its input."""
    dropout = module.dropout
    if type(dropout) is not nn.Dropout or hook_reason(dropout) is not None or class_is_patched(nn.Dropout):
        return True
    return dropout.training and dropout.p > 0


def _fused_method(original: type[nn.Module], block: Block) -> Callable[..., Any]:
    """A block's method with linear layer and activation in one kernel; the other steps are called unchanged."""
    read = getattr(original, block.method)
    product = cls_pool if block.first else linear_act

    @functools.wraps(read)  # Hugging Face looks at the signature
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        now = getattr(original, block.method)
        if now is not read or len(args) != 1 or kwargs or (block.dropout and _drops(self)):
            return now(self, *args, **kwargs)
        (hidden,) = args
        linear: Any = getattr(self, block.linear)
        activation = _activation_now(original, _activation_of(self, original, block), linear, hidden)
        if activation is None or (block.first and hidden.dim() != 3):
            return now(self, hidden)
        options = {"recompute_preact": True} if "recompute_preact" in self.__dict__ else {}
        hidden = product(hidden, linear.weight, linear.bias, activation, **options)
        for name in block.rest:
            hidden = getattr(self, name)(hidden)
        return hidden

    return method


class FusedBertIntermediate(_FusedIntermediate, BertIntermediate):  # type: ignore[misc]
    """``BertIntermediate``, ``act(dense(hidden_states))``, in one kernel: ``[..., H]`` to ``[..., I]``."""

    original = BertIntermediate
    block = INTERMEDIATE


class FusedBertPooler(_FusedPooler, BertPooler):  # type: ignore[misc]
    """``BertPooler``, ``tanh(dense(hidden_states[:, 0]))``, in one kernel: ``[B, S, H]`` to ``[B, H]``."""

    original = BertPooler
    block = POOLER


# Hugging Face's class -> its fused counterpart; others are added when they are first asked for.
_counterparts: dict[type, Any] = {BertIntermediate: FusedBertIntermediate, BertPooler: FusedBertPooler}


def fused_class(original: type) -> Any:
    """The fused counterpart of a block of transformers, with its ``Block``; None if there is none."""
    if original not in _counterparts:
        block = block_of(original)
        if block is None:
            return None
        bases: tuple[type, ...] = ()
        if list(inspect.signature(cast(Any, original).forward).parameters) == ["self", "hidden_states"]:
            bases = {INTERMEDIATE: (_FusedIntermediate,), POOLER: (_FusedPooler,)}.get(block, ())
        own = {} if bases else {block.method: _fused_method(original, block)}
        _make(original, bases, {"block": block, "__doc__": f"``{original.__name__}`` in one kernel."} | own)
    made = _counterparts[original]
    return made if made.block is not None else None


def fused_encoder_class(original: type) -> Any:
    """The fused counterpart of an encoder of the five families or of its attentions; None if there is none."""
    home, mixin = _ENCODER_CLASSES.get(original.__name__, ("", nn.Module))
    if home != original.__module__:
        return None
    if original not in _counterparts:
        doc = f"``{original.__name__}`` without work on padding, or on positions that are not read."
        _make(original, (mixin,), {"block": None, "__doc__": doc})
    return _counterparts[original]


def _make(original: type, mixins: tuple[type, ...], attributes: dict[str, Any]) -> None:
    attributes |= {"__module__": __name__, "original": original, "__reduce_ex__": _reduce}
    made = type(f"Fused{original.__name__}", (*mixins, original), attributes)
    # Two threads may both get here; all must see the class that came first.
    _counterparts.setdefault(original, made)


def original_class(module: nn.Module) -> type[nn.Module] | None:
    """Hugging Face's class of a fused module, also of one that ``fully_shard`` made a unit; None if not fused."""
    kind: Any = wrapped_class(module) or type(module)
    original = vars(kind).get("original")
    return original if original is not None and _counterparts.get(original) is kind else None


def wrapped_class(module: nn.Module) -> type[nn.Module] | None:
    """The class of a module before ``fully_shard`` made it a unit; None if it is no unit.

    ``fully_shard`` derives a class from it. torch looks up derived classes by identity, so we never replace one.
    """
    bases = type(module).__bases__
    derived = len(bases) == 2 and bases[0].__module__.startswith("torch.distributed.")
    return cast(type[nn.Module], bases[1]) if derived else None


def _reduce(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """Pickle the original class, and fuse again on load.

    Our class itself is never pickled: cloudpickle (Ray, joblib) copies a class that it cannot find by name.
    """
    reduced: Any = object.__reduce_ex__(module, protocol)
    return _blank, (_original_now(module),), *reduced[2:]


def _blank(original: type[nn.Module]) -> nn.Module:
    kind = fused_class(original) or fused_encoder_class(original) or original
    return cast(nn.Module, kind.__new__(kind))
