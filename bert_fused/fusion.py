"""``fuse``, ``unfuse`` and ``fused``: put the fused modules into a Hugging Face model and take them out again.

A module is fused by assigning its ``__class__``: parameters, hooks, keys and identity stay, and undoing it is exact.
"""

import contextlib
import importlib
import importlib.util
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import ModuleType

from torch import nn

_lock = threading.Lock()


@dataclass(frozen=True)
class FuseReport:
    """What ``fuse`` did.

    fused: names of the fused modules, as in ``model.named_modules()``.
    skipped: name -> why a module of a supported shape was left alone. The name "" stands for the whole model, where
        nothing in it has a supported shape.
    paths: name -> what a fused module runs on its present device: "Triton", or "PyTorch" and the reason.
    """

    fused: tuple[str, ...]
    skipped: dict[str, str] = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = [(name or "(model)", "fused", self.paths[name]) for name in self.fused]
        rows += [(name or "(model)", "skipped", reason) for name, reason in self.skipped.items()]
        width = max(len(name) for name, _, _ in rows)
        lines = [f"{name:<{width}}  {what:<7}  {why}" for name, what, why in rows]
        return "\n".join([*lines, f"{len(self.fused)} fused, {len(self.skipped)} skipped"])


def fuse(model: nn.Module, *, recompute_preact: bool = False) -> FuseReport:
    """Fuse every intermediate and pooler block of a Hugging Face model, in place.

    Results stay those of the model, gradients included. A module whose parts are not what they seem (an adapter, a
    hook, quantised weights, an activation without a kernel) is left alone and named in the report. If that happens
    after fusing, the module runs Hugging Face's own forward for as long as it is so: this is looked up on every call.

    Args:
        model: any ``nn.Module`` with modules of the families bert, roberta, xlm-roberta, camembert and electra inside.
        recompute_preact: train in less memory: each intermediate computes its pre-activation again in the backward pass
            instead of keeping it (see ``linear_act``). Holds for every module in the report, also one fused before.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
    """
    report, fused_now, fused_before = _fuse(model)
    _set_recompute([*fused_now, *fused_before], recompute_preact)
    return report


def unfuse(model: nn.Module) -> None:
    """Give every fused module in ``model`` its original class back.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
    """
    _check(model)
    _restore(model.modules())


@contextlib.contextmanager
def fused(model: nn.Module, *, recompute_preact: bool = False) -> Iterator[FuseReport]:
    """Fuse within a ``with`` block. What was fused before stays as it was, in the block and after it.

    The block is the model's, not the thread's: leaving it unfuses the model for every thread that calls it.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
    """
    report, fused_now, _ = _fuse(model)
    _set_recompute(fused_now, recompute_preact)
    try:
        yield report
    finally:
        _restore(fused_now)


def _fuse(model: nn.Module) -> tuple[FuseReport, list[nn.Module], list[nn.Module]]:
    """The report, the modules that this call fused, and those of the report that were fused before."""
    _check(model)
    modules = _modules()
    if modules is None:
        return FuseReport((), {"": "transformers is not installed"}), [], []

    names: list[str] = []
    skipped: dict[str, str] = {}
    paths: dict[str, str] = {}
    swapped: list[tuple[nn.Module, type[nn.Module]]] = []
    fused_before: list[nn.Module] = []
    with _lock:
        matched_by_name = _names_others_match(model)
        for name, module in model.named_modules():
            already = modules.original_class(module)
            target = type(module) if already else modules.fused_class(type(module))
            if target is None:
                continue
            reason = modules.step_aside_reason(module)
            if reason is None and type(module).__name__ in matched_by_name:
                reason = "its class is named in _no_split_modules"
            if reason is not None:
                skipped[name] = reason
                continue
            if already:
                fused_before.append(module)
            else:
                swapped.append((module, target))
            names.append(name)
            paths[name] = modules.path_of(module)
        for module, target in swapped:
            module.__class__ = target
    if not names and not skipped:
        families = "bert, roberta, xlm-roberta, camembert, electra"
        skipped[""] = f"{type(model).__name__} holds no intermediate or pooler module of the families {families}"
    return FuseReport(tuple(names), skipped, paths), [module for module, _ in swapped], fused_before


def _set_recompute(modules: Iterable[nn.Module], recompute_preact: bool) -> None:
    for module in modules:
        if recompute_preact:
            module.recompute_preact = True  # type: ignore[assignment]
        else:
            module.__dict__.pop("recompute_preact", None)


def _names_others_match(model: nn.Module) -> set[str]:
    """Class names that accelerate and FSDP look for; a module under another name would no longer be found."""
    names: set[str] = set()
    for module in model.modules():
        names.update(getattr(module, "_no_split_modules", None) or ())
    return names


@contextlib.contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """Unfuse within a ``with`` block, then fuse the same modules again."""
    modules = _modules()
    was_fused = [module for module in model.modules() if modules and modules.original_class(module)]
    before = [(type(module), module.__dict__.get("recompute_preact", False)) for module in was_fused]
    _restore(was_fused)
    try:
        yield
    finally:
        with _lock:
            for module, (kind, recompute_preact) in zip(was_fused, before, strict=True):
                _set_recompute([module], recompute_preact)
                module.__class__ = kind


def _restore(candidates: Iterable[nn.Module]) -> None:
    modules = _modules()
    if modules is None:
        return
    with _lock:
        for module in candidates:
            original = modules.original_class(module)
            if original is not None:
                module.__class__ = original
                module.__dict__.pop("recompute_preact", None)


def _modules() -> ModuleType | None:
    """``bert_fused.modules``, or None where transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        return None
    return importlib.import_module("bert_fused.modules")


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
