"""Instructions for asynchronous work: cp.async, bulk copies, mbarriers, fences, wgmma and tcgen05."""

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from .arithmetic import PARAMETER_BASE, PARAMETER_STEP
from .matrices import ELEMENTS, operand
from .numbers import Array
from .parse import Instruction
from .tensor_map import TensorMap

if TYPE_CHECKING:
    from .block import Block
    from .instructions import Effect, Getter, Reader

Builder = Callable[[Instruction, "Reader"], "Effect | None"]


def _acting(block: "Block", mask: Array | None, *getters: "Getter") -> Iterator[tuple[int, ...]]:
    """Yield each acting thread's warp and its values."""
    values = [getter(block) for getter in getters]
    for thread in range(block.threads) if mask is None else np.flatnonzero(mask):
        yield int(block.warp[thread]), *(int(value[thread]) for value in values)


def _copy(ins: Instruction, reader: "Reader") -> "Effect | None":
    what = ins.parts[2]
    if what == "bulk":
        return _bulk(ins, reader)
    if what == "commit_group":
        return lambda block, mask: block.copies.groups.commit(block.warps(mask))
    if what == "wait_group":
        groups = int(ins.args[0])
        return lambda block, mask: block.copies.groups.wait(block.warps(mask), groups)
    if what not in ("cg", "ca"):
        return None
    target, source = reader.address(ins.args[0], wide=False), reader.address(ins.args[1], wide=True)
    size = int(ins.args[2], 0)
    given = reader.get(ins.args[3] if len(ins.args) > 3 else str(size), "u32")

    def copy(block: "Block", mask: Array | None) -> None:
        targets, sources, bytes_given, warps = block.pick(mask, target(block), source(block), given(block), block.warp)
        block.copies.copy(targets, sources, size, bytes_given, warps, ins)

    return copy


def _bulk(ins: Instruction, reader: "Reader") -> "Effect | None":
    if ins.parts[3] == "commit_group":
        return lambda block, mask: block.bulk.stores.commit(block.warps(mask))
    if ins.parts[3] == "wait_group":
        groups = int(ins.args[0])
        return lambda block, mask: block.bulk.stores.wait(block.warps(mask), groups)
    if ins.parts[3:5] != ["tensor", "2d"]:
        return None
    loads = ins.parts[5].startswith("shared::")
    box = re.fullmatch(r"\[\s*(\S+),\s*\{(.*),(.*)\}\s*\]", ins.args[1 if loads else 0])
    if box is None:
        return None
    tensor, column, row = (
        reader.get(box[1], "u64"),
        reader.get(box[2].strip(), "s32"),
        reader.get(box[3].strip(), "s32"),
    )
    shared = reader.address(ins.args[0 if loads else 1], wide=False)
    if loads:
        barrier_at = reader.address(ins.args[2], wide=False)

        def load(block: "Block", mask: Array | None) -> None:
            for warp, described, to, first_row, first_column, at in _acting(
                block, mask, tensor, shared, row, column, barrier_at
            ):
                block.bulk.load(_map(block, described, ins), to, first_row, first_column, at, warp, ins)

        return load

    def store(block: "Block", mask: Array | None) -> None:
        for warp, described, at, first_row, first_column in _acting(block, mask, tensor, shared, row, column):
            block.bulk.store(_map(block, described, ins), at, first_row, first_column, warp, ins)

    return store


def _map(block: "Block", address: int, ins: Instruction) -> TensorMap:
    index = (address - PARAMETER_BASE) // PARAMETER_STEP
    argument = block.arguments[index] if 0 <= index < len(block.arguments) else None
    if not isinstance(argument, TensorMap):
        raise ins.error("not a tensor map")
    return argument


def _mbarrier(ins: Instruction, reader: "Reader") -> "Effect | None":
    what = ins.parts[1]
    if what in ("init", "inval"):
        address, count = reader.address(ins.args[0], wide=False), int(ins.args[1]) if what == "init" else 0

        def begin_or_end(block: "Block", mask: Array | None) -> None:
            for warp, at in _acting(block, mask, address):
                if what == "init":
                    block.barriers.init(at, count, warp, ins)
                else:
                    block.barriers.invalidate(at, warp, ins)

        return begin_or_end
    if what != "arrive" or len(ins.args) != (3 if ins.parts[2] == "expect_tx" else 2):
        return None
    address, count = reader.address(ins.args[1], wide=False), int((*ins.args, "0")[2])

    def expect(block: "Block", mask: Array | None) -> None:
        for warp, at in _acting(block, mask, address):
            block.barriers.expect(at, count, warp, ins)

    return expect


def _fence(ins: Instruction, reader: "Reader") -> "Effect | None":
    if ins.parts[1:] not in (["proxy", "async"], ["proxy", "async", "shared::cta"]):
        return None
    return lambda block, mask: block.clocks.fence(block.warps(mask))


def _wgmma(ins: Instruction, reader: "Reader") -> "Effect | None":
    what = ins.parts[1]
    if what == "fence":
        return lambda block, mask: block.wgmma.unfenced.clear()
    if what == "commit_group":
        return lambda block, mask: block.wgmma.commit(block.warps(mask))
    if what == "wait_group":
        groups = int(ins.args[0])
        return lambda block, mask: block.wgmma.wait(block.warps(mask), groups)
    shape, element = re.fullmatch(r"m64n(\d+)k(\d+)", ins.parts[4]), ins.parts[6]
    if (
        shape is None
        or ins.parts[5] != "f32"
        or element not in ELEMENTS
        or int(shape[2]) * ELEMENTS[element] != 32
        or ins.args[1][0] == "{"
    ):
        return None
    if ins.args[4:6] != ["1", "1"]:  # signs
        return None
    transposed = [arg == "1" for arg in ins.args[6:]] or [False, False]
    targets, columns = reader.numbers(ins.args[0]), int(shape[1])
    a, b = reader.get(ins.args[1], "u64"), reader.get(ins.args[2], "u64")
    add = reader.get(ins.args[3], "pred")

    def multiply(block: "Block", mask: Array | None) -> None:
        if len(block.warps(mask)) % 4:
            raise ins.error("a part of a group of four warps")
        for group in np.unique(block.warps(mask) // 4):
            first = 128 * int(group)
            if any(len(np.unique(each(block)[first : first + 128])) > 1 for each in (a, b, add)):
                raise ins.error("not the same in the four warps")
            left = operand(int(a(block)[first]), 64, element, ins, transposed=transposed[0])
            right = operand(int(b(block)[first]), columns, element, ins, transposed=transposed[1])
            block.wgmma.multiply(int(group), targets, [left, right], bool(add(block)[first]), columns, element, ins)

    return multiply


def _tcgen05(ins: Instruction, reader: "Reader") -> "Effect | None":
    what = ins.parts[1]
    if what == "relinquish_alloc_permit":
        return lambda block, mask: None
    if what == "wait::st":
        return lambda block, mask: block.tensor_memory.finish(block.warps(mask), True)
    if what == "wait::ld":
        return lambda block, mask: block.tensor_memory.finish(block.warps(mask), False)
    build = {"alloc": _allocate, "dealloc": _deallocate, "ld": _access, "st": _access, "mma": _tensor_mma}
    if what == "commit":
        return _commit(ins, reader)
    return build[what](ins, reader) if what in build else None


def _allocate(ins: Instruction, reader: "Reader") -> "Effect | None":
    address, columns = reader.address(ins.args[0], wide=False), int(ins.args[1])

    def allocate(block: "Block", mask: Array | None) -> None:
        if len(block.warps(mask)) != 1:
            raise ins.error("more than one warp")
        start = block.tensor_memory.allocate(columns, ins)
        warp = block.warps(mask)[:1]  # the threads of one warp do it together
        at = address(block)[32 * warp]
        block.shared.store(at, 4, np.full((1, 1), start, np.uint32), warp, ins)
        block.shared.allocation = int(at[0]) >> 1, int(block.clocks.own(warp)[0])

    return allocate


def _deallocate(ins: Instruction, reader: "Reader") -> "Effect | None":
    address, columns = reader.get(ins.args[0], "u32"), int(ins.args[1])

    def release(block: "Block", mask: Array | None) -> None:
        if len(block.warps(mask)) != 1:
            raise ins.error("more than one warp")
        thread = 32 * int(block.warps(mask)[0])
        block.tensor_memory.check_idle(thread // 32, ins)
        block.tensor_memory.release(int(address(block)[thread]), columns, ins)

    return release


def _access(ins: Instruction, reader: "Reader") -> "Effect | None":
    store, shape = ins.parts[1] == "st", ins.parts[4]
    if shape not in ("32x32b", "16x32bx2") or len(ins.parts) != 7:
        return None
    registers = reader.numbers(ins.args[-1 if store else 0])
    address = reader.address(ins.args[0 if store else 1], wide=False)
    split = int(ins.args[1 if store else 2]) if shape == "16x32bx2" else None

    def access(block: "Block", mask: Array | None) -> None:
        memory = block.tensor_memory
        addresses, lanes, warps = block.pick(mask, address(block), block.lane, block.warp)
        at = memory.access(addresses, lanes, len(registers), split, warps, store, ins)
        if store:
            values = np.stack([block.registers[number].view(np.float32) for number in registers], 1)
            memory.data[at] = block.pick(mask, values)[0]
            return
        for number, column in zip(registers, memory.data[at].view(np.uint32).T, strict=True):
            block.put(number, column, mask, picked=True)
        memory.loading.update(registers)

    return access


def _tensor_mma(ins: Instruction, reader: "Reader") -> "Effect | None":
    element = ins.parts[3].removeprefix("kind::")
    if element not in ELEMENTS or ins.parts[2] != "cta_group::1" or len(ins.args) != 5:
        return None
    target = reader.address(ins.args[0], wide=False)
    a, b = reader.get(ins.args[1], "u64"), reader.get(ins.args[2], "u64")
    shape, add = reader.get(ins.args[3], "u32"), reader.get(ins.args[4], "pred")

    def multiply(block: "Block", mask: Array | None) -> None:
        for warp, to, left, right, descriptor, added in _acting(block, mask, target, a, b, shape, add):
            block.tensor_memory.multiply(to, left, right, descriptor, bool(added), element, warp, ins)

    return multiply


def _commit(ins: Instruction, reader: "Reader") -> "Effect | None":
    barrier_at = reader.address(ins.args[0], wide=False)

    def commit(block: "Block", mask: Array | None) -> None:
        for warp, at in _acting(block, mask, barrier_at):
            block.tensor_memory.commit(at, warp, ins)

    return commit


def _meet(ins: Instruction, reader: "Reader") -> "Effect | None":
    # A warp's threads are one agent here, so there is nothing more to order.
    if ins.args not in (["-1"], ["0xffffffff"]):
        raise ins.error(f"{ins.op} is not emulated for a part of a warp")
    return lambda block, mask: None


BUILDERS: dict[str, Builder] = {
    "bar": _meet,
    "cp": _copy, "mbarrier": _mbarrier, "fence": _fence, "wgmma": _wgmma, "tcgen05": _tcgen05,
}  # fmt: skip
