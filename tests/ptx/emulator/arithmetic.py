"""Arithmetic instructions as Python source over arrays with an element for each thread."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .numbers import NAMES, NAMESPACE, SIZES, Array
from .parse import Instruction, Program

# Where the arrays of a block begin: shared memory, and the address of each parameter.
SHARED_BASE, PARAMETER_BASE, PARAMETER_STEP = 1024, 0x50000000, 256

_SYMBOLS = {"add": "+", "sub": "-", "mul": "*", "and": "&", "or": "|", "xor": "^"}
# What may stand between an operation and its types.
_MODIFIERS = {"rn", "ftz", "lo", "hi", "wide", "full", "approx", "NaN", "to", "global", "shared", "param"}
_MODIFIERS |= {"f32x2", "f16x2", "bf16x2", "lt", "le", "gt", "ge", "eq", "ne", "ltu", "leu", "gtu", "geu", "equ", "neu"}
_COMPARISONS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
_KEEPS_NAN = {"min": "np.minimum", "max": "np.maximum"}
_PAIRS = {"f16x2": "from_half", "bf16x2": "from_bf16"}


class Operands:
    """Reads the operands of a program's instructions. constants: what the source names as ``K[i]``."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.constants: list[Any] = []

    def number(self, name: str) -> int:
        """Return the number of a register; -1 for ``_``, which drops a result."""
        return -1 if name == "_" else self.program.registers[name][1]

    def source(self, ins: Instruction, name: str, kind: str) -> str:
        """Return source text for an operand's value as a PTX type."""
        registers = self.program.registers
        if name in registers:
            own, number = registers[name]
            if SIZES[own] < SIZES[kind]:
                raise ins.error(f"{name} has {own} and is read as {kind}")
            if NAMES[own] == NAMES[kind]:
                return f"R[{number}]"
            return f"R[{number}].{'view' if SIZES[own] == SIZES[kind] else 'astype'}({NAMES[kind]})"
        if name.startswith("%"):
            return f"block.special[{name!r}]"
        self.constants.append(self._constant(ins, name, kind))
        return f"K[{len(self.constants) - 1}]"

    def _constant(self, ins: Instruction, name: str, kind: str) -> Any:
        numpy_name = NAMES[kind]
        if kind == "pred":
            return np.bool_(int(name))
        if name.startswith("0f"):
            return np.array(int(name[2:], 16), np.uint32).view(numpy_name)[()]
        if name == "global_smem":
            return np.dtype(numpy_name).type(SHARED_BASE)
        for index, parameter in enumerate(self.program.parameters):
            if parameter.name == name:
                return np.dtype(numpy_name).type(PARAMETER_BASE + PARAMETER_STEP * index)
        if not re.fullmatch(r"-?(\d+|0x[0-9a-fA-F]+)", name):
            raise ins.error(f"operand {name} is not known")
        size = SIZES[kind]
        return np.array(int(name, 0) % (1 << 8 * size), f"u{size}").view(numpy_name)[()]


# An instruction's results: (register's name, PTX type of the text, source text).
Results = list[tuple[str, str, str]]
Value = Callable[[int, str], str]


def results(ins: Instruction, operands: Operands) -> Results | None:
    """Return what an instruction computes from registers, or None if it does more than that."""
    rule = _RULES.get(ins.parts[0])

    def value(index: int, kind: str) -> str:
        text = operands.source(ins, ins.args[index], kind)
        return f"ftz({text})" if kind == "f32" and "ftz" in ins.parts else text

    try:
        unknown = set(ins.parts[1:]) - _MODIFIERS - NAMES.keys()
        if rule is not None and unknown:
            raise KeyError(*unknown)
        return rule(ins, value) if rule is not None else None
    except (KeyError, IndexError) as error:
        raise ins.error(f"{ins.op} is not emulated ({error!r})") from error


def _one(ins: Instruction, kind: str, text: str) -> Results:
    return [(ins.args[0], kind, f"ftz({text})" if kind == "f32" and "ftz" in ins.parts else text)]


def _binary(ins: Instruction, value: Value) -> Results:
    op, parts, kind = ins.parts[0], ins.parts, ins.parts[-1]
    sign = _SYMBOLS[op]
    if kind == "f32x2":
        return _one(ins, "b64", f"({_pairs(ins, value, 1)} {sign} {_pairs(ins, value, 2)}).view(uint64)")
    if "wide" in parts or "hi" in parts:
        wide, narrow = {"s32": ("int64", "int32"), "u32": ("uint64", "uint32")}[kind]
        product = f"({value(1, kind)}.astype({wide}) * {value(2, kind)}.astype({wide}))"
        if "hi" in parts:
            return _one(ins, kind, f"({product} >> {wide}(32)).astype({narrow})")
        return _one(ins, "b64", f"{product}.view(uint64)")
    if parts[-2] == "f32":  # sm_100 adds 16-bit numbers to fp32
        read = {"f16": "from_half", "bf16": "from_bf16"}[kind]
        return _one(ins, "f32", f"{read}({value(1, 'b16')}) {sign} {value(2, 'f32')}")
    if kind in ("f16", "bf16"):
        raise KeyError(ins.op)
    return _one(ins, kind, f"{value(1, kind)} {sign} {value(2, kind)}")


def _pairs(ins: Instruction, value: Value, index: int) -> str:
    return f"{value(index, 'b64')}.view(float32)"


def _extreme(ins: Instruction, value: Value) -> Results:
    op, kind = ins.parts[0], ins.parts[-1]
    is_float = kind in ("f32", "f16", "bf16", *_PAIRS)
    functions = {"min": "np.fmin", "max": "np.fmax"} if is_float and "NaN" not in ins.parts else _KEEPS_NAN
    if not is_float or kind == "f32":
        return _one(ins, kind, f"{functions[op]}({value(1, kind)}, {value(2, kind)})")
    pair, element = ("b32", kind.removesuffix("x2")) if kind in _PAIRS else ("b16", kind)
    read, write = {"f16": ("from_half", "to_half"), "bf16": ("from_bf16", "to_bf16")}[element]
    a, b = (f"{read}({value(i, pair)}.view(uint16))" for i in (1, 2))
    return _one(ins, pair, f"{write}({functions[op]}({a}, {b})).view({NAMES[pair]})")


def _shift(ins: Instruction, value: Value) -> Results:
    kind = ins.parts[-1]
    return _one(ins, kind, f"shifted({value(1, kind)}, {value(2, 'u32')}, {ins.parts[0] == 'shl'})")


def _fma(ins: Instruction, value: Value) -> Results:
    if ins.parts[-1] == "f32x2":
        pairs = ", ".join(_pairs(ins, value, i) for i in (1, 2, 3))
        return _one(ins, "b64", f"fma({pairs}).view(uint64)")
    if ins.parts[-1] != "f32":
        raise KeyError(ins.op)
    return _one(ins, "f32", f"fma({value(1, 'f32')}, {value(2, 'f32')}, {value(3, 'f32')})")


def _mad(ins: Instruction, value: Value) -> Results:
    kind = ins.parts[-1]
    if ins.parts[1] == "wide":
        wide, result = {"s32": ("int64", "s64"), "u32": ("uint64", "u64")}[kind]
        product = f"{value(1, kind)}.astype({wide}) * {value(2, kind)}.astype({wide})"
        return _one(ins, result, f"{product} + {value(3, result)}")
    if ins.parts[1] != "lo":
        raise KeyError(ins.op)
    return _one(ins, kind, f"{value(1, kind)} * {value(2, kind)} + {value(3, kind)}")


def _unary(ins: Instruction, value: Value) -> Results:
    op, kind = ins.parts[0], ins.parts[-1]
    if op == "abs" and kind in _PAIRS:
        return _one(ins, "b32", f"{value(1, 'b32')} & uint32(0x7FFF7FFF)")
    if op == "abs" and kind in ("f16", "bf16"):
        return _one(ins, "b16", f"{value(1, 'b16')} & uint16(0x7FFF)")
    if kind in ("f16", "bf16"):
        raise KeyError(ins.op)
    template = {"neg": "-{}", "not": "~{}", "abs": "np.abs({})", "ex2": "exp2({})"}[op]
    if op == "ex2" and ins.op != "ex2.approx.ftz.f32":
        raise KeyError(ins.op)
    return _one(ins, kind, template.format(value(1, kind)))


def _divide(ins: Instruction, value: Value) -> Results:
    kind = ins.parts[-1]
    a, b = value(1, kind), value(2, kind)
    if ins.parts[0] == "rem":
        return _one(ins, kind, f"{a} - quotient({a}, {b}) * {b}")
    if kind == "f32":
        return _one(ins, kind, {"full": f"divide({a}, {b})", "rn": f"{a} / {b}"}[ins.parts[1]])
    return _one(ins, kind, f"quotient({a}, {b})")


def _bfe(ins: Instruction, value: Value) -> Results:
    kind, position, count = ins.parts[-1], int(ins.args[2]), int(ins.args[3])
    if kind not in ("u32", "s32"):
        raise KeyError(ins.op)
    return _one(ins, "b32", f"bits_of({value(1, 'b32')}, {position}, {count}, {kind == 's32'})")


def _select(ins: Instruction, value: Value) -> Results:
    kind = ins.parts[-1]
    return _one(ins, kind, f"np.where({value(3, 'pred')}, {value(1, kind)}, {value(2, kind)})")


def _compare(ins: Instruction, value: Value) -> Results:
    name, kind = ins.parts[1], ins.parts[-1]
    if kind in _PAIRS:  # two predicates
        read = _PAIRS[kind]
        halves = [f"{read}({value(i, 'b32')}.view(uint16)[{{half}}::2])" for i in (1, 2)]
        text = f" {_COMPARISONS[name]} ".join(halves)
        return [(target, "pred", text.format(half=half)) for half, target in enumerate(ins.args[0].split("|"))]
    a, b = value(1, kind), value(2, kind)
    if kind == "bf16":
        a, b = f"from_bf16({a})", f"from_bf16({b})"
    if name == "ne" and "f" in kind:  # false where a number is NaN
        return _one(ins, "pred", f"({a} < {b}) | ({a} > {b})")
    if name.endswith("u") and name[:-1] in _COMPARISONS:  # true where a number is NaN
        return _one(ins, "pred", f"({a} {_COMPARISONS[name[:-1]]} {b}) | np.isnan({a}) | np.isnan({b})")
    if len(ins.parts) - ("ftz" in ins.parts) != 3:  # combined with another predicate
        raise KeyError(ins.op)
    return _one(ins, "pred", f"{a} {_COMPARISONS[name]} {b}")


def _convert(ins: Instruction, value: Value) -> Results:
    to, source = ins.parts[-2:]
    if to in _PAIRS:  # the first operand goes to the upper half
        write = {"f16x2": "to_half", "bf16x2": "to_bf16"}[to]
        high, low = (f"{write}({value(i, 'f32')})" for i in (1, 2))
        return _one(ins, "b32", f"({high}.astype(uint32) << uint32(16)) | {low}")
    if source == "f32" and to in ("f16", "bf16"):
        return _one(ins, "b16", f"{'to_half' if to == 'f16' else 'to_bf16'}({value(1, 'f32')})")
    if to == "f32" and source in ("f16", "bf16"):
        return _one(ins, "f32", f"{'from_half' if source == 'f16' else 'from_bf16'}({value(1, 'b16')})")
    if "f" in to + source:
        raise KeyError(ins.op)
    return _one(ins, to, f"{value(1, source)}.astype({NAMES[to]})")


def _move(ins: Instruction, value: Value) -> Results | None:
    kind = ins.parts[-1]
    if ins.args[0].startswith("{"):
        return None  # several registers of other widths (``instructions.py``)
    if ins.args[1].startswith("{"):
        return None
    return _one(ins, kind, value(1, kind))


def _address(ins: Instruction, value: Value) -> Results:
    return _one(ins, "u64", value(1, "u64"))


_RULES: dict[str, Callable[[Instruction, Value], Results | None]] = {
    **dict.fromkeys(_SYMBOLS, _binary),
    **dict.fromkeys(("min", "max"), _extreme),
    **dict.fromkeys(("shl", "shr"), _shift),
    **dict.fromkeys(("neg", "not", "abs", "ex2"), _unary),
    **dict.fromkeys(("div", "rem"), _divide),
    "fma": _fma, "mad": _mad, "bfe": _bfe, "selp": _select, "setp": _compare, "cvt": _convert, "mov": _move,
    "cvta": _address,
}  # fmt: skip


class Source:
    """Python source for a run of arithmetic instructions.

    A value computed in it stays in a local variable, for readers of the same type. masked: the function takes a mask,
    and threads outside keep their registers.
    """

    def __init__(self, operands: Operands, *, masked: bool = False) -> None:
        self.operands, self.masked = operands, masked
        self.lines: list[str] = []
        self.locals: dict[str, str] = {}
        self.written: set[int] = set()

    def add(self, computed: Results) -> None:
        # Two results of one instruction must not read each other.
        texts = [self._with_locals(text) for _, _, text in computed]
        for (target, kind, _), text in zip(computed, texts, strict=True):
            if not re.search(r"\bv\d|R\[|block", text):  # constants alone
                text = f"np.full(block.threads, {text})"
            own, number = self.operands.program.registers[target]
            name = f"v{len(self.lines)}"
            self.lines.append(f"{name} = {text}")
            if SIZES[own] > SIZES[kind]:  # a narrow integer in a wide register
                name = f"{name}.astype({NAMES[own]})"
            elif NAMES[own] != NAMES[kind]:
                name = f"{name}.view({NAMES[own]})"
            self.lines.append(
                f"R[{number}] = keep(mask, {name}, R[{number}])" if self.masked else f"R[{number}] = {name}"
            )
            self.locals = {key: value for key, value in self.locals.items() if not key.startswith(f"R[{number}]")}
            if not self.masked and SIZES[own] == SIZES[kind]:
                view = "" if NAMES[own] == NAMES[kind] else f".view({NAMES[kind]})"
                self.locals[f"R[{number}]{view}"] = f"v{len(self.lines) - 2}"
            self.written.add(number)

    def _with_locals(self, text: str) -> str:
        def local(match: re.Match[str]) -> str:
            return self.locals.get(match[0], match[0])

        return re.sub(r"R\[\d+\](?:\.view\(\w+\))?", local, text)

    def compile(self) -> Callable[..., None]:
        body = "\n    ".join(self.lines or ["pass"])
        namespace = {**NAMESPACE, "K": self.operands.constants, "keep": keep}
        exec(f"def run(block, R, mask=None):\n    {body}", namespace)
        run: Callable[..., None] = namespace["run"]
        return run


def keep(mask: Array | None, new: Array, old: Array | None) -> Array:
    """Return ``new`` where the mask is true and ``old``, or ones if there is nothing yet, elsewhere."""
    if mask is None:
        return new
    if old is None:
        old = np.full(len(mask), True if new.dtype == bool else -1).astype(new.dtype)
    return np.where(mask, new, old)
