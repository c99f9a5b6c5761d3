"""What threads of a block wait for, the sixteen barriers and the pool of registers; and which of them goes on first."""

from typing import TYPE_CHECKING

import numpy as np

from .clocks import Clocks
from .instructions import Reader
from .numbers import Array
from .parse import Instruction

if TYPE_CHECKING:
    from .block import Block


# How likely a step is to draw priorities anew.
NEW_PRIORITIES = 0.002


class Barriers:
    """waiting: the barrier that each thread waits at, or -1."""

    def __init__(self, threads: int, clocks: Clocks) -> None:
        self.clocks = clocks
        self.waiting = np.full(threads, -1)
        self.wanted: dict[int, int] = {}  # how many threads a barrier waits for, 0 for all that have not returned

    def wait(self, ins: Instruction, acting: Array) -> None:
        if ins.op not in ("bar.sync", "barrier.sync"):
            raise ins.error(f"{ins.op} is not emulated")
        number, wanted = (int(arg) for arg in (*ins.args, "0")[:2])
        if wanted % 32 or self.wanted.get(number, wanted) != wanted:
            raise ins.error("a barrier that does not wait for whole warps, or not for as many as before")
        self.wanted[number] = wanted
        self.waiting[acting] = number

    def released(self, alive: Array) -> Array | None:
        """Let the threads of one barrier go that all have reached; return which, or None."""
        for number, wanted in self.wanted.items():
            there: Array = self.waiting == number
            if there.any() and ((there == alive).all() if not wanted else there.sum() >= wanted):
                self.waiting[there] = -1
                self.clocks.join(np.flatnonzero(there.reshape(-1, 32).any(1)))
                del self.wanted[number]
                return there
        return None


class RegisterPool:
    """Registers per thread of each warp, as ``setmaxnreg`` gives them back and asks for more.

    PTX has four warps do it together. Triton's producer is one of four whose code parts before, so each counts alone.
    """

    def __init__(self, warps: int, per_thread: int) -> None:
        self.held = np.full(warps, per_thread)
        self.total = int(self.held.sum())

    def set(self, ins: Instruction, warps: Array) -> bool:
        """Return False where warps must wait until others have given back enough."""
        wanted, more = int(ins.args[0]), ins.parts[1] == "inc"
        if wanted % 8 or not 24 <= wanted <= 256:
            raise ins.error("not 24 to 256 registers in steps of 8")
        if ((self.held[warps] > wanted) if more else (self.held[warps] < wanted)).any():
            raise ins.error(f"a thread has {self.held[warps]}")
        if self.held.sum() - self.held[warps].sum() + wanted * len(warps) > self.total:
            return False
        self.held[warps] = wanted
        return True


class Schedule:
    """Which of the warps that are apart goes on first: without a seed the one at the lowest place in the program.

    With a seed it is the one of the highest priority. Priorities are drawn anew at random points, so that one warp may
    run far ahead of another, as in probabilistic concurrency testing (Burckhardt et al., ASPLOS 2010).
    """

    def __init__(self, warps: int, seed: int | None) -> None:
        self.random = None if seed is None else np.random.default_rng(seed)
        self.groups = np.arange(warps) // 4  # that take part in a product together
        self.priority = np.zeros(warps) if self.random is None else self._drawn(self.random)

    def _drawn(self, random: np.random.Generator) -> Array:
        drawn: Array = random.random(self.groups[-1] + 1)[self.groups]
        return drawn + 1e-3 * random.random(len(drawn))

    def order(self, places: Array, ready: Array) -> list[int]:
        """Return the places of the threads that are ready, in the order to try them."""
        if self.random is None:
            return [int(place) for place in np.unique(places[ready])]
        if self.random.random() < NEW_PRIORITIES:
            self.priority = self._drawn(self.random)
        far = int(places.max()) + 1
        lowest = np.where(ready, places, far).reshape(-1, 32).min(1)  # of each warp, so that its threads meet again
        ordered = lowest[np.argsort(self.priority, kind="stable")]
        return list(dict.fromkeys(int(place) for place in ordered if place < far))


def may_wait(ins: Instruction) -> bool:
    """Tell whether an instruction may make threads wait, or send them apart by a table."""
    kind, second = (*ins.parts, "")[:2]
    if kind in ("bar", "barrier"):
        return second != "warp"
    return kind in ("brx", "setmaxnreg") or (kind == "mbarrier" and second == "try_wait")


def table(block: "Block", ins: Instruction) -> Array:
    """Return where ``brx.idx`` sends each thread."""
    program = block.kernel.program
    targets: Array = np.array([program.labels[label] for label in program.tables[ins.args[1]]])
    chosen = Reader(ins, block.kernel.operands).get(ins.args[0], "u32")(block)
    to: Array = targets[chosen % len(targets)]
    return to
