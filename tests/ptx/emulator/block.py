"""A block of threads that executes a kernel.

As long as all threads are at one instruction, they go on together. After a branch that only some take, each thread has
its own place, and the lowest goes on first, until all are together again; with a seed that of a warp drawn at random.
"""

import numpy as np

from .arithmetic import keep
from .clocks import Clocks
from .copies import AsyncCopies, BulkCopies, Mbarriers
from .gates import Barriers, RegisterPool, Schedule, may_wait, table
from .instructions import Reader
from .kernel import Kernel, Run
from .matrices import TensorMemory, Wgmma
from .memory import Memory
from .numbers import Array
from .parse import Instruction, PTXError, Reports
from .shared import SharedMemory
from .tensor_map import TensorMap

# Branches taken before a program is said not to end: thousands of times as many as a kernel here takes.
MAX_BRANCHES = 100_000


class Block:
    """One block of a launch. Executing it fills ``reports`` and the memory."""

    def __init__(
        self,
        kernel: Kernel,
        memory: Memory,
        arguments: list[int | TensorMap],
        shared: int,
        index: int,
        blocks: int,
        seed: int | None = None,
    ) -> None:
        """shared: bytes of shared memory. index, blocks: in a grid of one dimension. seed: of the warps' order."""
        self.kernel, self.memory, self.arguments = kernel, memory, arguments
        self.code, self.threads = kernel.program.code, kernel.program.threads
        numbers = np.arange(self.threads)
        self.lane, self.warp = numbers % 32, numbers // 32
        self.every_warp = np.arange(self.threads // 32)
        # A register is None until something is written to it.
        self.registers: list[Array] = [None] * len(kernel.program.registers)  # type: ignore[list-item]
        special = {"tid.x": numbers, "ctaid.x": index, "nctaid.x": blocks, "ntid.x": self.threads, "laneid": self.lane}
        special |= {"ctaid.y": 0, "ctaid.z": 0, "nctaid.y": 1, "nctaid.z": 1, "tid.y": 0, "tid.z": 0}
        self.special = {f"%{name}": np.full(self.threads, value, np.uint32) for name, value in special.items()}
        self.reports = Reports()
        self.clocks = Clocks(self.threads // 32)
        self.shared = SharedMemory(shared, self.clocks, self.reports)
        self.copies = AsyncCopies(memory, self.shared, self.clocks)
        self.barriers = Mbarriers(self.shared, self.clocks, self.reports)
        self.bulk = BulkCopies(memory, self.shared, self.barriers, self.clocks)
        self.wgmma = Wgmma(self.registers, self.shared, self.clocks, self.reports)
        self.tensor_memory = TensorMemory(self.shared, self.barriers, self.clocks, self.reports)
        self.alive = np.ones(self.threads, bool)
        self.gates = Barriers(self.threads, self.clocks)
        self.pool = RegisterPool(self.threads // 32, kernel.program.max_registers)
        self.patient = np.zeros(self.threads // 32, bool)  # warps whose next try_wait does not time out
        self.schedule = Schedule(self.threads // 32, seed)
        self.branches = 0

    # ------------------------------------------------------------------------------------------- for the instructions

    def pick(self, mask: Array | None, *arrays: Array) -> tuple[Array, ...]:
        """Return the elements of the acting threads."""
        return arrays if mask is None else tuple(array[mask] for array in arrays)

    def warps(self, mask: Array | None) -> Array:
        """Return the warps with acting threads."""
        return self.every_warp if mask is None else np.unique(self.warp[mask])

    def put(self, number: int, values: Array, mask: Array | None, *, picked: bool = False) -> None:
        """Set a register of the acting threads. picked: values has elements for these only."""
        if number < 0:
            return
        if picked and mask is not None:
            spread = np.zeros(self.threads, values.dtype)
            spread[mask] = values
            values = spread
        self.registers[number] = keep(mask, np.ascontiguousarray(values), self.registers[number])
        if self.kernel.uses_wgmma:
            self.wgmma.unfenced.add(number)

    # --------------------------------------------------------------------------------------------------------- control

    def run(self) -> None:
        """Execute until every thread has returned. Raises ``PTXError``."""
        with np.errstate(all="ignore"):
            places = self._together(0)
            while places is not None:
                together = self._apart(places)
                places = None if together is None else self._together(together)
        self._finish()

    def _together(self, at: int) -> Array | None:
        """Execute from an instruction until threads part; return where each is then, or None at the end."""
        runs, code = self.kernel.runs, self.code
        while True:
            run = runs.get(at)
            if run is not None:
                self._arithmetic(run, at)
                at = run.stop
                continue
            ins = code[at]
            if ins.parts[0] == "bra":
                taken = self._guard(ins, None)
                if taken is None or taken.all():
                    at = self._target(ins)
                elif not taken.any():
                    at += 1
                else:
                    return np.where(taken, self._target(ins), at + 1)
            elif ins.parts[0] == "ret":
                return None
            elif ins.parts[0] in ("bar", "barrier") and len(ins.args) == 1 and may_wait(ins):
                self.clocks.join(self.every_warp)
                at += 1
            elif ins.parts[:2] == ["mbarrier", "try_wait"]:
                if not self._wait(ins, None):
                    raise ins.error("deadlock: the mbarrier's phase never completes")
                at += 1
            elif may_wait(ins):
                return np.full(self.threads, at)
            else:
                self._effect(at, None)
                at += 1

    def _apart(self, places: Array) -> int | None:
        """Execute while threads are at different instructions or wait; return where they meet, or None at the end."""
        waiting = self.gates.waiting
        while True:
            if not self.alive.any():
                return None
            ready = self.alive & (waiting < 0)
            # Where a group waits for an mbarrier or registers in vain, another goes on.
            for at in self.schedule.order(places, ready):
                if self._step(int(at), ready & (places == at), places):
                    break
            else:
                raise PTXError(f"deadlock: threads wait at lines {self._lines(places[self.alive])}")
            released = self.gates.released(self.alive)
            if released is not None:
                places[released] += 1
            if self.alive.all() and waiting.max() < 0 and (places == places[0]).all():
                return int(places[0])

    def _lines(self, places: Array) -> list[int]:
        return sorted({self.code[at].line for at in places})

    def _step(self, at: int, acting: Array, places: Array) -> bool:
        """Execute one instruction for some threads and move their places on; return False where they must wait."""
        run = self.kernel.runs.get(at)
        if run is not None:
            self._arithmetic(run, at, acting)
            places[acting] = run.stop
            return True
        ins = self.code[at]
        kind = ins.parts[0]
        if kind == "bra":
            taken = self._guard(ins, acting)
            places[acting] = at + 1
            places[acting if taken is None else taken] = self._target(ins)
        elif kind == "brx":
            places[acting] = table(self, ins)[acting]
        elif kind == "ret":
            self.alive &= ~acting
        elif kind in ("bar", "barrier") and may_wait(ins):
            self._check_converged(ins, acting)
            self.gates.wait(ins, acting)
        elif kind == "setmaxnreg":
            if not self.pool.set(ins, self.warps(acting)):
                return False
            places[acting] = at + 1
        elif ins.parts[:2] == ["mbarrier", "try_wait"]:
            if not self._wait(ins, acting):
                return False
            places[acting] = at + 1
        else:
            self._effect(at, acting)
            places[acting] = at + 1
        return True

    def _check_converged(self, ins: Instruction, acting: Array) -> None:
        warps = acting.reshape(-1, 32)
        if ins.converged and (warps.any(1) != warps.all(1)).any():
            self.reports.add("divergence", ins, "a warp's threads are apart")

    def _target(self, ins: Instruction) -> int:
        self.branches += 1
        if self.branches > MAX_BRANCHES:
            raise ins.error("the program does not end")
        return self.kernel.program.labels[ins.args[0]]

    def _guard(self, ins: Instruction, mask: Array | None) -> Array | None:
        """Return which of the threads execute an instruction; None for all of the block."""
        if ins.guard is None:
            return mask
        guard = self.registers[self.kernel.program.registers[ins.guard][1]]
        if guard is None:
            raise ins.error("its guard is read before it is written")
        guard = ~guard if ins.unless else guard
        return guard if mask is None else guard & mask

    def _wait(self, ins: Instruction, mask: Array | None) -> bool:
        reader = Reader(ins, self.kernel.operands)
        address = reader.address(ins.args[1], wide=False)(self)
        parity = reader.get(ins.args[2], "u32")(self)
        addresses, parities = self.pick(mask, address, parity)
        if (addresses != addresses[0]).any() or (parities != parities[0]).any():
            raise ins.error("threads wait for different phases")
        warps = self.warps(mask)
        done = self.barriers.wait(int(addresses[0]), int(parities[0]), warps, ins)
        if not done and (mask is None or self.patient[warps].all()):
            return False
        # An instruction that waits for others in vain times out once, so that a program must ask again.
        self.patient[warps] = not done
        self.put(self.kernel.operands.number(ins.args[0]), np.full(self.threads, done), mask)
        return True

    def _arithmetic(self, run: Run, at: int, mask: Array | None = None) -> None:
        if self.wgmma.pending or self.tensor_memory.loading:
            for ins in self.code[at : run.stop]:
                self._check_registers(ins)
        if self.kernel.uses_wgmma:
            self.wgmma.unfenced |= run.written
        try:
            if mask is None:
                run.function(self, self.registers)
            else:
                self.kernel.masked(at)(self, self.registers, mask)
        except ZeroDivisionError:
            raise self.code[at].error("division by zero, here or soon after") from None
        except Exception as error:
            raise self._unset(at, run.stop) from error

    def _unset(self, start: int, stop: int) -> PTXError:
        """Return the error of the first instruction that reads a register without a value."""
        known = {number for number, register in enumerate(self.registers) if register is not None}
        for ins in self.code[start:stop]:
            if len(ins.registers - known) > len(ins.args[0].split("|")):
                return ins.error("a register is read before it is written")
            known |= ins.registers
        return self.code[start].error("a register is read before it is written, here or soon after")

    def _effect(self, at: int, mask: Array | None) -> None:
        ins = self.code[at]
        self._check_registers(ins)
        mask = self._guard(ins, mask)
        if mask is not None:
            if not mask.any():
                return
            self._check_converged(ins, mask)
            if mask.all():
                mask = None
        try:
            self.kernel.effect(at)(self, mask)
        except PTXError:
            raise
        except ZeroDivisionError:
            raise ins.error("division by zero") from None
        except Exception as error:
            raise ins.error(f"a register is read before it is written, or {error!r}") from error

    def _check_registers(self, ins: Instruction) -> None:
        pending, loading = self.wgmma.pending, self.tensor_memory.loading
        if not (pending or loading) or ins.op.startswith(("wgmma", "tcgen05.wait")):
            return
        if not ins.registers.isdisjoint(pending):
            self.reports.add("unfinished register", ins, "used before wgmma.wait_group")
        if not ins.registers.isdisjoint(loading):
            # A move only renames: Triton packs registers before it waits for them, and ptxas makes no code of it.
            if ins.parts[0] == "mov":
                loading |= ins.registers
            else:
                self.reports.add("unfinished register", ins, "used before tcgen05.wait::ld")

    def _finish(self) -> None:
        self.copies.groups.wait(self.every_warp, 0)
        last = self.code[-1]
        if self.bulk.stores.unfinished:
            self.bulk.stores.commit(self.every_warp)
            self.bulk.stores.wait(self.every_warp, 0)
            self.reports.add("exit", last, "bulk stores unfinished at the end")
        if self.wgmma.pending or self.tensor_memory.queue:
            self.reports.add("exit", last, "matrix products unfinished at the end")
        if any(barrier.arriving for barrier in self.barriers.at.values()):
            self.reports.add("exit", last, "bulk loads or products unfinished at the end")
        if self.tensor_memory.columns:
            self.reports.add("exit", last, "tensor memory not released")
