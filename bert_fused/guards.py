"""Detect patched forwards and user hooks; read the signatures of forwards."""

import inspect
import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

# Class -> a ``forward`` of it that is code of the class's file. Finding this out again would take a microsecond a call.
forwards: dict[type, object] = {}

# Hooks of this module stay on the layers after the first call that asks for hidden states; in other calls they do
# nothing.
_CAPTURING = "transformers.utils.output_capturing"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def class_is_patched(kind: type[nn.Module]) -> bool:
    """Tell whether a class's ``forward``, without its package's decorators, is code of another file than the class."""
    forward = kind.forward
    if forward is forwards.get(kind):
        return False
    package = os.path.dirname(str(sys.modules[kind.__module__.partition(".")[0]].__file__))
    function = forward
    while hasattr(function, "__wrapped__") and _file_of(function).startswith(package + os.sep):
        function = function.__wrapped__
    if _file_of(function) != sys.modules[kind.__module__].__file__:
        return True
    forwards[kind] = forward
    return False


def is_defined_in(function: object, module: str) -> bool:
    """Tell whether a function is code of a module's file."""
    return _file_of(function) == sys.modules[module].__file__


def _file_of(function: object) -> str:
    code = getattr(function, "__code__", None)
    return str(code.co_filename) if code is not None else ""


def original_of(module: nn.Module) -> type[nn.Module]:
    """Return the class in transformers of a fused module; of any other, also one just unfused, its own class."""
    kind = type(module)
    original: type[nn.Module] = getattr(kind, "original", kind)
    return original


def touched(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Return the modules that have hooks or a forward of their own. Does not look at global hooks.

    Takes many modules at once, since one Python call for each would take longer than the checks.
    """
    found = []
    for module in modules:
        attributes = module.__dict__
        if (
            attributes["_forward_hooks"]
            or attributes["_forward_pre_hooks"]
            or attributes["_backward_hooks"]
            or attributes["_backward_pre_hooks"]
            or "forward" in attributes
            or "_hf_hook" in attributes
        ):
            found.append(module)
    return found


def hook_reason(module: nn.Module) -> str | None:
    """Return why calling ``module`` may run more or other code than its class's ``forward``, or None."""
    if "forward" in module.__dict__ or "_hf_hook" in module.__dict__:
        return "a forward of its own"
    return "hooks" if touched((module,)) or _has_any_global_hook() else None


def watch_reason(module: nn.Module, ours: Collection[Callable[..., object]] = ()) -> str | None:
    """Return the same as ``hook_reason``, but ignore hooks in ``ours`` and those that transformers left behind."""
    reason = hook_reason(module)
    if reason != "hooks" or module._backward_hooks or module._backward_pre_hooks or _has_any_global_hook():
        return reason
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    strangers = [hook for hook in hooks if hook not in ours and getattr(hook, "__module__", None) != _CAPTURING]
    return reason if strangers else None


class Signature(NamedTuple):
    """The arguments of a class's ``forward``, without ``self``.

    positional: names of the positional arguments. names: names of all arguments. takes_more: it has ``**kwargs``.
    """

    positional: tuple[str, ...]
    names: tuple[str, ...]
    takes_more: bool


_signatures: dict[Callable[..., object], Signature] = {}


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def signature_of(kind: type[nn.Module]) -> Signature:
    forward = kind.forward
    if forward not in _signatures:
        _, *parameters = inspect.signature(forward).parameters.values()
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        _signatures[forward] = Signature(
            tuple(p.name for p in named if p.kind is not p.KEYWORD_ONLY),
            tuple(p.name for p in named),
            any(p.kind is p.VAR_KEYWORD for p in parameters),
        )
    return _signatures[forward]


def arguments(kind: type[nn.Module], args: tuple[object, ...], kwargs: Mapping[str, object]) -> dict[str, object]:
    """Return the arguments of a call of ``kind.forward`` by name, without surplus positional ones."""
    return dict(zip(signature_of(kind).positional, args, strict=False)) | dict(kwargs)
