"""Instructions that do more than compute a register from registers, as functions of a block and its acting threads."""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from . import asynchronous
from .arithmetic import Operands
from .matrices import mma_sync
from .numbers import NAMES, SIZES, Array
from .parse import Instruction

if TYPE_CHECKING:
    from .block import Block

# ``mask``: the threads that act, None for all.
Effect = Callable[["Block", Array | None], None]
Getter = Callable[["Block"], Array]


class Reader:
    """The operands of one instruction, as functions of a block that return an element for each thread."""

    def __init__(self, ins: Instruction, operands: Operands) -> None:
        self.ins, self.operands = ins, operands

    def get(self, name: str, kind: str) -> Getter:
        registers, dtype = self.operands.program.registers, NAMES[kind]
        if name in registers:
            own, number = registers[name]
            if NAMES[own] == dtype:
                return lambda block: block.registers[number]
            if SIZES[own] == SIZES[kind]:
                return lambda block: block.registers[number].view(dtype)
        text = self.operands.source(self.ins, name, kind)
        constants = self.operands.constants
        if text.startswith("K"):
            constant = constants[int(text[2:-1])]
            return lambda block: np.full(block.threads, constant)
        if name in registers:
            return lambda block: block.registers[number].astype(dtype)
        return lambda block: block.special[name]

    def address(self, text: str, *, wide: bool) -> Getter:
        """Return the addresses ``[base + offset]`` as int64. wide: in global memory."""
        match = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+))?\s*\]", text)
        if match is None:
            raise self.ins.error(f"address {text} is not emulated")
        base, offset = self.get(match[1], "u64" if wide else "u32"), int(match[2] or 0)
        return lambda block: base(block).astype(np.int64) + offset

    def numbers(self, text: str) -> list[int]:
        """Return the numbers of registers in braces, or of one."""
        return [self.operands.number(name) for name in names(text)]


def names(text: str) -> list[str]:
    return [name.strip() for name in text.strip("{} ").split(",")]


def effect(ins: Instruction, operands: Operands) -> Effect:
    """Return what an instruction does. Raises ``PTXError`` for one that is not emulated."""
    build = _BUILDERS.get(ins.parts[0]) or asynchronous.BUILDERS.get(ins.parts[0])
    try:
        built = build(ins, Reader(ins, operands)) if build is not None else None
    except (KeyError, IndexError, ValueError) as error:
        raise ins.error(f"{ins.op} is not emulated ({error!r})") from error
    if built is None:
        raise ins.error(f"{ins.op} is not emulated")
    return built


def _move(ins: Instruction, reader: Reader) -> Effect | None:
    size = SIZES[ins.parts[-1]]
    if ins.args[0].startswith("{"):
        targets = reader.numbers(ins.args[0])
        source, part = reader.get(ins.args[1], ins.parts[-1]), f"u{size // len(targets)}"

        def split(block: "Block", mask: Array | None) -> None:
            parts = source(block).view(part).reshape(-1, len(targets))
            for target, values in zip(targets, parts.T, strict=True):
                block.put(target, values, mask)

        return split
    (target,) = reader.numbers(ins.args[0])
    parts = names(ins.args[1])
    kind = f"b{8 * size // len(parts)}"
    sources = [(reader.operands.program.registers.get(name, ("", -1))[1], reader.get(name, kind)) for name in parts]

    def join(block: "Block", mask: Array | None) -> None:
        # LLVM packs a register that nothing is written to where nobody reads that part: it holds ones here.
        unset = np.full(block.threads, -1).astype(NAMES[kind])
        values = np.stack(
            [unset if i >= 0 and block.registers[i] is None else source(block) for i, source in sources], 1
        )
        block.put(target, values.view(f"u{size}")[:, 0], mask)

    return join


def _load(ins: Instruction, reader: Reader) -> Effect | None:
    space, kind = ins.parts[1], ins.parts[-1]
    if space == "param":
        return _load_parameter(ins, reader)
    if space.split("::")[0] not in ("global", "shared"):
        return None
    targets, size, is_global = reader.numbers(ins.args[0]), SIZES[kind], space == "global"
    address = reader.address(ins.args[1], wide=is_global)
    own = [reader.operands.program.registers[name][0] for name in names(ins.args[0])]
    extended = any(SIZES[each] != size for each in own)
    if extended and kind not in ("b8", "u8"):
        return None

    def load(block: "Block", mask: Array | None) -> None:
        addresses, warps = block.pick(mask, address(block), block.warp)
        if is_global:
            places = block.memory.find(addresses, size * len(targets), ins, "load")
            values = block.memory.load(places, size, len(targets), ins, block.reports)
        else:
            values = block.shared.load(addresses, size, len(targets), warps, ins)
        values = values.astype(NAMES[own[0]]) if extended else values
        for target, column in zip(targets, values.T, strict=True):
            block.put(target, column, mask, picked=True)

    return load


def _load_parameter(ins: Instruction, reader: Reader) -> Effect | None:
    kind, name = ins.parts[-1], ins.args[1].strip("[] ")
    indices = [i for i, parameter in enumerate(reader.operands.program.parameters) if parameter.name == name]
    if not indices or SIZES[kind] < 4:
        return None
    (target,) = reader.numbers(ins.args[0])
    own = reader.operands.program.registers[ins.args[0]][0]
    wide = NAMES["s64" if kind[0] == "s" else "u64"]

    def load(block: "Block", mask: Array | None) -> None:
        argument = block.arguments[indices[0]]
        assert isinstance(argument, int)
        value = np.array(argument % 2 ** (8 * SIZES[kind]), f"u{SIZES[kind]}").view(NAMES[kind])
        if SIZES[own] > SIZES[kind]:
            value = value.astype(wide)
        block.put(target, np.full(block.threads, value.view(NAMES[own])), mask)

    return load


def _store(ins: Instruction, reader: Reader) -> Effect | None:
    space, kind = ins.parts[1].split("::")[0], ins.parts[-1]
    if space not in ("global", "shared"):
        return None
    size, is_global = SIZES[kind], space == "global"
    address = reader.address(ins.args[0], wide=is_global)
    sources = [reader.get(name, f"b{8 * size}") for name in names(ins.args[1])]

    def store(block: "Block", mask: Array | None) -> None:
        values = np.stack([source(block) for source in sources], 1)
        addresses, values, warps = block.pick(mask, address(block), values, block.warp)
        if is_global:
            places = block.memory.find(addresses, size * len(sources), ins, "store")
            block.memory.store(places, values, ins, block.reports)
        else:
            block.shared.store(addresses, size, values, warps, ins)

    return store


def _matrix_places(address: Getter, index: int, transposed: bool) -> tuple[Getter, int]:
    """Return the addresses ``[threads * n]`` of what each thread holds of the 8x8 matrix of this index, and their size.

    Threads 8 * index and on give the addresses of the rows. Thread 4g + t holds elements 2t and 2t + 1 of row g, which
    are 4 bytes; or, transposed, the element g of rows 2t and 2t + 1.
    """

    def together(block: "Block") -> Array:
        rows = address(block).reshape(-1, 32)[:, 8 * index : 8 * index + 8]
        return (np.repeat(rows, 4, axis=1) + 4 * (np.arange(32) % 4)).ravel()

    def apart(block: "Block") -> Array:
        rows = address(block).reshape(-1, 32)[:, 8 * index : 8 * index + 8]
        g, t = np.divmod(np.arange(32), 4)
        addresses: Array = rows[:, np.stack((2 * t, 2 * t + 1), 1)] + 2 * g[:, None]
        return addresses.ravel()

    return (apart, 2) if transposed else (together, 4)


def _load_matrix(ins: Instruction, reader: Reader) -> Effect | None:
    if ins.parts[3] != "m8n8" or ins.parts[-1] != "b16":
        return None
    targets, address = reader.numbers(ins.args[0]), reader.address(ins.args[1], wide=False)
    places = [_matrix_places(address, i, "trans" in ins.parts) for i in range(len(targets))]

    def load(block: "Block", mask: Array | None) -> None:
        for target, (addresses, size) in zip(targets, places, strict=True):
            acting = None if mask is None else np.repeat(mask, 4 // size)
            at, warps = block.pick(acting, addresses(block), np.repeat(block.warp, 4 // size))
            values = block.shared.load(at, size, 1, warps, ins)
            block.put(target, np.ascontiguousarray(values[:, 0]).view(np.uint32), mask, picked=True)

    return load


def _store_matrix(ins: Instruction, reader: Reader) -> Effect | None:
    if ins.parts[3] != "m8n8" or ins.parts[-1] != "b16":
        return None
    sources, address = reader.numbers(ins.args[1]), reader.address(ins.args[0], wide=False)
    places = [_matrix_places(address, i, "trans" in ins.parts) for i in range(len(sources))]

    def store(block: "Block", mask: Array | None) -> None:
        for source, (addresses, size) in zip(sources, places, strict=True):
            acting = None if mask is None else np.repeat(mask, 4 // size)
            values, warps = block.registers[source].view(f"u{size}"), np.repeat(block.warp, 4 // size)
            values, at, warps = block.pick(acting, values, addresses(block), warps)
            block.shared.store(at, size, values[:, None], warps, ins)

    return store


def _mma(ins: Instruction, reader: Reader) -> Effect | None:
    element = ins.parts[7]
    shape = {"f16": "m16n8k16", "bf16": "m16n8k16", "tf32": "m16n8k8"}.get(element)
    if ins.parts[3:7] != [shape, "row", "col", "f32"] or ins.parts[8:] != [element, "f32"]:
        return None
    d, a, b, c = (reader.numbers(arg) for arg in ins.args)

    def multiply(block: "Block", mask: Array | None) -> None:
        left, right, added = ([block.registers[number] for number in numbers] for numbers in (a, b, c))
        for target, values in zip(d, mma_sync(left, right, added, element), strict=True):
            block.put(target, values.view(np.uint32), mask)

    return multiply


def _shuffle(ins: Instruction, reader: Reader) -> Effect | None:
    mode = ins.parts[2]
    if mode not in ("bfly", "idx") or ins.args[3:] != ["31", "-1"]:
        return None
    (target,) = reader.numbers(ins.args[0])
    source, lane = reader.get(ins.args[1], "b32"), reader.get(ins.args[2], "u32")

    def shuffle(block: "Block", mask: Array | None) -> None:
        asked = lane(block).astype(np.int64)
        lanes = (block.lane ^ asked) if mode == "bfly" else asked % 32
        block.put(target, source(block)[(np.arange(block.threads) & ~31) + lanes], mask)

    return shuffle


def _elect(ins: Instruction, reader: Reader) -> Effect:
    leader, elected = (reader.operands.number(name) for name in ins.args[0].split("|"))

    def elect(block: "Block", mask: Array | None) -> None:
        block.put(leader, np.zeros(block.threads, np.uint32), mask)
        block.put(elected, block.lane == 0, mask)

    return elect


_BUILDERS: dict[str, Callable[[Instruction, Reader], Effect | None]] = {
    "mov": _move, "ld": _load, "st": _store, "ldmatrix": _load_matrix, "stmatrix": _store_matrix, "mma": _mma,
    "shfl": _shuffle, "elect": _elect,
}  # fmt: skip
