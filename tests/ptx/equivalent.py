"""Planted faults that change nothing a kernel may be asked for, each with the argument (``faults.py``)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Equivalent:
    """where: kernel -> the numbers of the faults of this kind in it, with the pinned Triton."""

    kind: str
    why: str
    where: dict[str, tuple[int, ...]]


_FIRST_COLUMNS = (
    "the mask or clamp is that of columns 0 to 15 of a tile, and N is a multiple of 16 in a kernel compiled so: they "
    "are all inside or the tile does not exist"
)

EQUIVALENT: tuple[Equivalent, ...] = (
    Equivalent(
        "comparison",
        _FIRST_COLUMNS,
        {"sm_80 pointer": (0,), "sm_90 pointer": (0,), "sm_100 TMA": (0,), "sm_120 pointer": (0,)},
    ),
    Equivalent(
        "comparison",
        "the loop over K takes one step more, whose tiles are zeros, since the copies have masks of their own",
        {"sm_80 pointer": (5,), "sm_89 pointer": (3,), "sm_90 pointer": (5,), "sm_120 pointer": (5,)},
    ),
    Equivalent(
        "load without its mask",
        _FIRST_COLUMNS,
        {"sm_80 pointer": (0,), "sm_90 pointer": (0,), "sm_100 TMA": (0,), "sm_120 pointer": (0,)},
    ),
    Equivalent(
        "rows are not clamped",
        _FIRST_COLUMNS,
        {
            "sm_80 pointer": (4,),
            "sm_80 pointer, ragged K": (9,),
            "sm_80 pointer, tf32": (9,),
            "sm_90 pointer": (4,),
            "sm_100 pointer": (4,),
        },
    ),
    Equivalent(
        "copy without its mask",
        "the mask is K > 0, of the first step, and the kernel assumes K > 0",
        {
            "sm_80 pointer": (0,),
            "sm_80 pointer, tf32": (0, 4),
            "sm_89 pointer": (0, 7),
            "sm_90 pointer": (0, 6),
            "sm_100 pointer": (0,),
            "sm_120 pointer": (0,),
        },
    ),
    Equivalent(
        "cp.async.commit_group is left out",
        "the first two groups become one, and both are waited for at the same place",
        {
            "sm_80 pointer": (0,),
            "sm_80 pointer, ragged K": (0,),
            "sm_80 pointer, tf32": (0,),
            "sm_89 pointer": (0,),
            "sm_90 pointer": (0,),
            "sm_100 pointer": (0,),
            "sm_120 pointer": (0,),
        },
    ),
    Equivalent(
        "bar.sync is left out",
        "what it orders is in order without it: buffers that nothing used before are filled, or only elected threads "
        "of one warp act before and after it. Any two warps that meet in a byte without order would be reported, "
        "whatever the shape: addresses in shared memory do not depend on it",
        {
            "sm_80 pointer": (0,),
            "sm_80 pointer, ragged K": (0,),
            "sm_80 pointer, tf32": (0,),
            "sm_89 pointer": (0,),
            "sm_90 pointer": (0,),
            "sm_90 TMA": (0, 3, 7),
            "sm_90 TMA, persistent": (0, 4),
            "sm_100 pointer": (6,),
            "sm_100 TMA": (5, 10),
            "sm_120 pointer": (0,),
        },
    ),
    Equivalent(
        "cp.async.wait_group is left out",
        "after the loop only copies past the end of K are left, and nothing uses their bytes again",
        {"sm_90 pointer": (1,), "sm_100 pointer": (2,)},
    ),
    Equivalent(
        "one group too few is waited for",
        "after the loop only copies past the end of K are left, and nothing uses the bytes of the last group again",
        {"sm_80 pointer": (1,), "sm_90 pointer": (3,), "sm_100 pointer": (2,), "sm_120 pointer": (1,)},
    ),
    Equivalent(
        "registers asked for",
        "the pool has 8 registers for each thread of four warps left, which the groups that wait may have as well",
        {"sm_90 Hopper, ping-pong": (1, 3, 4)},
    ),
    Equivalent(
        "setmaxnreg.dec is left out",
        "the warps have no more than 120 registers there, which they got before they took part in a partition",
        {"sm_90 Hopper, ping-pong": (4,)},
    ),
    Equivalent(
        "fence.proxy.async is left out",
        "it stands between mbarrier.init and the first bulk load, where Triton has none in any other kernel with TMA",
        {"sm_90 Hopper, cooperative": (0,), "sm_90 Hopper, ping-pong": (0,)},
    ),
    Equivalent(
        "comparison",
        "K is less than 1, or K + 63 than 64: it makes a difference for K = 1 alone, and K is a multiple of 8",
        {"sm_90 Hopper, cooperative": (1, 3), "sm_90 Hopper, ping-pong": (0, 4)},
    ),
)
