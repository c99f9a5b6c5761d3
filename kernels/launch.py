"""Launches without what ``kernel[grid]`` repeats on every call: it costs more than the rest of a call together.

``launch`` keeps the compiled kernel that Triton chose for arguments of a kind and hands it to Triton's C launcher. Two
calls are of one kind if Triton specialises them alike. Whatever watches or changes launches (profilers' hooks,
instrumentation, debugging) gets ``kernel[grid]`` itself, and so does a Triton whose launcher is not known here.

Kept are handles that Triton keeps as well, and no tensor. Triton's check that no global variable of a kernel has
changed is left out.
"""

import os
from typing import Any

import triton
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from . import replay
from .replay import Grid, Launcher
from .runtime import INTERPRETED, on_device

MAX_KEPT = 1024
LAUNCHER_IS_KNOWN = triton.__version__.startswith(("3.6.", "3.7.", "3.9."))

_kept: dict[Any, Launcher] = {}
# A child has no handle of its parent's modules.
os.register_at_fork(after_in_child=_kept.clear)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constexprs: Any) -> None:
    """``kernel[grid](*args, **constexprs)`` on the device of the first argument.

    args: what comes before the constexprs: tensors, None, int and ``TensorDescriptor``, a tensor or descriptor first.
    constexprs: the kernel's constexprs, then Triton's options.
    """
    first = args[0].base if type(args[0]) is TensorDescriptor else args[0]
    if INTERPRETED or not LAUNCHER_IS_KNOWN or is_observed(kernel):
        with on_device(first):
            kernel[grid](*args, **constexprs)
        return
    kinds, passed, places = _read(args)
    device = first.get_device()
    constants = tuple(constexprs.values())
    key = (kernel, device, *kinds, *constexprs, *constants)
    launcher = _kept.get(key)
    # The launcher reads no constexpr, but counts them.
    values = (*passed, *constants)[: len(kernel.arg_names)]
    blocks: Any = (*grid, 1, 1)[:3]
    with on_device(first):
        if launcher is None:
            compiled = kernel[grid](*args, **constexprs)
            if compiled is None:  # a hook of Triton's took the compilation over
                return
            launcher = launcher_of(compiled)
            if len(_kept) >= MAX_KEPT:
                _kept.clear()
            _kept[key] = launcher
        else:
            launcher(blocks, replay.current_stream(device), values)
    replay.note(kernel, is_observed, launcher, device, blocks, values, tuple(places))


def _read(args: tuple[Any, ...]) -> tuple[list[Any], list[Any], list[int]]:
    """Of each argument, all that Triton specialises on, and what its launcher is given: an address for a tensor.

    Also the places of tensors and descriptors among them.
    """
    kinds: list[Any] = []
    values: list[Any] = []
    places: list[int] = []
    for place, arg in enumerate(args):
        value = arg
        if type(arg) is int:
            kind: Any = "1" if arg == 1 else (arg % 16 == 0, -(2**31) <= arg < 2**31, arg < 2**63)
        elif arg is None:
            kind = None
        elif type(arg) is TensorDescriptor:
            kind = (arg.base.dtype, *arg.block_shape)
            places.append(place)
        elif not isinstance(arg, Tensor):
            raise TypeError(f"a kernel's argument is a {type(arg).__name__}, and launch knows no rule for it")
        else:
            value = arg.data_ptr()
            kind = (arg.dtype, value % 16 == 0)
            places.append(place)
        kinds.append(kind)
        values.append(value)
    return kinds, values, places


def is_observed(kernel: Any) -> bool:
    """Whether something wants to see or change launches, which Triton's own path then has to make."""
    runtime = knobs.runtime
    try:
        hooked = runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls
    except AttributeError:  # somebody put a function or None in the place of a chain
        hooked = True
    observed: bool = (
        hooked
        or runtime.debug
        or runtime.add_stages_inspection_hook
        or knobs.compilation.instrumentation_mode
        or kernel.pre_run_hooks
    )
    return observed


def launcher_of(compiled: Any) -> Launcher:
    """Triton's C launcher of a compiled kernel. What differs between versions of Triton is in here."""
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    direct, cooperative, dependent = run.launch, run.launch_cooperative_grid, run.launch_pdl

    # Each holds on to ``compiled``: Triton 3.9 unloads the module of a kernel that nobody has.
    def through_run(grid: Grid, stream: int, values: tuple[Any, ...], kernel: Any = compiled) -> None:
        run(*grid, stream, function, metadata, None, None, None, *values)

    if run.global_scratch_size or run.profile_scratch_size or getattr(run, "gsan_enabled", False):
        return through_run
    if not hasattr(run, "arg_annotations"):  # Triton 3.6 compiles a launcher for each signature

        def own_launcher(grid: Grid, stream: int, values: tuple[Any, ...], kernel: Any = compiled) -> None:
            x, y, z = grid
            direct(x, y, z, stream, function, cooperative, dependent, None, None, metadata, None, None, None, *values)

        return own_launcher
    annotations, signature = run.arg_annotations, run.kernel_signature

    def shared_launcher(grid: Grid, stream: int, values: tuple[Any, ...], kernel: Any = compiled) -> None:
        x, y, z = grid
        direct(
            x, y, z, stream, function, cooperative, dependent, metadata,
            None, None, None, None, None, annotations, signature, values,
        )  # fmt: skip

    return shared_launcher
