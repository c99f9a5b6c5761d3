"""A program ready to be executed: runs of arithmetic as functions, and all else as effects."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .arithmetic import Operands, Source, results
from .instructions import Effect, effect
from .numbers import Array
from .parse import Instruction, Program, parse

if TYPE_CHECKING:
    from .block import Block

# Instructions that decide where to go on; ``Block`` knows them by name.
_CONTROL = ("bra", "brx", "ret", "bar", "barrier", "setmaxnreg")


@dataclass
class Run:
    """Arithmetic instructions without a guard, done by one function. stop: the index after the last."""

    function: Callable[..., None]
    stop: int
    registers: frozenset[int]
    written: frozenset[int]


@dataclass
class Kernel:
    """A program ready to be executed. runs: by the index of the first instruction."""

    program: Program
    operands: Operands
    runs: dict[int, Run] = field(default_factory=dict)
    effects: dict[int, Effect] = field(default_factory=dict)
    masked_runs: dict[int, Callable[..., None]] = field(default_factory=dict)
    uses_wgmma: bool = False

    @classmethod
    def of(cls, text: str) -> "Kernel":
        """Translate a PTX module. Raises ``PTXError`` if an instruction is not emulated."""
        program = parse(text)
        kernel = cls(program, Operands(program))
        kernel.uses_wgmma = any(ins.parts[0] == "wgmma" for ins in program.code)
        targets = set(program.labels.values())
        start, source = 0, Source(kernel.operands)
        for index, ins in enumerate(program.code):
            computed = None if _is_control(ins) else results(ins, kernel.operands)
            if index in targets or computed is None or ins.guard is not None:
                kernel._end_run(start, index, source)
                start, source = index, Source(kernel.operands)
            if computed is not None and ins.guard is None:
                source.add(computed)
                continue
            start = index + 1
            if computed is None and not _is_control(ins):
                kernel.effects[index] = effect(ins, kernel.operands)
        return kernel

    def _end_run(self, start: int, stop: int, source: Source) -> None:
        if stop > start:
            registers = frozenset().union(*(ins.registers for ins in self.program.code[start:stop]))
            self.runs[start] = Run(source.compile(), stop, registers, frozenset(source.written))

    def masked(self, start: int) -> Callable[..., None]:
        """Return the function of a run for a part of the threads; translated when it is first asked for."""
        if start not in self.masked_runs:
            source = Source(self.operands, masked=True)
            for ins in self.program.code[start : self.runs[start].stop]:
                source.add(results(ins, self.operands) or [])
            self.masked_runs[start] = source.compile()
        return self.masked_runs[start]

    def effect(self, index: int) -> Effect:
        """Return what one instruction does; an arithmetic one is translated when it is first asked for."""
        if index not in self.effects:
            source = Source(self.operands, masked=True)
            source.add(results(self.program.code[index], self.operands) or [])
            function, written = source.compile(), source.written

            def compute(block: "Block", mask: Array | None) -> None:
                function(block, block.registers, mask)
                block.wgmma.unfenced |= written

            self.effects[index] = compute
        return self.effects[index]


def _is_control(ins: Instruction) -> bool:
    if (ins.parts[0] not in _CONTROL and ins.parts[:2] != ["mbarrier", "try_wait"]) or ins.parts[:2] == ["bar", "warp"]:
        return False
    if ins.guard is not None and ins.parts[0] != "bra":
        raise ins.error(f"a guard of {ins.op} is not emulated")
    return True
