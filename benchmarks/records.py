"""What a benchmark run leaves: JSON lines that say where they come from, and a printed table."""

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

SCHEMA = 1
ROOT = Path(__file__).resolve().parent.parent

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
            "cuda": torch.version.cuda,
        },
    }


def gpu_state() -> dict[str, str] | None:
    """Clocks, power and throttling as they are now; None where they cannot be read."""
    values = _nvidia_smi(*GPU_STATE)
    return dict(zip(GPU_STATE, values, strict=True)) if values else None


def default_path(shared: dict[str, Any]) -> Path:
    """``results/<gpu>/<date>-<commit>.jsonl`` beside this file, or under $OUT where that is set."""
    base = Path(os.environ["OUT"]) if os.environ.get("OUT") else ROOT / "benchmarks" / "results"
    device = shared["device"]
    slug = re.sub(r"[^a-z0-9]+", "-", device["name"].lower()).strip("-") if device["type"] == "cuda" else "cpu"
    return base / slug / f"{shared['run'][:10]}-{shared['commit'][:8]}.jsonl"


class Writer:
    """Appends records to a file, each at once, and keeps them for the table."""

    def __init__(self, path: Path, shared: dict[str, Any]) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        self._shared = shared
        path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, row: dict[str, Any]) -> None:
        record = self._shared | {"time": _now()} | row
        self.records.append(record)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def print_tables(shared: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """Every record under its case, then one line per case: what a long log shows last."""
    if shared["device"]["type"] == "cpu":
        print("CPU rehearsal, not a measurement of the kernels")
    versions = ", ".join(f"{name} {version}" for name, version in shared["versions"].items() if version)
    print(f"{shared['device']['name']}, {versions}, commit {shared['commit'][:8]}")
    by_case: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if record["case"]["op"] in ("matmul", "copy"):
            rate = f"{record['tflops']:.1f} TFLOP/s" if "tflops" in record else f"{record['tb_per_s']:.2f} TB/s"
            print(f"ceiling, {record['case']['op']}: {rate}")
        else:
            by_case.setdefault(_describe(record["case"]), []).append(record)
    if not by_case:
        print("nothing was measured")
        return
    for case, rows in by_case.items():
        print(f"\n{case}")
        print(
            f"  {'':<44}{'GPU us':>9} {'p20..p80':>15}{'wall us':>9}  {'x eager':<21}{'x F.linear':<21}{'TFLOP/s':>7}"
        )
        for row in rows:
            print(f"  {_row(row)}")
    print("\ntimes in us (GPU, else wall) and as multiples of F.linear's speed; best: the fastest candidate")
    for case, rows in by_case.items():
        print(f"  {case:<58}{_line(rows)}")


def _row(row: dict[str, Any]) -> str:
    label = row["implementation"] + (f": {row['config']}" if row["config"] else "")
    gpu, wall = row["gpu"], row["wall"]
    if not wall:
        return f"{label:<48}{row['error'] or 'out of time'}"
    main = gpu or wall
    spread = f"{main['p20_us']:.2f}..{main['p80_us']:.2f}"
    ratios = (main["ratio_to"].get(name) for name in ("eager", "F.linear"))
    cells = [f"{r['median']:.3f} [{r['low']:.3f}, {r['high']:.3f}]" if r else "" for r in ratios]
    gpu_us = f"{gpu['median_us']:.2f}" if gpu else "-"
    times = f"{gpu_us:>9} {spread:>15}{wall['median_us']:>9.2f}"
    return f"{label:<48}{times}  {cells[0]:<21}{cells[1]:<21}{row['tflops']:>7.1f}"


def _line(rows: list[dict[str, Any]]) -> str:
    timed = [row for row in rows if row["wall"]]
    candidates = [row for row in timed if row["implementation"] == "candidate"]
    chosen = [row for row in timed if row["implementation"] in ("ours", "eager", "F.linear", "torch.compile")]
    best = sorted(candidates, key=lambda row: (row["gpu"] or row["wall"])["median_us"])[:1]
    cells = []
    for name, row in [(row["implementation"], row) for row in chosen] + [(f"best {r['config']}", r) for r in best]:
        figures = row["gpu"] or row["wall"]
        linear = figures["ratio_to"].get("F.linear")
        cells.append(f"{name} {figures['median_us']:.2f}" + (f" ({linear['median']:.3f})" if linear else ""))
    return ", ".join(cells)


def _describe(case: dict[str, Any]) -> str:
    keys = " ".join(f"{key}={case[key]}" for key in ("M", "K", "N"))
    return f"{case['op']} {case['model']} {keys} {case['activation']} ({case['rivals']})"


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _commit(given: str | None) -> tuple[str, bool | None]:
    """The commit, and whether the tree differs from it (None: not known)."""
    if given:
        return given.removesuffix("-dirty"), True if given.endswith("-dirty") else None
    described = _output("git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty")
    return (described.removesuffix("-dirty"), described.endswith("-dirty")) if described else ("unknown", None)


def _nvidia_smi(*fields: str) -> list[str] | None:
    described = _output("nvidia-smi", "-i", "0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")
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
