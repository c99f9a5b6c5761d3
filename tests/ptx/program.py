"""Small programs by hand: PTX text around a body, executed by one block."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from emulator.block import Block
from emulator.kernel import Kernel
from emulator.memory import Memory, Tensor
from emulator.numbers import Array, to_bf16, to_half
from emulator.tensor_map import TensorMap

_TEXT = """
.version 8.7
.target sm_100a
.visible .entry program(
{parameters}
)
.reqntid {threads}
.maxnreg {max_registers}
{{
	.reg .pred %p<20>;
	.reg .b16 %rs<40>;
	.reg .b32 %r<200>;
	.reg .b64 %rd<40>;
{body}
	ret;
}}
"""
_RNG = np.random.default_rng(0)

# Addresses of the first parameters in %rd1 to %rd4, the thread's number in %r1, four and eight times that in %r2, %r3.
_PROLOGUE = "mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 2; shl.b32 %r3, %r1, 3; cvt.u64.u32 %rd10, %r2;"


@dataclass
class Ran:
    """What a program left: the output, and the kinds of reports."""

    block: Block
    memory: Memory
    out: Tensor

    @property
    def result(self) -> Array:
        """The output ``[threads]``, uint32."""
        return self.memory.read(self.out)[0]

    @property
    def kinds(self) -> set[str]:
        return {kind for kind, _ in self.block.reports}

    def floats(self) -> Array:
        return self.result.view(np.float32)


def run(
    body: str,
    *inputs: Array | TensorMap,
    threads: int = 32,
    shared: int = 4096,
    memory: Memory | None = None,
    out_size: int | None = None,
    max_registers: int = 128,
    seed: int | None = None,
) -> Ran:
    """Execute a body. Its %rd1 is the output's address, %rd2 and on those of the inputs; tensor maps are parameters.

    The output has a uint32 for each thread, of which ``st.global.b32 [%rd11], %r9`` writes one.
    """
    memory = memory or Memory()
    out = memory.add("out", np.zeros(out_size or threads, np.uint32), output=True)
    arguments: list[Any] = [out.address]
    arguments += [x if isinstance(x, TensorMap) else memory.add("input", x).address for x in inputs]
    kinds = [".align 64 .b8 {}[128]" if isinstance(x, TensorMap) else ".u64 {}" for x in arguments]
    parameters = ",\n".join(f"\t.param {kind.format(f'param_{i}')}" for i, kind in enumerate(kinds))
    loads = [f"ld.param.b64 %rd{i + 1}, [param_{i}];" for i, x in enumerate(arguments) if isinstance(x, int)]
    lines = [*loads, _PROLOGUE, "add.s64 %rd11, %rd1, %rd10;", *body.strip().split("\n")]
    text = _TEXT.format(parameters=parameters, threads=threads, max_registers=max_registers, body="\n".join(lines))
    block = Block(Kernel.of(text), memory, arguments, shared, 0, 1, seed)
    block.run()
    return Ran(block, memory, out)


def compute(instruction: str, *values: Array, kind: str = "b32", result: str = "b32") -> Array:
    """Return what an instruction computes of one value per thread: operands {0}, {1} ..., the result in {d}.

    kind, result: ``b32`` or ``b64``, for values and result.
    """
    threads = len(values[0])
    size, prefix = (8, "%rd") if kind == "b64" else (4, "%r")
    body = [f"cvt.u64.u32 %rd20, {'%r3' if size == 8 else '%r2'};"]
    for i in range(len(values)):
        body += [f"add.s64 %rd21, %rd{i + 2}, %rd20;", f"ld.global.{kind} {prefix}{30 + i}, [%rd21];"]
    target = "%rd39" if result == "b64" else "%r9"
    for i in range(len(values)):
        instruction = instruction.replace(f"{{{i}}}", f"{prefix}{30 + i}")
    body.append(instruction.replace("{d}", target))
    if result == "b64":
        body += ["mov.b64 {%r9, %r10}, %rd39;", "cvt.u64.u32 %rd22, %r3;", "add.s64 %rd22, %rd1, %rd22;"]
        body.append("st.global.v2.b32 [%rd22], {%r9, %r10};")
    else:
        body.append("st.global.b32 [%rd11], %r9;")
    ran = run("\n".join(body), *values, threads=threads, out_size=threads * (2 if result == "b64" else 1))
    assert not ran.kinds
    return ran.result.view(np.uint64) if result == "b64" else ran.result


def encoded(values: Array, element: str) -> Array:
    """Small integers as bits of an element."""
    values = values.astype(np.float32)
    return values.view(np.uint32) if element == "tf32" else (to_half if element == "f16" else to_bf16)(values)


def drawn(*shape: int) -> Array:
    return _RNG.integers(-8, 9, shape).astype(np.float32)
