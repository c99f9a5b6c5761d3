"""Recorded results as reports want them: the records of each case together, and ratios between its implementations."""

from pathlib import Path
from typing import Any

from benchmarks.records import BadResults, key, read
from bert_fused.timing import Ratio, ratio

OURS, NOISE = "ours", "eager again"
# A CUDA graph's launch is part of every sample, so who pays it is compared with ours paying it too.
GRAPHED = {"eager in a CUDA graph": "ours in a CUDA graph", "max-autotune": "ours in a CUDA graph"}
Record = dict[str, Any]
Group = dict[str, Record]  # the records of one case, by implementation


def load(paths: list[Path]) -> list[Group]:
    """The records of each case, in order of rank. Where a case was measured twice, the later complete run counts.

    Raises:
        BadResults: a file cannot be used, or holds no figure, or the files are of different commits or machines.
    """
    runs: dict[tuple[Any, ...], dict[str, Group]] = {}
    origin: Record | None = None
    for path in paths:
        for record in read(path):
            origin = origin or record
            for field in ("device", "commit", "dirty", "versions"):
                if record[field] != origin[field]:
                    both = f"{origin[field]!r} and {record[field]!r}"
                    raise BadResults(f"{path}: results of more than one {field} in one report: {both}")
            run = runs.setdefault(key(record["case"]), {}).setdefault(record["run"], {})
            run[record["implementation"]] = record
    groups = [max(of_case.items(), key=_worth)[1] for of_case in runs.values()]
    if not any(times(record) for group in groups for record in group.values()):
        raise BadResults(f"{', '.join(map(str, paths))}: no figures")
    return sorted(groups, key=lambda group: next(iter(group.values()))["rank"])


def _worth(run: tuple[str, Group]) -> tuple[bool, str]:
    begun, group = run
    return all(record["complete"] for record in group.values()), begun


def by_shape(groups: list[Group]) -> list[Group]:
    """Model by model, in the order they come, and each by size."""
    models = list(dict.fromkeys(case_of(group)["model"] for group in groups))

    def order(group: Group) -> tuple[int, ...]:
        case = case_of(group)
        return models.index(case["model"]), case["sequence"] or 0, case["M"], case["K"], case["ragged"]

    return sorted(groups, key=order)


def case_of(group: Group) -> dict[str, Any]:
    case: dict[str, Any] = next(iter(group.values()))["case"]
    return case


def times(record: Record, clock: str | None = None) -> dict[str, Any] | None:
    """What a record says of a clock; without one, of the GPU's, or of the wall's where no GPU was timed.

    None where it says nothing, or where time ran out before all rounds: a few samples look more certain than they are.
    """
    figures: dict[str, Any] | None = record[clock] if clock else record["gpu"] or record["wall"]
    return figures if record["complete"] else None


def speedup(group: Group, rival: str, over: str = OURS, clock: str | None = None) -> Ratio | None:
    """A rival's time over ours, round by round; None where one of them has no figure."""
    if rival not in group or over not in group:
        return None
    theirs, mine = times(group[rival], clock), times(group[over], clock)
    if theirs is None or mine is None:
        return None
    rounds = min(len(theirs["samples_us"]), len(mine["samples_us"]))
    return ratio(theirs["samples_us"][:rounds], mine["samples_us"][:rounds])


def against_ours(group: Group, rival: str) -> Ratio | None:
    """A rival's time over ours; over ours in a CUDA graph, for a rival in one."""
    return speedup(group, rival, over=GRAPHED.get(rival, OURS))


def rivals(groups: list[Group]) -> list[str]:
    """Who is compared with ours in these groups, in order of appearance."""
    names = dict.fromkeys(name for group in groups for name in group)
    return [name for name in names if name not in (OURS, NOISE, *GRAPHED.values())]


def is_slower(found: Ratio) -> bool:
    """Whether ours loses, beyond the interval."""
    return found.high < 1


def same_function(record: Record) -> bool:
    """Whether an implementation computes what the case asks for; F.linear alone, say, does not."""
    return record["computes"] is None


def share(record: Record) -> float:
    """How much of the roofline's speed an implementation reaches."""
    figures = times(record)
    assert figures is not None
    return float(record["roofline_us"] / figures["median_us"])
