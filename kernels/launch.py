"""Launches without what ``kernel[grid]`` repeats on every call: it costs more than the rest of a call together.

``launch`` keeps the compiled kernel that Triton chose for arguments of a kind and hands it to Triton's C launcher. Two
calls are of one kind if Triton specialises them alike. Whatever watches or changes launches (profilers' hooks,
instrumentation, debugging) gets ``kernel[grid]`` itself. So does a Triton whose launcher is not known here, which one
warning says.

Kept are handles that Triton keeps as well, and no tensor. Triton's check that no global variable of a kernel has
changed is left out.
"""

import copy
import functools
import inspect
import itertools
import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from . import replay
from .replay import Encoder, Grid, Launch, Launcher
from .runtime import INTERPRETED, on_device

MAX_KEPT = 1024
KNOWN_TRITONS = ("3.6.", "3.7.", "3.8.", "3.9.")
LAUNCHER_IS_KNOWN = triton.__version__.startswith(KNOWN_TRITONS)
SLOW_LAUNCHES = (
    f"the launcher of Triton {triton.__version__} is not known here: kernels are launched by kernel[grid], which "
    "costs the host 10 to 30 us more for each call"
)

# The launcher of a compiled kernel, and what Triton's compiler says of each of its descriptors.
_kept: dict[Any, tuple[Launcher, tuple[Any, ...]]] = {}
# A child has no handle of its parent's modules.
os.register_at_fork(after_in_child=_kept.clear)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constexprs: Any) -> Launch | None:
    """``kernel[grid](*args, **constexprs)`` on the device of the first argument.

    args: what comes before the constexprs: tensors, None, int and ``TensorDescriptor``, a tensor or descriptor first.
    constexprs: the kernel's constexprs, then Triton's options.

    Returns what it takes to launch the same again, or None where Triton's own path made the launch.
    """
    first = args[0].base if type(args[0]) is TensorDescriptor else args[0]
    if not (INTERPRETED or LAUNCHER_IS_KNOWN):
        _warn_once()
    if INTERPRETED or not LAUNCHER_IS_KNOWN or is_observed(kernel):
        with on_device(first):
            kernel[grid](*args, **constexprs)
        return None
    kinds, passed = _read(args)
    device = first.get_device()
    constants = tuple(constexprs.values())
    key = (kernel, device, *kinds, *constexprs, *constants)
    kept = _kept.get(key)
    # The launcher reads no constexpr, but counts them.
    values = (*passed, *constants)[: len(kernel.arg_names)]
    blocks: Any = (*grid, 1, 1)[:3]
    with on_device(first):
        if kept is None:
            compiled = kernel[grid](*args, **constexprs)
            if compiled is None or _needs_scratch(compiled.run):  # None: a hook of Triton's took the compilation over
                return None
            kept = launcher_of(compiled), tuple(getattr(compiled.metadata, "tensordesc_meta", None) or ())
            if len(_kept) >= MAX_KEPT:
                _kept.clear()
            _kept[key] = kept
            launcher, described = kept
        else:
            launcher, described = kept
            launcher(blocks, replay.current_stream(device), tuple(_encoded(values, described)))
    descriptors = [arg for arg in args if type(arg) is TensorDescriptor]
    encoders = tuple(_encoder(*pair) for pair in zip(descriptors, described, strict=True))
    return Launch(kernel, is_observed, launcher, device, blocks, values, encoders)


@functools.cache
def _warn_once() -> None:
    logging.getLogger(__name__).warning(SLOW_LAUNCHES)


def _encoded(values: tuple[Any, ...], described: tuple[Any, ...]) -> Iterator[Any]:
    remaining = iter(described)
    for value in values:
        if type(value) is TensorDescriptor:
            yield from _encode(value, next(remaining))
        else:
            yield value


def _read(args: tuple[Any, ...]) -> tuple[list[Any], list[Any]]:
    """Of each argument, all that Triton specialises on, and what stands for it: an address for a tensor."""
    kinds: list[Any] = []
    values: list[Any] = []
    for arg in args:
        value = arg
        if type(arg) is int:
            kind: Any = "1" if arg == 1 else (arg % 16 == 0, -(2**31) <= arg < 2**31, arg < 2**63)
        elif arg is None:
            kind = None
        elif type(arg) is TensorDescriptor:
            kind = (arg.base.dtype, *arg.block_shape)
        elif not isinstance(arg, Tensor):
            raise TypeError(f"a kernel's argument is a {type(arg).__name__}, and launch knows no rule for it")
        else:
            value = arg.data_ptr()
            kind = (arg.dtype, value % 16 == 0)
        kinds.append(kind)
        values.append(value)
    return kinds, values


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


def _needs_scratch(run: Any) -> bool:
    """Whether Triton allocates memory of its own for each launch of a kernel. None of ours has it do so."""
    return bool(run.global_scratch_size or run.profile_scratch_size or getattr(run, "gsan_enabled", False))


def launcher_of(compiled: Any) -> Launcher:
    """Triton's C launcher of a compiled kernel. Versions of Triton differ in here and in ``_encode``."""
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    direct, cooperative, dependent = run.launch, run.launch_cooperative_grid, run.launch_pdl
    # A kernel with descriptors has its launcher wrapped into one that encodes them in every call.
    direct = inspect.getclosurevars(direct).nonlocals["launcher"] if inspect.isfunction(direct) else direct

    # Each holds on to ``compiled``: Triton 3.9 unloads the module of a kernel that nobody has.
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


class _Address:
    """What stands for a tensor where only its address is asked for."""

    def __init__(self, address: int) -> None:
        self.data_ptr = lambda: address


_serial = itertools.count()


def _encode(descriptor: Any, described: Any) -> tuple[Any, ...]:
    """What the launcher is given for a descriptor, of which the compiler said ``described``."""
    encode = triton.backends.nvidia.driver.make_tensordesc_arg
    more = (None,) * (encode.__code__.co_argcount - 2)  # Triton 3.9 passes on arguments that it does not read
    try:
        return tuple(encode(descriptor, described, *more))
    except RuntimeError:
        # A launch makes the device's context current where a thread has none yet, encoding does not. Any call of
        # CUDA's runtime does, and this one is allowed while a graph is captured.
        torch.cuda.mem_get_info()
        return tuple(encode(descriptor, described, *more))


def _encoder(descriptor: TensorDescriptor, described: Any) -> Encoder:
    """From an address to what the launcher is given for a tensor there, of the descriptor's shape, strides and tile.

    That is a function of the address and nothing else, so what was encoded once holds for whoever lives there later.
    """
    template = copy.copy(descriptor)
    template.base = None  # keeps no tensor alive
    number = next(_serial)

    def encoded(address: int) -> tuple[Any, ...]:
        key = number, address
        found = replay.encoded.get(key)
        if found is None:
            there = copy.copy(template)
            there.base = _Address(address)
            found = _encode(there, described)
            if len(replay.encoded) >= replay.MAX_ENCODED:
                replay.encoded.clear()
            replay.encoded[key] = found
        return found

    return encoded
