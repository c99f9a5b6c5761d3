"""Matrix products: mma.sync on registers, wgmma on shared memory, tcgen05 on shared and tensor memory.

wgmma and tcgen05.mma multiply as late as a program may count on the result. Products are added up in fp32, in the order
of numpy's own product.
"""

import numpy as np

from .clocks import Clocks
from .copies import Groups, Mbarriers, Work
from .numbers import Array, from_bf16, from_half, tf32
from .parse import Instruction, Reports
from .shared import SharedMemory
from .tensor_map import WIDTHS, swizzled

# Number formats by the name in an instruction: the bytes of an element.
ELEMENTS = {"f16": 2, "bf16": 2, "tf32": 4}
# The width of a swizzled row in bytes, by the upper three bits of a shared memory descriptor.
_SWIZZLES = {2: WIDTHS[3], 4: WIDTHS[2], 6: WIDTHS[1]}


def numbers(bits: Array, element: str) -> Array:
    """Return matrix elements, given as unsigned integers, in fp32."""
    if element == "tf32":
        return tf32(bits.view(np.float32))
    return from_half(bits) if element == "f16" else from_bf16(bits)


def mma_sync(a: list[Array], b: list[Array], c: list[Array], element: str) -> list[Array]:
    """``mma.sync.m16n8k16`` of 16-bit numbers or ``m16n8k8`` of tf32: the registers of d, as fp32.

    Each argument holds registers with an element per thread. In a warp, thread 4g + t holds of a rows g and g + 8, of b
    column g, and of each the 32-bit pieces t and t + 4 of k.
    """
    per = 4 // ELEMENTS[element]  # elements in a register
    kind = f"u{ELEMENTS[element]}"
    left = np.stack([numbers(register.view(kind), element) for register in a])
    left = left.reshape(2, 2, -1, 8, 4, per)  # [half of k, half of the rows, warp, g, t, element]
    left = left.transpose(2, 1, 3, 0, 4, 5).reshape(-1, 16, 8 * per)
    right = np.stack([numbers(register.view(kind), element) for register in b])
    right = right.reshape(2, -1, 8, 4, per).transpose(1, 0, 3, 4, 2).reshape(-1, 8 * per, 8)
    product = np.matmul(left, right).reshape(-1, 2, 8, 4, 2)  # [warp, half of the rows, g, t, element]
    parts = product.transpose(1, 4, 0, 2, 3).reshape(4, -1)
    return [register.view(np.float32) + part for register, part in zip(c, parts, strict=True)]


def operand(descriptor: int, rows: int, element: str, ins: Instruction, *, transposed: bool = False) -> Array:
    """Return the addresses of an operand ``[rows, 32 bytes]`` that a shared memory descriptor names.

    It is made of pieces of 8 swizzled rows: each holds a part of k or, if transposed, of the operand's rows.
    """
    start = (descriptor & 0x3FFF) << 4
    leading, stride = (descriptor >> 16 & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    width = _SWIZZLES.get(descriptor >> 61)
    if width is None:
        raise ins.error("a layout without swizzle is not emulated")
    size = ELEMENTS[element]
    row, k = np.arange(rows)[:, None], np.arange(32 // size)[None, :]
    if transposed:
        across = width // size
        addresses = start + row // across * leading + k // 8 * stride + k % 8 * width + size * (row % across)
    else:
        addresses = start + row // 8 * stride + row % 8 * width + size * k
    return swizzled(addresses, width)


class SharedMatrices:
    """Matrices in shared memory, read by the async proxy."""

    def __init__(self, shared: SharedMemory) -> None:
        self.shared = shared

    def note(self, addresses: Array, element: str, warp: int, agent: int, clock: int, ins: Instruction) -> None:
        size = ELEMENTS[element]
        self.shared.check(addresses, size, ins, ins.parts[0])
        units = self.shared.units(addresses.ravel(), size)
        warps = np.full(len(units), warp)
        self.shared.note_read(units, warps, ins, agents=np.full(len(units), agent), clocks=clock)

    def read(self, addresses: Array, element: str) -> Array:
        size = ELEMENTS[element]
        return numbers(self.shared.data.view(f"u{size}")[addresses // size], element)


class Wgmma:
    """``wgmma``: products of a group of four warps. pending: registers that hold no result yet -> products under way.

    unfenced: registers written since the last ``wgmma.fence``.
    """

    def __init__(self, registers: list[Array], shared: SharedMemory, clocks: Clocks, reports: Reports) -> None:
        self.registers, self.clocks, self.reports = registers, clocks, reports
        self.operands = SharedMatrices(shared)
        self.groups = Groups(clocks, clocks.products)
        self.pending: dict[int, int] = {}
        self.unfenced: set[int] = set()

    def multiply(
        self,
        group: int,
        targets: list[int],
        operands: list[Array],
        add: bool,
        columns: int,
        element: str,
        ins: Instruction,
    ) -> None:
        """Add the product of ``[64, 32 bytes]`` and ``[columns, 32 bytes]`` to the targets, or replace them."""
        if not self.unfenced.isdisjoint(targets):
            self.reports.add("missing wgmma.fence", ins, "accumulators were written since the last one")
        for warp in range(4 * group, 4 * group + 4):
            clock = int(self.groups.clock(np.array([warp]))[0])
            for addresses in operands:
                self.operands.note(addresses, element, warp, self.clocks.products + warp, clock, ins)
        for target in targets:
            self.pending[target] = self.pending.get(target, 0) + 1

        def work() -> None:
            left, right = (self.operands.read(addresses, element) for addresses in operands)
            # Thread 4g + t of warp w holds rows 16w + g and 16w + 8 + g, and of each 8 columns 2t and 2t + 1.
            product = (left @ right.T).reshape(4, 2, 8, columns // 8, 4, 2)
            parts = product.transpose(3, 1, 5, 0, 2, 4).reshape(len(targets), 128)
            threads = slice(128 * group, 128 * group + 128)
            for target, part in zip(targets, parts, strict=True):
                register = self.registers[target].copy()
                held = register[threads].view(np.float32)
                register[threads] = (part + held if add else part).view(np.uint32)
                self.registers[target] = register
                self.pending[target] -= 1
                if not self.pending[target]:
                    del self.pending[target]

        self.groups.open[4 * group].append(work)

    def commit(self, warps: Array) -> None:
        self.groups.commit(warps)

    def wait(self, warps: Array, groups: int) -> None:
        self.groups.wait(warps, groups)


class TensorMemory:
    """sm_100's tensor memory, 128 lanes of 512 columns of fp32, and its tensor core.

    used, multiplied: by column, the last clock of a warp's access and of a product. unstored, unloaded: warps whose
    stores and loads are not waited for; touching: the columns of these. loading: registers that are being loaded.
    """

    def __init__(self, shared: SharedMemory, barriers: Mbarriers, clocks: Clocks, reports: Reports) -> None:
        self.barriers, self.clocks, self.reports = barriers, clocks, reports
        self.operands = SharedMatrices(shared)
        self.data = np.full((128, 512), np.nan, np.float32)
        self.columns = range(0)
        self.used = np.zeros((clocks.warps, 512), np.int64)
        self.multiplied = np.zeros(512, np.int64)
        self.unstored = np.zeros(clocks.warps, bool)
        self.loading: set[int] = set()
        self.unloaded = np.zeros(clocks.warps, bool)
        self.touching = np.zeros((2, clocks.warps, 512), bool)
        self.queue: list[Work] = []
        self.commits = 0

    def allocate(self, columns: int, ins: Instruction) -> int:
        """Return the address of the last ``columns`` columns: any address is a right one, and 0 would hide a fault."""
        if self.columns:
            raise ins.error("tensor memory is allocated already")
        if columns not in (32, 64, 128, 256, 512):
            raise ins.error("a number of columns that is no power of two from 32 to 512")
        self.columns = range(512 - columns, 512)
        return self.columns.start

    def release(self, address: int, columns: int, ins: Instruction) -> None:
        if range(address, address + columns) != self.columns:
            raise ins.error("this tensor memory was not allocated")
        self.columns = range(0)

    def access(
        self, addresses: Array, lanes: Array, count: int, split: int | None, warps: Array, store: bool, ins: Instruction
    ) -> tuple[Array, Array]:
        """Return rows ``[n, 1]`` and columns ``[n, count]`` that threads touch: 32x32b, or 16x32bx2 if ``split``.

        split: columns from the first half warp's part to the second's.
        """
        first_lane = (addresses >> 16) % 128 - 32 * (warps % 4)
        if not np.isin(first_lane, (0,) if split is None else (0, 16)).all():
            raise ins.error("a warp may touch its own 32 lanes only")
        rows = (addresses >> 16) + (lanes if split is None else lanes % 16)
        first = (addresses & 0xFFFF) + (0 if split is None else np.where(lanes < 16, 0, split))
        columns = first[:, None] + np.arange(count)
        self._check(columns, ins)
        for warp in np.unique(warps):
            mine = np.unique(columns[warps == warp])
            if (self.multiplied[mine] > self.clocks.seen[warp, self.clocks.tensor_core]).any():
                self.reports.add("tensor memory", ins, "used while a product is unfinished")
            if self.unstored[warp] and not store:
                self.reports.add("tensor memory", ins, "read before tcgen05.wait::st")
            self.used[warp, mine] = self.clocks.seen[warp, warp]
            self.unstored[warp] |= store
            self.unloaded[warp] |= not store
            self.touching[int(store), warp, mine] = True
        return rows[:, None], columns

    def finish(self, warps: Array, store: bool) -> None:
        """``tcgen05.wait::st`` or ``wait::ld``: what these warps stored or loaded counts as done from now on."""
        for warp in warps:
            mine = self.touching[int(store), warp]
            self.used[warp, mine] = self.clocks.seen[warp, warp]
            mine[:] = False
        (self.unstored if store else self.unloaded)[warps] = False
        if not store:
            self.loading.clear()

    def check_idle(self, warp: int, ins: Instruction) -> None:
        """Report accesses and products that the warp, which releases the memory, has not seen the end of."""
        seen = self.clocks.seen[warp]
        if self.unstored.any() or self.unloaded.any() or (self.used > seen[: self.clocks.warps, None]).any():
            self.reports.add("tensor memory", ins, "released while another warp may use it")
        if (self.multiplied > seen[self.clocks.tensor_core]).any():
            self.reports.add("tensor memory", ins, "released while a product is unfinished")

    def _check(self, columns: Array, ins: Instruction) -> None:
        if not self.columns or columns.min() < self.columns.start or columns.max() >= self.columns.stop:
            raise ins.error("outside of the allocated tensor memory")

    def multiply(
        self, target: int, a: int, b: int, shape: int, add: bool, element: str, warp: int, ins: Instruction
    ) -> None:
        """``tcgen05.mma``. shape: the instruction descriptor."""
        rows, columns = (shape >> 24 & 31) << 4, (shape >> 17 & 63) << 3
        formats = shape >> 7 & 7, shape >> 10 & 7
        expected = {"f16": (0, 1), "tf32": (2,)}[element]  # kind::f16 is for both 16-bit formats
        if (shape >> 4 & 3) != 1 or formats[0] != formats[1] or formats[0] not in expected:
            raise ins.error(f"instruction descriptor {shape:#x} is not emulated")
        held = "bf16" if formats[0] == 1 else element
        places = [
            operand(a, rows, held, ins, transposed=bool(shape >> 15 & 1)),
            operand(b, columns, held, ins, transposed=bool(shape >> 16 & 1)),
        ]
        for addresses in places:
            self.operands.note(addresses, held, warp, self.clocks.tensor_core, self.commits + 1, ins)
        first_lane = target >> 16  # two products of 64 rows share columns, in the halves of each warp's lanes
        if first_lane not in ((0, 16) if rows == 64 else (0,)):
            raise ins.error("a lane other than 0")
        touched = (target & 0xFFFF) + np.arange(columns)
        self._check(touched, ins)
        seen = self.clocks.seen[warp, : self.clocks.warps, None]
        if self.unstored.any() or self.unloaded.any() or (self.used[:, touched] > seen).any():
            self.reports.add("tensor memory", ins, "product not ordered after another warp's tcgen05.ld or st")
        self.multiplied[touched] = self.commits + 1
        lanes = np.arange(128) if rows == 128 else np.arange(64) // 16 * 32 + np.arange(64) % 16 + first_lane

        def work() -> None:
            left, right = (self.operands.read(addresses, held) for addresses in places)
            at = (lanes[:, None], touched)
            self.data[at] = left @ right.T + (self.data[at] if add else 0)

        self.queue.append(work)

    def commit(self, barrier_at: int, warp: int, ins: Instruction) -> None:
        """Arrive at an mbarrier when all products so far are finished."""
        barrier = self.barriers.get(barrier_at, warp, ins)
        self.commits += 1
        clocks, works = self.clocks.of(warp), list(self.queue)
        clocks[:, self.clocks.tensor_core] = self.commits

        def arrive() -> None:
            for work in works:
                if work in self.queue:
                    self.queue.remove(work)
                    work()
            self.barriers.arrive(barrier, clocks, ins)

        barrier.arriving.append(arrive)
