"""PTX text as instructions with their operands."""

import re
from dataclasses import dataclass, field


class PTXError(Exception):
    """The program does what it must not, or something that is not emulated. The message names the line."""


@dataclass
class Instruction:
    """One instruction.

    op: ``ld.global.v4.b32``; parts: that, split at its dots. args: operands, with the scope of their block in the name.
    guard: the predicate's name, if it has one; unless: whether the predicate must be false. registers: the numbers of
    all registers named. converged: all threads of a warp must execute it together.
    """

    line: int
    text: str
    op: str
    args: list[str]
    guard: str | None
    unless: bool
    registers: frozenset[int]
    parts: list[str] = field(init=False)
    converged: bool = field(init=False)

    def __post_init__(self) -> None:
        self.parts = self.op.split(".")
        first, second = self.parts[0], self.parts[1] if len(self.parts) > 1 else ""
        # Groups of asynchronous copies and fences belong to a thread; Triton's warps make them together.
        self.converged = (
            first in ("ldmatrix", "stmatrix", "mma", "wgmma", "shfl", "elect", "fence", "bar")
            or (first == "tcgen05" and second not in ("mma", "commit"))
            or (first == "cp" and not {"commit_group", "wait_group"}.isdisjoint(self.parts))
        )

    def error(self, what: str) -> PTXError:
        return PTXError(f"line {self.line}: {what}: {self.text[:120]}")


class Reports(dict[tuple[str, int], str]):
    """What is wrong without stopping the program: (kind, line) -> the first case in words."""

    def add(self, kind: str, ins: Instruction, what: str) -> None:
        self.setdefault((kind, ins.line), f"{what}: {ins.text[:90]}")


@dataclass(frozen=True)
class Parameter:
    """A kernel's parameter. size: its bytes."""

    name: str
    size: int


@dataclass
class Program:
    """A kernel's code. registers: name -> (PTX type, number). labels: name -> the index of an instruction.

    max_registers: of each thread at the start, 0 if not given. tables: name -> the labels that ``brx.idx`` has.
    """

    parameters: list[Parameter]
    threads: int
    max_registers: int = 0
    registers: dict[str, tuple[str, int]] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)
    code: list[Instruction] = field(default_factory=list)


_PARAMETER = re.compile(
    r"\.param\s+(?:\.align \d+ )?\.(\w\d+)(?:\s+\.ptr)?(?:\s+\.global)?(?:\s+\.align \d+)?\s+(\w+)(?:\[(\d+)\])?"
)
_ENTRY = re.compile(r"\.entry\s+\w+\((.*?)\)\s*(?:\.\w+[^\n{]*\n)*\{", re.S)
_GUARDED = re.compile(r"@(!?)([%\w]+)\s+(.*)")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+([%\w]+)(?:<(\d+)>)?")


def parse(text: str) -> Program:
    """Return the one kernel in a PTX module. Raises ``PTXError`` if there is none."""
    head = _ENTRY.search(text)
    threads = re.search(r"\.reqntid\s+(\d+)", text)
    if head is None or threads is None:
        raise PTXError("no .entry with .reqntid in the text")
    parameters = [
        Parameter(name, int(count) if count else int(kind[1:]) // 8)
        for kind, name, count in _PARAMETER.findall(head[1])
    ]
    limit = re.search(r"\.maxnreg\s+(\d+)", text)
    program = Program(parameters, int(threads[1]), int(limit[1]) if limit else 0)
    _Body(program).read(re.sub(r"[$\w]+:\s*\.branchtargets[^;]*;", _on_one_line, text), head.end())
    return program


def _on_one_line(table: re.Match[str]) -> str:
    return " ".join(table[0].split()) + table[0].count("\n") * "\n"


class _Body:
    """Reads a kernel's body. Registers and labels in braces, as inline assembly has them, get the block's number."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.scopes: list[dict[str, str]] = []

    def read(self, text: str, start: int) -> None:
        first = text.count("\n", 0, start) + 1
        self.scopes, blocks = [{}], 0
        lines = text[start:].split("\n")
        for number, raw in enumerate(lines, first):
            line = re.sub(r"\s+", " ", raw.split("//")[0]).strip()
            if line == "{":
                blocks += 1
                self.scopes.append(_local_names(lines[number - first + 1 :], blocks))
            elif line == "}":
                self.scopes.pop()
                if not self.scopes:
                    return
            else:
                self._statements(line, number)

    def _statements(self, line: str, number: int) -> None:
        label = re.match(r"([$\w]+):(?!:)\s*", line)
        if label:
            name, line = self._scoped(label[1]), line[label.end() :]
            if line.startswith(".branchtargets"):
                self.program.tables[name] = line.removeprefix(".branchtargets").strip(" ;").replace(" ", "").split(",")
            else:
                self.program.labels[name] = len(self.program.code)
        for statement in filter(None, map(str.strip, line.split(";"))):
            if statement.startswith(".reg"):
                self._declare(statement)
            elif not statement.startswith("."):
                self.program.code.append(self._instruction(statement, number))

    def _declare(self, statement: str) -> None:
        declared = _REGISTERS.match(statement)
        assert declared is not None
        kind, name, count = declared.groups()
        registers = self.program.registers
        for each in [f"{name}{i}" for i in range(int(count))] if count else [self._scoped(name)]:
            registers[each] = (kind, len(registers))

    def _scoped(self, name: str) -> str:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return name

    def _instruction(self, statement: str, number: int) -> Instruction:
        guard, unless, rest = None, False, statement
        guarded = _GUARDED.match(statement)
        if guarded:
            guard, unless, rest = self._scoped(guarded[2]), bool(guarded[1]), guarded[3]
        op, _, operands = rest.partition(" ")
        args = [self._scoped(arg) for arg in _split(operands)]
        names = [self._scoped(name) for name in re.findall(r"%?\w+", operands)]
        registers = self.program.registers
        used = frozenset(registers[name][1] for name in names if name in registers)
        return Instruction(number, statement, op, args, guard, unless, used)


def _local_names(lines: list[str], block: int) -> dict[str, str]:
    """Return the registers and labels that a block in braces declares, with its number."""
    names = []
    for line in lines:
        if line.strip() == "}":
            break
        names += re.findall(r"\.reg\s+\.\w+\s+(\w+)\s*;", line) + re.findall(r"^\s*([A-Za-z]\w*):", line)
    return {name: f"{name}@{block}" for name in names}


def _split(operands: str) -> list[str]:
    """Split at commas outside of braces and brackets."""
    depth, out, current = 0, [], ""
    for char in operands:
        depth += (char in "{[(") - (char in "}])")
        if char == "," and depth == 0:
            out.append(current.strip())
            current = ""
        else:
            current += char
    return [*out, current.strip()] if current.strip() else out
