"""The records of benchmark runs: write and read them as JSON lines, group them by case, and compare implementations.

A file has one line for each case and implementation, which names the commit, the machine and the versions.
"""

import dataclasses
import datetime
import json
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Case
from bert_fused.onednn import cpu_info
from bert_fused.timing import Ratio, ratio

SCHEMA = 1
ROOT = Path(__file__).resolve().parent.parent
ORIGIN = ("commit", "dirty", "device", "versions")
# The fields that a run or a report needs of every record.
FIELDS = {*ORIGIN, "run", "rank", "case", "implementation", "computes", "error", "gpu", "wall", "complete"}
FIELDS |= {"fill", "roofline_us", "ceilings"}

OURS, NOISE = "ours", "eager again"
# A CUDA graph's launch is part of every sample, so a rival in a graph is compared with ours in a graph.
GRAPHED = {"eager in a CUDA graph": "ours in a CUDA graph", "max-autotune": "ours in a CUDA graph"}
Record = dict[str, Any]
Group = dict[str, Record]  # the records of one case, by implementation

GPU_STATE = (
    "clocks.sm",
    "clocks.mem",
    "power.draw",
    "power.limit",
    "temperature.gpu",
    "clocks_throttle_reasons.active",
)


def environment(device: str, commit: str | None) -> dict[str, Any]:
    """Return what all records of a run share. ``commit`` or $COMMIT replaces git's answer."""
    sha, dirty = _commit(commit or os.environ.get("COMMIT"))
    name = cpu_info("model name") or platform.processor() or platform.machine()
    described: dict[str, Any] = {"type": device, "name": name, "threads": torch.get_num_threads()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        described = {
            "type": device,
            "name": properties.name,
            "arch": 10 * properties.major + properties.minor,
            "multiprocessors": properties.multi_processor_count,
            "driver": ", ".join(_nvidia_smi("driver_version") or ()) or None,
        }
    return {
        "schema": SCHEMA,
        "run": _now(),
        "commit": sha,
        "dirty": dirty,
        "device": described,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "transformers": _version("transformers"),
            "cuda": torch.version.cuda,
        },
    }


class BadResults(ValueError):
    """A file of results cannot be used; the message names the line and says why."""


def gpu_state(device: str) -> dict[str, str] | None:
    """Return clocks, power and throttling at this moment, read through NVML, or None if they cannot be read."""
    values = _nvidia_smi(*GPU_STATE) if device == "cuda" else None
    return dict(zip(GPU_STATE, values, strict=True)) if values else None


def default_path(shared: dict[str, Any]) -> Path:
    """Return ``results/<device>/<date>-<commit>.jsonl`` beside this file, or the same under $OUT if that is set."""
    base = Path(os.environ["OUT"]) if os.environ.get("OUT") else ROOT / "benchmarks" / "results"
    device = shared["device"]
    if device["type"] == "cuda":
        slug = re.sub(r"[^a-z0-9]+", "-", device["name"].lower()).strip("-")
    else:
        slug = "cpu" if device["threads"] == 1 else f"cpu-{device['threads']}-threads"
    return base / slug / f"{shared['run'][:10]}-{shared['commit'][:8]}.jsonl"


class Writer:
    """Appends the records of each case to a file, and knows which cases the file holds already.

    Raises:
        BadResults: the file holds anything but results of this commit on this machine.
    """

    def __init__(self, path: Path, shared: dict[str, Any]) -> None:
        self.path = path
        self._shared = shared
        # For each case: the last run that measured it, and whether that run measured every rival in every round.
        self._measured: dict[tuple[Any, ...], tuple[str, bool]] = {}
        for number, record in parse(path) if path.exists() else ():
            for field in ORIGIN:
                if record[field] != shared[field]:
                    raise BadResults(
                        f"{path}, line {number}: holds results of another {field}, {record[field]!r}; this run's is "
                        f"{shared[field]!r}: give another --out"
                    )
            self._note(record)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()  # fails before anything is measured if the file cannot be written

    def has(self, case: Case) -> bool:
        """Return whether the case was measured, every rival in every round."""
        return self._measured.get(key(dataclasses.asdict(case)), ("", False))[1]

    def write(self, case: Case, rank: int, rows: list[dict[str, Any]]) -> None:
        records = [self._shared | {"time": _now(), "rank": rank, "case": dataclasses.asdict(case)} | r for r in rows]
        with self.path.open("a") as file:
            file.write("".join(json.dumps(record) + "\n" for record in records))
        for record in records:
            self._note(record)

    def _note(self, record: dict[str, Any]) -> None:
        case, run = key(record["case"]), record["run"]
        last, complete = self._measured.get(case, (run, True))
        self._measured[case] = (run, record["complete"] and (complete or run != last))


def key(case: dict[str, Any]) -> tuple[Any, ...]:
    """Return a recorded case's values, which distinguish it from the others."""
    return tuple(case[field.name] for field in dataclasses.fields(Case))


def parse(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Return the records of a file of JSON lines, each with the number of its line.

    Raises:
        BadResults: a line is cut off, or is not a record of this version; the message names it.
        OSError: the file cannot be read.
    """
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise BadResults(f"{path}, line {number}: not JSON, or cut off ({error})") from None
        if not isinstance(record, dict) or record.get("schema") != SCHEMA:
            raise BadResults(f"{path}, line {number}: not a record of schema version {SCHEMA}")
        missing = FIELDS - record.keys()
        if missing:
            raise BadResults(f"{path}, line {number}: a record without {', '.join(sorted(missing))}")
        records.append((number, record))
    return records


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _commit(given: str | None) -> tuple[str, bool | None]:
    """Return the commit, and whether the tree differs from it (None: not known)."""
    if given:
        return given.removesuffix("-dirty"), True if given.endswith("-dirty") else None
    described = _output("git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty")
    return (described.removesuffix("-dirty"), described.endswith("-dirty")) if described else ("unknown", None)


def _nvidia_smi(*fields: str) -> list[str] | None:
    uuid = getattr(torch.cuda.get_device_properties(0), "uuid", None)
    gpu = f"GPU-{uuid}" if uuid else "0"  # CUDA_VISIBLE_DEVICES does not renumber a UUID
    described = _output("nvidia-smi", "-i", gpu, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")
    return [value.strip() for value in described.split(",")] if described else None


def _output(*command: str) -> str | None:
    """Return what a command prints, or None if it does not exist or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def load(paths: list[Path]) -> list[Group]:
    """Return the records of each case, in order of rank. If a case was measured twice, the later complete run counts.

    Raises:
        BadResults: a file cannot be used, or holds no figure, or the files are of different commits or machines.
    """
    runs: dict[tuple[Any, ...], dict[str, Group]] = {}
    origin: Record | None = None
    for path in paths:
        for _, record in parse(path):
            origin = origin or record
            for field in ORIGIN:
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
    """Sort groups by model, in order of appearance, and each model's by size."""
    models = list(dict.fromkeys(case_of(group)["model"] for group in groups))

    def order(group: Group) -> tuple[int, ...]:
        case = case_of(group)
        return models.index(case["model"]), case["sequence"] or 0, case["M"], case["K"], case["ragged"]

    return sorted(groups, key=order)


def threads(device: dict[str, Any]) -> str:
    """Describe the threads of a CPU's run."""
    return "one thread" if device["threads"] == 1 else f"{device['threads']} threads"


def case_of(group: Group) -> dict[str, Any]:
    case: dict[str, Any] = next(iter(group.values()))["case"]
    return case


def times(record: Record, clock: str | None = None) -> dict[str, Any] | None:
    """Return a record's figures of a clock; without ``clock`` the GPU's, or the wall's if no GPU was timed.

    None if it has none, or if time ran out before all rounds: a few samples look more certain than they are.
    """
    figures: dict[str, Any] | None = record[clock] if clock else record["gpu"] or record["wall"]
    return figures if record["complete"] else None


def speedup(group: Group, rival: str, over: str = OURS, clock: str | None = None) -> Ratio | None:
    """Return a rival's time over ours, round by round, or None if one of them has no figure."""
    if rival not in group or over not in group:
        return None
    theirs, mine = times(group[rival], clock), times(group[over], clock)
    if theirs is None or mine is None:
        return None
    rounds = min(len(theirs["samples_us"]), len(mine["samples_us"]))
    return ratio(theirs["samples_us"][:rounds], mine["samples_us"][:rounds])


def against_ours(group: Group, rival: str) -> Ratio | None:
    """Return a rival's time over ours; for a rival in a CUDA graph, over ours in one."""
    return speedup(group, rival, over=GRAPHED.get(rival, OURS))


def rivals(groups: list[Group]) -> list[str]:
    """Return the implementations to compare with ours, in order of appearance."""
    names = dict.fromkeys(name for group in groups for name in group)
    return [name for name in names if name not in (OURS, NOISE, *GRAPHED.values())]


def is_slower(found: Ratio) -> bool:
    """Return whether ours loses by more than the interval."""
    return found.high < 1


def same_function(record: Record) -> bool:
    """Return whether an implementation computes the case's function; ``F.linear`` alone, say, does not."""
    return record["computes"] is None


def share(record: Record) -> float:
    """Return the share of the roofline's speed that an implementation reaches."""
    figures = times(record)
    assert figures is not None
    return float(record["roofline_us"] / figures["median_us"])
