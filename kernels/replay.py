"""Calls of ``linear_act`` that were made before: one look-up instead of every check and choice on the way to a launch.

A call whose tensors agree with an earlier one's in dtype, device, shape, strides and 16-byte alignment passes the same
checks, takes the same configuration and launches the same kernel with the same numbers; only addresses differ. ``Call``
makes that launch. A call is kept only if it was exactly one launch, whose only tensors were x, weight, bias, out and
preact, in this order at the head of its arguments.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Grid = tuple[int, int, int]
Launcher = Callable[[Grid, int, tuple[Any, ...]], None]  # grid, stream, the kernel's arguments

MAX_CALLS = 2048

# A torch without CUDA has neither.
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: -1)
current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0)

_fp32_precision: Callable[[str, str], str] = torch._C._get_fp32_precision_getter
_recording = threading.local()


@dataclass(frozen=True)
class Launch:
    kernel: Any
    is_observed: Callable[[Any], bool]
    launcher: Launcher
    device: int
    grid: Grid
    values: tuple[Any, ...]
    places: tuple[int, ...]  # of tensors and descriptors among the values


class Call:
    """A kept call: ``call(x, weight, bias)`` is ``(out, preact)``, or None where this one must be made anew."""

    __slots__ = ("device", "grid", "is_observed", "kernel", "launcher", "numbers", "saves_preact", "shape")

    def __init__(self, launch: Launch, shape: tuple[int, ...], saves_preact: bool) -> None:
        self.kernel, self.is_observed, self.launcher = launch.kernel, launch.is_observed, launch.launcher
        self.device, self.grid, self.numbers = launch.device, launch.grid, launch.values[5:]
        self.shape, self.saves_preact = tuple(shape), saves_preact

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
        if self.is_observed(self.kernel):
            return None
        x_address, weight_address = x.data_ptr(), weight.data_ptr()
        addresses = x_address | weight_address
        bias_address = None
        if bias is not None:
            bias_address = bias.data_ptr()
            addresses |= bias_address
        out = x.new_empty(*self.shape)  # a torch.Size would take twice the time
        out_address = out.data_ptr()
        preact, preact_address = None, None
        if self.saves_preact:
            preact = x.new_empty(*self.shape)
            preact_address = preact.data_ptr()
            addresses |= preact_address
        # A lazily zero tensor has no address.
        if (addresses | out_address) & 15 or not (x_address and weight_address and bias_address != 0):
            return None
        values = (x_address, weight_address, bias_address, out_address, preact_address, *self.numbers)
        device = self.device
        if current_device() == device:
            self.launcher(self.grid, current_stream(device), values)
        else:
            with torch.cuda.device(device):
                self.launcher(self.grid, current_stream(device), values)
        return out, preact


calls: dict[Any, Call] = {}
os.register_at_fork(after_in_child=calls.clear)


def key_of(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, needs_grad: bool) -> Any:
    """All that the way to a launch depends on, addresses aside; None for tensors without a shape or strides.

    An index says where a tensor is: no process has two kinds of accelerator, and the CPU's is -1. Contiguous tensors of
    one shape differ at most in the stride of a dimension of size 1, which no address depends on.
    """
    dtype = x.dtype
    try:
        return (
            activation,
            needs_grad,
            dtype,
            x.get_device(),
            x.shape,
            x.is_contiguous() or x.stride(),
            weight.dtype,
            weight.get_device(),
            weight.shape,
            weight.is_contiguous() or weight.stride(),
            None
            if bias is None
            else (bias.dtype, bias.get_device(), bias.shape, bias.is_contiguous() or bias.stride()),
            _fp32_precision("cuda", "matmul") if dtype is torch.float32 else None,
        )
    except RuntimeError:  # sparse and nested tensors
        return None


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """What ``note`` hears in this thread meanwhile."""
    launches: list[Launch] = []
    _recording.launches = launches
    try:
        yield launches
    finally:
        del _recording.launches


def note(*launch: Any) -> None:
    """``launch.py`` tells what it launched: the fields of ``Launch``."""
    launches = getattr(_recording, "launches", None)
    if launches is not None:
        launches.append(Launch(*launch))


def keep(
    key: Any,
    launches: list[Launch],
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None],
    shape: tuple[int, ...],
) -> None:
    """Keep the call that made ``launches``, if it can be made again from nothing but addresses.

    tensors: x, weight, bias, out and preact of that call. shape: what out and preact are to have from now on.
    """
    call = _call(launches, tensors, shape)
    if call is None or key is None:
        return
    if len(calls) >= MAX_CALLS:
        calls.clear()
    calls[key] = call


def _call(launches: list[Launch], tensors: tuple[Tensor | None, ...], shape: tuple[int, ...]) -> Call | None:
    if len(launches) != 1:
        return None
    launch = launches[0]
    addresses = tuple(None if tensor is None else tensor.data_ptr() for tensor in tensors)
    if launch.values[:5] != addresses or any(place >= 5 for place in launch.places):
        return None  # descriptors, a copy, a workspace
    if any(address is not None and address % 16 for address in addresses):
        return None
    return Call(launch, shape, tensors[-1] is not None)
