"""Asynchronous copies: cp.async, bulk copies of tensors, and the mbarriers that they arrive at.

A copy is done as late as a program may count on it: when its group or its mbarrier's phase is waited for. What is read
from shared memory before that is what was there before.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .arithmetic import SHARED_BASE
from .clocks import MAX_MBARRIERS, Clocks
from .memory import Memory
from .numbers import Array
from .parse import Instruction, Reports
from .shared import SharedMemory
from .tensor_map import TensorMap

Work = Callable[[], None]


class Groups:
    """Asynchronous work of each agent of a kind, in groups that are committed and waited for.

    The agents are warps' copies or bulk stores, or warp groups' products. first: the number of the first agent.
    """

    def __init__(self, clocks: Clocks, first: int) -> None:
        self.clocks, self.first = clocks, first
        self.open: list[list[Work]] = [[] for _ in range(clocks.warps)]
        self.queue: list[list[list[Work]]] = [[] for _ in range(clocks.warps)]
        self.committed = np.zeros(clocks.warps, np.int64)

    def clock(self, warps: Array) -> Array:
        """Return the clock of work that is added now."""
        return self.committed[warps] + 1

    def commit(self, warps: Array) -> None:
        for warp in warps:
            self.queue[warp].append(self.open[warp])
            self.open[warp] = []
        self.committed[warps] += 1

    def wait(self, warps: Array, groups: int) -> None:
        """Do all work but that of the last ``groups`` groups."""
        for warp in warps:
            while len(self.queue[warp]) > groups:
                for work in self.queue[warp].pop(0):
                    work()
            self.clocks.seen[warp, self.first + warp] = self.committed[warp] - len(self.queue[warp])

    @property
    def unfinished(self) -> bool:
        return any(self.open) or any(work for queue in self.queue for work in queue)


class AsyncCopies:
    """``cp.async`` from global to shared memory."""

    def __init__(self, memory: Memory, shared: SharedMemory, clocks: Clocks) -> None:
        self.memory, self.shared = memory, shared
        self.groups = Groups(clocks, clocks.copies)

    def copy(self, targets: Array, sources: Array, size: int, given: Array, warps: Array, ins: Instruction) -> None:
        """Copy ``size`` bytes from each source, or, where ``given`` is 0, zeros."""
        if not np.isin(given, (0, size)).all():
            raise ins.error("a part of the bytes")
        self.shared.check(targets, size, ins, "cp.async")
        live = given > 0
        places = np.zeros(len(sources), np.int64)
        if live.any():
            places[live] = self.memory.find(sources[live], size, ins, "cp.async")
            self.memory.check_written(places[live], size, ins, self.shared.reports)
        agents, clocks = self.groups.first + warps, self.groups.clock(warps)[:, None]
        self.shared.note_write(self.shared.units(targets, size), warps, ins, agents=agents, clocks=clocks)
        pieces = np.arange(size)
        for warp in np.unique(warps):
            mine = warps == warp
            to, source, kept = targets[mine, None] + pieces, places[mine, None] + pieces, live[mine, None]

            def work(to: Array = to, source: Array = source, kept: Array = kept) -> None:
                self.shared.data[to] = np.where(kept, self.memory.data[source], 0)

            self.groups.open[warp].append(work)


@dataclass
class Mbarrier:
    """count: arrivals that complete a phase; left, bytes: those it still waits for. agent: of its bulk loads.

    arriving: work that arrives when the phase is waited for. arrived: the clocks ``[2, agents]`` of who arrived;
    completed: the same at the end of the last phase.
    """

    count: int
    agent: int
    arrived: Array
    completed: Array
    left: int = 0
    bytes: int = 0
    phase: int = 0
    arriving: list[Work] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.left = self.count


class Mbarriers:
    def __init__(self, shared: SharedMemory, clocks: Clocks, reports: Reports) -> None:
        self.shared, self.clocks, self.reports = shared, clocks, reports
        self.at: dict[int, Mbarrier] = {}
        self.made = 0

    def _units(self, address: int) -> Array:
        return self.shared.units(np.array([address]), 8)

    def init(self, address: int, count: int, warp: int, ins: Instruction) -> None:
        if self.made == MAX_MBARRIERS:
            raise ins.error("too many mbarriers")
        self.shared.check(np.array([address]), 8, ins, "mbarrier")
        self.shared.note_write(self._units(address), np.array([warp]), ins)
        agent, nothing = self.clocks.mbarriers + self.made, np.zeros((2, self.clocks.agents), np.int64)
        self.at[address] = Mbarrier(count, agent, nothing.copy(), nothing)
        self.made += 1

    def get(self, address: int, warp: int, ins: Instruction) -> Mbarrier:
        if address not in self.at:
            raise ins.error(f"no mbarrier at shared byte {address - SHARED_BASE}")
        self.shared.note_read(self._units(address), np.array([warp]), ins)
        return self.at[address]

    def invalidate(self, address: int, warp: int, ins: Instruction) -> None:
        barrier = self.get(address, warp, ins)
        if barrier.arriving or barrier.bytes or barrier.left != barrier.count:
            self.reports.add("mbarrier", ins, "invalidated while a phase is under way")
        # The next mbarrier there may begin only after every warp has seen this.
        self.shared.note_write(self._units(address), np.array([warp]), ins)
        del self.at[address]

    def expect(self, address: int, count: int, warp: int, ins: Instruction) -> None:
        """Arrive, and expect ``count`` bytes more in this phase."""
        barrier = self.get(address, warp, ins)
        barrier.bytes += count
        self.arrive(barrier, self.clocks.of(warp), ins)
        self.clocks.tick(np.array([warp]))

    def arrive(self, barrier: Mbarrier, clocks: Array, ins: Instruction) -> None:
        if barrier.left == 0:
            self.reports.add("mbarrier", ins, "one arrival too many")
            return
        barrier.left -= 1
        barrier.arrived = np.maximum(barrier.arrived, clocks)
        self._end_phase(barrier)

    def _end_phase(self, barrier: Mbarrier) -> None:
        """Begin the next phase if all of this one's arrivals and bytes are there."""
        if barrier.arriving or barrier.left or barrier.bytes:
            return
        barrier.phase += 1
        barrier.left = barrier.count
        barrier.arrived[:, barrier.agent] = barrier.phase
        barrier.completed = barrier.arrived.copy()

    def wait(self, address: int, parity: int, warps: Array, ins: Instruction) -> bool:
        """Tell whether the phase of this parity is complete; then the warps have seen what arrived."""
        for warp in warps:
            barrier = self.get(address, warp, ins)
        if barrier.phase & 1 == parity:
            for work in barrier.arriving:
                work()
            barrier.arriving = []
            self._end_phase(barrier)
        if barrier.phase & 1 == parity:
            return False
        self.clocks.learn(warps, barrier.completed)
        return True


class BulkCopies:
    """``cp.async.bulk.tensor``: tiles of matrices, between global and shared memory."""

    def __init__(self, memory: Memory, shared: SharedMemory, barriers: Mbarriers, clocks: Clocks) -> None:
        self.memory, self.shared, self.barriers, self.clocks = memory, shared, barriers, clocks
        self.stores = Groups(clocks, clocks.bulk_stores)

    def _tile(
        self, tensor: TensorMap, shared: int, row: int, column: int, ins: Instruction
    ) -> tuple[Array, Array, Array]:
        """Return a box's addresses in shared memory, which elements are inside, and the places of these."""
        if shared % 128:
            raise ins.error("a tile in shared memory must begin at a multiple of 128 bytes")
        addresses, inside, places = tensor.tile(shared, row, column)
        self.shared.check(addresses, tensor.itemsize, ins, "bulk copy")
        found = self.memory.find(places[inside], tensor.itemsize, ins, "bulk copy") if inside.any() else places[inside]
        return addresses, inside, found

    def load(
        self, tensor: TensorMap, shared: int, row: int, column: int, barrier_at: int, warp: int, ins: Instruction
    ) -> None:
        addresses, inside, places = self._tile(tensor, shared, row, column, ins)
        self.memory.check_written(places, tensor.itemsize, ins, self.barriers.reports)
        barrier = self.barriers.get(barrier_at, warp, ins)
        units, warps = self.shared.units(np.array([barrier_at]), 8), np.array([warp])
        writers, written_at = self.shared.writer[units], self.shared.written_at[units]
        if not self.clocks.has_seen(warps[:, None], writers, written_at, by_proxy=True).all():
            self.barriers.reports.add("mbarrier not fenced", ins, "the mbarrier was initialized")
        self.shared.note_write(
            self.shared.units(addresses.ravel(), tensor.itemsize),
            np.broadcast_to(warps, addresses.size),
            ins,
            agents=np.full(addresses.size, barrier.agent),
            clocks=barrier.phase + 1,
            by_proxy=True,
        )

        def work() -> None:
            kind = f"u{tensor.itemsize}"
            values = np.zeros(addresses.shape, kind)
            values[inside] = self.memory.data.view(kind)[places // tensor.itemsize]
            self.shared.data.view(kind)[addresses // tensor.itemsize] = values
            barrier.bytes -= values.nbytes

        barrier.arriving.append(work)

    def store(self, tensor: TensorMap, shared: int, row: int, column: int, warp: int, ins: Instruction) -> None:
        addresses, inside, places = self._tile(tensor, shared, row, column, ins)
        warps = np.broadcast_to(np.array([warp]), addresses.size)
        self.shared.note_read(
            self.shared.units(addresses.ravel(), tensor.itemsize),
            warps,
            ins,
            agents=self.stores.first + warps,
            clocks=self.stores.clock(warps)[:, None],
        )

        def work() -> None:
            values = self.shared.data.view(f"u{tensor.itemsize}")[addresses // tensor.itemsize]
            self.memory.store(places, values[inside][:, None], ins, self.barriers.reports)

        self.stores.open[warp].append(work)
