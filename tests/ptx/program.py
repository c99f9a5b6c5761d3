"""Small PTX programs for the emulator's own tests, run in one block."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from emulator.block import Block, Kernel
from emulator.memory import Memory
from emulator.numbers import Array
from emulator.tensor_map import TensorMap

_TEXT = """.version 8.7
.target sm_100a
.address_size 64
.extern .shared .align 1024 .b8 global_smem[];
.visible .entry test({parameters})
.reqntid {threads}
{{
.reg .pred %p<8>;
.reg .b16 %h<16>;
.reg .b32 %r<300>;
.reg .b64 %d<16>;
.reg .b32 %t, %s, %lane, %warp;
.reg .b64 %out{addresses};
mov.u32 %t, %tid.x;
and.b32 %lane, %t, 31;
shr.u32 %warp, %t, 5;
mov.b32 %s, global_smem;
{prelude}
{body}
ret;
}}
"""


@dataclass(frozen=True)
class Boxes:
    """A matrix to pass as a tensor map, read or written in boxes (rows, columns). output: nothing is written yet."""

    array: Array
    box: tuple[int, int]
    swizzle: int = 0
    output: bool = False


@dataclass
class Outcome:
    """out: the output, ``[threads, per thread]``. given: the inputs afterwards. reports: kind -> the first in words."""

    out: Array
    given: list[Array]
    reports: dict[str, str]
    block: Block

    @property
    def kinds(self) -> list[str]:
        return sorted(self.reports)


def ptx(body: str, given: list[Any], threads: int, size: int) -> str:
    """Return a module with the body in it.

    It finds in %out the address of its thread's part, ``size`` bytes, of the output; in %a0 and on the address of each
    array (or tensor map) given; in %e0 and on that of the array's element of the thread's number. %s: shared memory.
    """
    parameters, prelude, addresses = [".param .u64 out"], f"ld.param.b64 %out, [out];mad.wide.u32 %out, %t, {size}, %out;", ""
    for i, array in enumerate(given):
        addresses += f", %a{i}, %e{i}"
        if isinstance(array, Boxes):
            parameters.append(f".param .align 64 .b8 given{i}[128]")
            prelude += f"\nmov.b64 %a{i}, given{i};"
        else:
            parameters.append(f".param .u64 given{i}")
            prelude += f"\nld.param.b64 %a{i}, [given{i}];mad.wide.u32 %e{i}, %t, {array.itemsize}, %a{i};"
    return _TEXT.format(
        parameters=", ".join(parameters), threads=threads, addresses=addresses, prelude=prelude, body=body
    )


def run(
    body: str, *given: Any, out: Any = np.uint32, per: int = 1, threads: int = 32, shared: int = 0, stride: int | None = None
) -> Outcome:
    """Execute a program over arrays and ``Boxes``. out, per: dtype and elements of each thread's part of the output."""
    memory, tensors = Memory(), []
    output = memory.add("out", np.zeros((threads, per), out), output=True)
    arguments: list[Any] = [output.address]
    for i, each in enumerate(given):
        array = each.array if isinstance(each, Boxes) else each
        tensor = memory.add(f"given{i}", array, stride=stride, output=isinstance(each, Boxes) and each.output)
        tensors.append(tensor)
        if isinstance(each, Boxes):
            arguments.append(
                TensorMap(tensor.address, tensor.shape, tensor.strides[0], each.box, each.swizzle, array.itemsize)
            )
        else:
            arguments.append(tensor.address)
    text = ptx(body, list(given), threads, per * np.dtype(out).itemsize)
    block = Block(Kernel.of(text), memory, arguments, shared, 0, 1)
    block.run()
    reports: dict[str, str] = {}
    for (kind, _), words in block.reports.items():
        reports.setdefault(kind, words)
    return Outcome(memory.read(output), [memory.read(tensor) for tensor in tensors], reports, block)
