"""Where kernels run: an NVIDIA GPU, or Triton's interpreter on the CPU (``TRITON_INTERPRET=1``)."""

import contextlib
import functools

import torch
import triton

# Triton decides when it decorates a function, so a process interprets either every kernel or none.
INTERPRETED: bool = triton.knobs.runtime.interpret

INTERPRETER_ARCH = 0
INTERPRETER_SMS = 2


@functools.cache
def _arch_of_index(index: int | None) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def arch_of(device: torch.device) -> int:
    """Return the compute capability as one number (90 for sm_90), or ``INTERPRETER_ARCH``."""
    return INTERPRETER_ARCH if INTERPRETED else _arch_of_index(device.index)


@functools.cache
def _num_sms_of_index(index: int | None) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def num_sms(device: torch.device) -> int:
    """Return the number of SMs; the interpreter has few, so that persistent blocks have several tiles each."""
    return INTERPRETER_SMS if INTERPRETED else _num_sms_of_index(device.index)


@functools.cache
def _name_of_index(index: int | None) -> str:
    return str(torch.cuda.get_device_name(index))


def name_of(device: torch.device) -> str:
    """Return the GPU's name, under which its measured table is kept; empty for the interpreter, which has none."""
    return "" if INTERPRETED else _name_of_index(device.index)


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[None]:
    """Make the tensor's device the current one, on which Triton launches."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else contextlib.nullcontext()
