"""Hand each launch of the stub driver to the emulator: kernels run in this process as on a GPU.

What runs is our Python, Triton's specialisation, compiler and C launcher, and the PTX. Tensors are on the CPU, in this
process's own memory; the emulator gets a copy of each, and what it wrote is copied back.
"""

import ctypes
import functools
import threading
import traceback
from typing import Any

import torch
from emulator.block import Block
from emulator.kernel import Kernel
from emulator.memory import Memory, Tensor
from emulator.tensor_map import TensorMap
from execute import bits
from one import reason_to_allow

from benchmarks.static import stub_driver
from bert_fused.kernels.hopper import linear_act_hopper_kernel

_EXECUTOR = ctypes.CFUNCTYPE(None, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32, ctypes.POINTER(ctypes.c_void_p))
_now = threading.local()  # launch, tensors: of the call that is under way in a thread

# What went wrong in launches so far, in words.
failures: list[str] = []


def install(arch: int) -> None:
    """Execute this process's launches, compiled for an architecture. The process needs ``stub_driver.environment``."""
    stub = stub_driver.install(arch)

    from bert_fused.kernels import runtime
    from bert_fused.kernels.plan import Launch

    runtime._num_sms_of_index = lambda index: 1  # so that persistent blocks have several tiles each
    call = Launch.__call__

    def watched(self: Launch, *tensors: Any) -> None:
        _now.launch, _now.tensors = self, [tensor for tensor in tensors if tensor is not None]
        call(self, *tensors)

    Launch.__call__ = watched  # type: ignore[method-assign]
    global _keep
    _keep = _EXECUTOR(_execute)
    stub.stub_execute_with(_keep)


def _execute(function: int, blocks: int, shared: int, parameters: Any) -> None:
    try:
        _run(function, blocks, shared, parameters)
    except BaseException:  # ctypes would print it and go on
        failures.append(traceback.format_exc())


@functools.lru_cache(256)
def _kernel_of(ptx: str) -> Kernel:
    return Kernel.of(ptx)


def _run(function: int, blocks: int, shared: int, parameters: Any) -> None:
    jitted = _now.launch.kernel
    handles = (handle for cache in jitted.device_caches.values() for handle in cache[0].values())
    compiled = next(handle for handle in handles if handle.function == function)
    kernel, memory = _kernel_of(compiled.asm["ptx"]), Memory()
    views = {tensor.data_ptr(): _matrix(tensor) for tensor in _now.tensors if tensor.numel()}
    held = {address: _add(memory, jitted.fn.__name__, view) for address, view in views.items()}
    sizes = [parameter.size for parameter in kernel.program.parameters]
    arguments = [_argument(ctypes.string_at(parameters[i], size)) for i, size in enumerate(sizes)]
    for index in range(blocks):
        seed = index if jitted is linear_act_hopper_kernel else None
        block = Block(kernel, memory, arguments, shared, index, blocks, seed)
        block.run()
        failures.extend(
            f"{jitted.fn.__name__}, line {line}: {kind}: {text}"
            for (kind, line), text in block.reports.items()
            if reason_to_allow(kind, text) is None
        )
    for address, tensor in held.items():
        times = memory.times_written(tensor)
        if times.any():
            if (times != 1).any():
                failures.append(f"{jitted.fn.__name__}: bytes of a tensor not written exactly once")
            bits(views[address])[...] = memory.read(tensor)


def _matrix(tensor: torch.Tensor) -> torch.Tensor:
    """Return a view ``[rows, columns]`` of a tensor."""
    tensor = tensor.detach()
    view = tensor.reshape(-1, tensor.shape[-1])
    assert view.data_ptr() == tensor.data_ptr()
    return view


def _add(memory: Memory, name: str, view: torch.Tensor) -> Tensor:
    row, column = view.stride()
    return memory.add(name, bits(view), stride=row, column_stride=column, address=view.data_ptr())


def _argument(data: bytes) -> int | TensorMap:
    return TensorMap.decode(data) if len(data) == 128 else int.from_bytes(data, "little")
