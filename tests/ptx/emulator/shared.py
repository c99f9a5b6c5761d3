"""Shared memory of a block, with a record of who wrote and read each pair of bytes, and when."""

import numpy as np

from .arithmetic import SHARED_BASE
from .clocks import Clocks
from .numbers import Array
from .parse import Instruction, Reports


class SharedMemory:
    """data: its bytes, ones (NaN) until written. An address is the byte's index.

    The record has a column for each unit of two bytes: the last writer and the clock of its work, and for each agent
    that reads the clock of its last reading.
    """

    def __init__(self, size: int, clocks: Clocks, reports: Reports) -> None:
        self.data = np.full(SHARED_BASE + (size + 1023) // 1024 * 1024, 0xFF, np.uint8)
        self.end = SHARED_BASE + size
        self.clocks, self.reports = clocks, reports
        units = self.data.size // 2
        self.writer, self.written_at = np.full(units, -1, np.int16), np.zeros(units, np.int64)
        # Warps, then the kinds of agents that read, in the order of their numbers.
        self.readers = np.array([*range(clocks.warps), *range(clocks.products, clocks.mbarriers)])
        self.row_of = np.zeros(clocks.agents, np.int64)
        self.row_of[self.readers] = np.arange(len(self.readers))
        self.read_at = np.zeros((len(self.readers), units), np.int64)
        self.active = np.arange(clocks.warps)  # rows of readers that have read anything
        self.allocation = (-1, -1)  # unit and clock of the address that tcgen05.alloc wrote

    def check(self, addresses: Array, size: int, ins: Instruction, what: str) -> None:
        """Raise ``PTXError`` unless accesses of ``size`` bytes are aligned and inside."""
        if addresses.min() < SHARED_BASE or addresses.max() + size > self.end:
            outside = addresses[(addresses < SHARED_BASE) | (addresses + size > self.end)]
            place = f"byte {int(outside[0]) - SHARED_BASE} of {self.end - SHARED_BASE}"
            raise ins.error(f"{what} outside of shared memory, {place}")
        if (addresses % size).any():
            raise ins.error(f"misaligned {what} of shared memory")

    def units(self, addresses: Array, size: int) -> Array:
        """Return the units of accesses ``[n]`` of ``size`` bytes: ``[n, size / 2]``."""
        return (addresses >> 1)[:, None] + np.arange(max(size // 2, 1))

    def load(self, addresses: Array, size: int, count: int, warps: Array, ins: Instruction) -> Array:
        """Return ``count`` numbers of ``size`` bytes from each address: ``[n, count]``."""
        self.check(addresses, size * count, ins, "load")
        self.note_read(self.units(addresses, size * count), warps, ins)
        return self.data.view(f"u{size}")[(addresses // size)[:, None] + np.arange(count)]

    def store(self, addresses: Array, size: int, values: Array, warps: Array, ins: Instruction) -> None:
        """Write numbers of ``size`` bytes, ``values [n, count]``."""
        count = values.shape[1]
        self.check(addresses, size * count, ins, "store")
        self.note_write(self.units(addresses, size * count), warps, ins)
        places, data = (addresses // size)[:, None] + np.arange(count), self.data.view(f"u{size}")
        data[places] = values
        if (data[places] != values).any():
            self.reports.add("race", ins, "threads store different values to one byte")

    def note_read(
        self, units: Array, warps: Array, ins: Instruction, *, agents: Array | None = None, clocks: Array | int = 0
    ) -> None:
        """Record a reading of ``units [n, k]`` for ``warps [n]``. agents ``[n]``, clocks: of hardware that does it."""
        warps = warps[:, None]
        self._check_writers(units, warps, ins, "read", agents is not None)
        writers = self.writer[units]
        if (writers < 0).any():
            byte = 2 * int(units[writers < 0][0]) - SHARED_BASE
            self.reports.add("uninitialized", ins, f"shared byte {byte} was never written")
        if agents is None:
            self.read_at[warps, units] = self.clocks.own(warps)
        else:
            rows = self.row_of[agents]
            self.active = np.union1d(self.active, rows)
            self.read_at[rows[:, None], units] = np.maximum(self.read_at[rows[:, None], units], clocks)

    def note_write(
        self,
        units: Array,
        warps: Array,
        ins: Instruction,
        *,
        agents: Array | None = None,
        clocks: Array | int = 0,
        by_proxy: bool = False,
    ) -> None:
        """Record a writing, as ``note_read`` does."""
        warps = warps[:, None]
        self._check_writers(units, warps, ins, "write", by_proxy)
        seen = self.clocks.seen[warps, self.readers[self.active]]  # [n, readers]
        late = self.read_at[self.active[:, None, None], units] > seen.T[:, :, None]
        if late.any():
            reader, access, unit = (int(index[0]) for index in np.nonzero(late))
            byte = 2 * int(units[access, unit]) - SHARED_BASE
            name = self.clocks.name(int(self.readers[self.active[reader]])).replace("a store", "a load")
            self.reports.add("race", ins, f"write of shared byte {byte} not ordered after {name}")
        self.writer[units] = warps if agents is None else agents[:, None]
        self.written_at[units] = self.clocks.own(warps) if agents is None else clocks

    def _check_writers(self, units: Array, warps: Array, ins: Instruction, what: str, by_proxy: bool) -> None:
        writers, written_at = np.maximum(self.writer[units], 0), self.written_at[units]
        ordered = self.clocks.has_seen(warps, writers, written_at, by_proxy=by_proxy)
        if ordered.all():
            return
        kind = "race"
        if by_proxy and self.clocks.has_seen(warps, writers, written_at, by_proxy=False).all():
            unit, clock = self.allocation
            others = ~ordered & ~((units // 2 == unit // 2) & (written_at == clock))
            kind = "missing proxy fence" if others.any() else "allocation not fenced"
            ordered = ~others if others.any() else ordered
        access, unit = (int(index[0]) for index in np.nonzero(~ordered))
        byte, name = 2 * int(units[access, unit]) - SHARED_BASE, self.clocks.name(int(writers[access, unit]))
        self.reports.add(kind, ins, f"{what} of shared byte {byte} not ordered after {name}")
