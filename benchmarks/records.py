"""What a benchmark run leaves: JSON lines that say where they come from, one for each case and implementation."""

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

SCHEMA = 1
ROOT = Path(__file__).resolve().parent.parent
SCHEMA_FILE = ROOT / "benchmarks" / "schema.json"
# Without these a run cannot go on from a file; all else is checked where the report is made.
FIELDS = {"run", "commit", "dirty", "device", "versions", "case", "complete"}

GPU_STATE = (
    "clocks.sm",
    "clocks.mem",
    "power.draw",
    "power.limit",
    "temperature.gpu",
    "clocks_throttle_reasons.active",
)


def environment(device: str, commit: str | None) -> dict[str, Any]:
    """What all records of a run share. ``commit`` (or $COMMIT) stands in for git where there is no repository."""
    sha, dirty = _commit(commit or os.environ.get("COMMIT"))
    name = platform.processor() or platform.machine()
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
    """A file of results that cannot be used; the message says which line and why."""


def gpu_state(device: str) -> dict[str, str] | None:
    """Clocks, power and throttling as they are now, read through NVML; None where they cannot be."""
    values = _nvidia_smi(*GPU_STATE) if device == "cuda" else None
    return dict(zip(GPU_STATE, values, strict=True)) if values else None


def default_path(shared: dict[str, Any]) -> Path:
    """``results/<gpu>/<date>-<commit>.jsonl`` beside this file, or under $OUT where that is set."""
    base = Path(os.environ["OUT"]) if os.environ.get("OUT") else ROOT / "benchmarks" / "results"
    device = shared["device"]
    slug = re.sub(r"[^a-z0-9]+", "-", device["name"].lower()).strip("-") if device["type"] == "cuda" else "cpu"
    return base / slug / f"{shared['run'][:10]}-{shared['commit'][:8]}.jsonl"


class Writer:
    """Appends the records of each case to a file, and knows which cases the file holds already.

    Raises:
        BadResults: the file holds something else than results of this commit on this machine.
    """

    def __init__(self, path: Path, shared: dict[str, Any]) -> None:
        self.path = path
        self._shared = shared
        # Of each case, the run that measured it last, and whether that measured every rival in every round.
        self._measured: dict[tuple[Any, ...], tuple[str, bool]] = {}
        for number, record in parse(path) if path.exists() else ():
            for field in ("commit", "dirty", "device", "versions"):
                if record[field] != shared[field]:
                    raise BadResults(
                        f"{path}, line {number}: holds results of another {field}, {record[field]!r}; this run's is "
                        f"{shared[field]!r}: give another --out"
                    )
            self._note(record)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()  # that it cannot be written shows before anything is measured

    def has(self, case: Case) -> bool:
        """Whether the case was measured, every rival in every round."""
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
    """What tells a recorded case from the others."""
    return tuple(case[field.name] for field in dataclasses.fields(Case))


def parse(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The records of a file of JSON lines, each with the number of its line.

    Raises:
        BadResults: a line is no record of this version, or cut off; the message names it.
        OSError: the file cannot be read.
    """
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line, parse_constant=_refuse)
        except (ValueError, RecursionError) as error:
            raise BadResults(f"{path}, line {number}: not JSON, or cut off ({error})") from None
        if not isinstance(record, dict) or record.get("schema") != SCHEMA:
            raise BadResults(f"{path}, line {number}: not a record of schema version {SCHEMA}")
        missing = FIELDS - record.keys()
        if missing:
            raise BadResults(f"{path}, line {number}: a record without {', '.join(sorted(missing))}")
        try:
            hash((key(record["case"]), record["run"] + ""))
        except (TypeError, KeyError):
            raise BadResults(f"{path}, line {number}: not a case, or not a run's time") from None
        records.append((number, record))
    return records


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not a number")


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a file, each validated against ``schema.json``; raises as ``parse`` does."""
    import jsonschema

    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA_FILE.read_text()))
    records = []
    for number, record in parse(path):
        problem = jsonschema.exceptions.best_match(validator.iter_errors(record))
        if problem is not None:
            raise BadResults(f"{path}, line {number}: {problem.json_path.removeprefix('$.')}: {problem.message}")
        records.append(record)
    return records


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _commit(given: str | None) -> tuple[str, bool | None]:
    """The commit, and whether the tree differs from it (None: not known)."""
    if given:
        return given.removesuffix("-dirty"), True if given.endswith("-dirty") else None
    described = _output("git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty")
    return (described.removesuffix("-dirty"), described.endswith("-dirty")) if described else ("unknown", None)


def _nvidia_smi(*fields: str) -> list[str] | None:
    uuid = getattr(torch.cuda.get_device_properties(0), "uuid", None)
    gpu = f"GPU-{uuid}" if uuid else "0"  # which CUDA_VISIBLE_DEVICES does not renumber
    described = _output("nvidia-smi", "-i", gpu, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")
    return [value.strip() for value in described.split(",")] if described else None


def _output(*command: str) -> str | None:
    """What a command prints, or None where it does not exist or fails."""
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
