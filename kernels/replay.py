"""Calls of ``linear_act`` that were made before: one look-up instead of every check and choice on the way to a launch.

A call whose tensors agree with an earlier one's in dtype, device, shape, strides and 16-byte alignment passes the same
checks, takes the same configuration and launches the same kernel with the same numbers; only addresses differ. What is
kept makes that launch: a function of x, weight and bias that gives ``(out, preact)``, or None where this call must be
made anew. It holds no tensor.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Grid = tuple[int, int, int]
Launcher = Callable[[Grid, int, tuple[Any, ...]], None]  # grid, stream, the kernel's arguments
Encoder = Callable[[int], tuple[Any, ...]]  # from a tensor's address to what a launcher is given for its descriptor
Outputs = tuple[Tensor, Tensor | None]
Call = Callable[[Tensor, Tensor, Tensor | None], Outputs | None]

MAX_CALLS = 2048
MAX_ENCODED = 8192

# A torch without CUDA has neither.
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: -1)
current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0)

_fp32_precision: Callable[[str, str], str] = torch._C._get_fp32_precision_getter

calls: dict[Any, Call] = {}
os.register_at_fork(after_in_child=calls.clear)
# What ``launch.py``'s encoders have encoded.
encoded: dict[tuple[int, int], tuple[Any, ...]] = {}


@dataclass(frozen=True)
class Launch:
    """A launch of a kernel: what it takes to make it again with other addresses.

    values: the kernel's arguments: addresses, descriptors and numbers. encoders: one for each descriptor among them.
    """

    kernel: Any
    is_observed: Callable[[Any], bool]
    launcher: Launcher
    device: int
    grid: Grid
    values: tuple[Any, ...]
    encoders: tuple[Encoder, ...] = ()

    def starter(self) -> Callable[[tuple[Any, ...]], None]:
        """A function that launches the kernel on its device's current stream."""
        launcher, device, grid = self.launcher, self.device, self.grid

        def start(values: tuple[Any, ...]) -> None:
            if current_device() == device:
                launcher(grid, current_stream(device), values)
            else:
                with torch.cuda.device(device):
                    launcher(grid, current_stream(device), values)

        return start


def key_of(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save_preact: bool) -> Any:
    """All that the way to a launch depends on, addresses aside; None for tensors without a shape or strides.

    An index says where a tensor is: no process has two kinds of accelerator, and the CPU's is -1. Contiguous tensors of
    one shape differ at most in the stride of a dimension of size 1, which no address depends on.
    """
    dtype = x.dtype
    try:
        return (
            activation,
            save_preact,
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


def keep(key: Any, call: Call) -> None:
    if key is None:
        return
    if len(calls) >= MAX_CALLS:
        calls.clear()
    calls[key] = call


def fused_call(launch: Launch, shape: tuple[int, ...], saves_preact: bool) -> Call:
    """The call that made ``launch``, whose arguments began with x, weight, bias, out and preact, all of them on 16-byte
    boundaries.

    shape: that of out and preact.
    """
    kernel, is_observed, start = launch.kernel, launch.is_observed, launch.starter()
    shape, numbers = tuple(shape), launch.values[5:]
    if launch.encoders:
        encode_x, encode_weight, encode_out, *encode_preact = launch.encoders
    has_descriptors = bool(launch.encoders)

    def call(x: Tensor, weight: Tensor, bias: Tensor | None) -> Outputs | None:
        if is_observed(kernel):
            return None
        x_address, weight_address = x.data_ptr(), weight.data_ptr()
        addresses = x_address | weight_address
        bias_address = None
        if bias is not None:
            bias_address = bias.data_ptr()
            addresses |= bias_address
        out = x.new_empty(*shape)  # a torch.Size would take twice the time
        out_address = out.data_ptr()
        preact, preact_address = None, None
        if saves_preact:
            preact = torch.empty_like(out)
            preact_address = preact.data_ptr()
            addresses |= preact_address
        # A lazily zero tensor has no address.
        if (addresses | out_address) & 15 or not (x_address and weight_address and bias_address != 0):
            return None
        if has_descriptors:
            start(
                (
                    *encode_x(x_address),
                    *encode_weight(weight_address),
                    bias_address,
                    *encode_out(out_address),
                    *(encode_preact[0](preact_address) if preact_address is not None else (None,)),
                    *numbers,
                )
            )
        else:
            start((x_address, weight_address, bias_address, out_address, preact_address, *numbers))
        return out, preact

    return call


def library_call(launch: Launch, product: Callable[..., Tensor], saves_preact: bool) -> Call:
    """The call that took the matrix product from cuBLAS and then made ``launch``, whose arguments began with the
    product and out, both on 16-byte boundaries."""
    kernel, is_observed, start = launch.kernel, launch.is_observed, launch.starter()
    numbers = launch.values[2:]

    def call(x: Tensor, weight: Tensor, bias: Tensor | None) -> Outputs | None:
        if is_observed(kernel):
            return None
        preact = product(x, weight, bias)
        out = torch.empty_like(preact) if saves_preact else preact
        preact_address, out_address = preact.data_ptr(), out.data_ptr()
        if (preact_address | out_address) & 15 or not preact_address:
            return None
        start((preact_address, out_address, *numbers))
        return out, preact if saves_preact else None

    return call
