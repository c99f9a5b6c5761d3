"""Who has seen whose work: vector clocks of the agents of a block.

An agent is a warp, or hardware that works for a warp on its own: its asynchronous copies, its matrix products, its bulk
stores, the tensor core of sm_100; or an mbarrier, in whose name bulk loads arrive. Work of an agent has a clock, and a
warp has seen it if its entry for that agent is as large.
"""

import numpy as np

from .numbers import Array

MAX_MBARRIERS = 64


class Clocks:
    """seen: ``[warps, agents]``, what each warp has seen. fenced: what of it the async proxy sees as well."""

    def __init__(self, warps: int) -> None:
        self.warps = warps
        self.copies, self.products, self.bulk_stores = warps, 2 * warps, 3 * warps  # the first agent of each kind
        self.tensor_core = 4 * warps
        self.mbarriers = self.tensor_core + 1
        self.agents = self.mbarriers + MAX_MBARRIERS
        self.seen = np.zeros((warps, self.agents), np.int64)
        self.seen[np.arange(warps), np.arange(warps)] = 1
        self.fenced = np.zeros((warps, self.agents), np.int64)

    def own(self, warps: Array) -> Array:
        """Return the clock of the work that each of these warps does now."""
        return self.seen[warps, warps]

    def join(self, warps: Array) -> None:
        """These warps have met at a barrier."""
        self.seen[warps] = self.seen[warps].max(0)
        self.fenced[warps] = self.fenced[warps].max(0)
        self.tick(warps)

    def tick(self, warps: Array) -> None:
        """Later work of these warps is not yet seen by whoever saw the earlier."""
        self.seen[warps, warps] += 1

    def fence(self, warps: Array) -> None:
        """``fence.proxy.async``: the async proxy sees what these warps have seen."""
        self.fenced[warps] = np.maximum(self.fenced[warps], self.seen[warps])
        self.tick(warps)

    def of(self, warp: int) -> Array:
        """Return what a warp passes on when it arrives somewhere, ``[2, agents]``: what it has seen, and fenced."""
        return np.stack((self.seen[warp], self.fenced[warp]))

    def learn(self, warps: Array, clocks: Array) -> None:
        """These warps have seen all that ``clocks [2, agents]`` have, and what was fenced there is fenced here."""
        self.seen[warps] = np.maximum(self.seen[warps], clocks[0])
        self.fenced[warps] = np.maximum(self.fenced[warps], clocks[1])

    def has_seen(self, warps: Array, agents: Array, clocks: Array, *, by_proxy: bool) -> Array:
        """Tell whether warps ``[n, 1]`` have seen work of agents ``[n, k]`` at clocks ``[n, k]``.

        by_proxy: the async proxy acts for the warp: of stores and asynchronous copies it sees only what was fenced.
        """
        seen = self.seen[warps, agents]
        if by_proxy:
            seen = np.where(agents < self.products, self.fenced[warps, agents], seen)
        return np.asarray(seen >= clocks)

    def name(self, agent: int) -> str:
        if agent >= self.mbarriers:
            return "a bulk load"
        if agent == self.tensor_core:
            return "tcgen05.mma"
        kind = ("a store", "cp.async", "wgmma", "a bulk store")[agent // self.warps]
        return f"{kind} of warp {agent % self.warps}"
