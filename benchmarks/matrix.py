"""Every configuration shipped or offered to the tuner on every architecture, compiled by four Tritons.

``python -m benchmarks sass`` does the work, in a process for each architecture and Triton; this puts what it finds
side by side. Needs no GPU. Exits with 1 if a cell is red.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from .records import ROOT
from .versions import NoVersion, environment, named

Row = dict[str, Any]

ARCHS = "80,86,89,90,100,120"
KERNELS = {"act_fwd": "activation pass", "act_bwd": "backward pass"}
LEGEND = (
    "Green: compiles, for any number of rows, multiples of 16 and, where it serves that, one row; no spills; matrix "
    "instructions not serialized; no wait for the bias before the first tile; shared memory within the chip's; as many "
    "blocks per SM as intended; the matrix instruction named; 64-bit offsets; at most three kernels over the number of "
    "rows; no tanh.approx; instructions per element in budget. A cell has the most registers and KB of shared memory "
    "of any activation, and the fewest blocks per SM."
)


def compile_all(arch: str, version: str) -> list[Row]:
    """The rows of ``python -m benchmarks sass``; if it dies, one that says so."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "rows.json")
        command = [sys.executable, "-m", "benchmarks", "sass", "--arch", arch, "--json", str(report)]
        done = subprocess.run(command, cwd=ROOT, env=environment("triton", version), capture_output=True, text=True)
        if report.exists():
            rows: list[Row] = json.loads(report.read_text())
            return rows
    why = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}, no message"])[-1]
    return [{"kernel": "sass", "arch": int(arch), "dtype": "", "config": "", "triton": version, "broken": [why]}]


def cell(rows: list[Row]) -> Text:
    """What one Triton makes of one configuration: its resources, or all that is wrong with it."""
    if not rows:
        return Text("not compiled", "red")
    broken = [
        f"{row['activation']} {reason}" if "activation" in row else reason for row in rows for reason in row["broken"]
    ]
    if broken:
        return Text("\n".join(dict.fromkeys(broken)), "red")
    registers, shared = (max(row[name] for row in rows) for name in ("registers", "shared_bytes"))
    blocks = min(row["ctas_per_sm"] for row in rows)
    return Text(f"{registers} regs {shared // 1024} KB {blocks}/SM", "green")


def table(arch: int, rows: list[Row], versions: list[str]) -> tuple[Table, int]:
    """One line for each configuration and dtype, one column for each Triton; and how many cells are red."""
    grid = Table(title=f"sm_{arch}", title_justify="left")
    for name in ("configuration", "dtype", "instruction", "intended", *(f"Triton {version}" for version in versions)):
        grid.add_column(name)
    red = 0
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["kernel"], row["config"], row["dtype"]), []).append(row)
    for (kernel, config, dtype), group in groups.items():
        cells = [cell([row for row in group if row["triton"] == version]) for version in versions]
        red += sum(text.style == "red" for text in cells)
        intended = f"{group[0]['intended_ctas']}/SM" if "intended_ctas" in group[0] else ""
        grid.add_row(config or KERNELS.get(kernel, kernel), dtype, group[0].get("right_matrix", ""), intended, *cells)
    return grid, red


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks matrix", description=__doc__)
    parser.add_argument(
        "--arch", default=ARCHS, help="compute capabilities, separated by commas (default: %(default)s)"
    )
    parser.add_argument(
        "--tritons", default="oldest,pinned,3.8.0,newest", help="versions, separated by commas (default: %(default)s)"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file as well")
    arguments = parser.parse_args(argv)
    archs = arguments.arch.split(",")
    try:
        versions = named("triton", arguments.tritons)
        for version in versions:
            environment("triton", version)
    except NoVersion as error:
        print(f"python -m benchmarks matrix: {error}", file=sys.stderr)
        return 2
    rows: list[Row] = []
    # Files and pipes get wide lines: a table that wraps cannot be searched.
    console = Console(width=None if sys.stdout.isatty() else 200)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress, ThreadPoolExecutor(arguments.jobs) as pool:
        task = progress.add_task("compiling", total=len(archs) * len(versions))
        work = [pool.submit(compile_all, arch, version) for arch in archs for version in versions]
        for done in work:
            rows += done.result()
            progress.advance(task)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    total = 0
    for arch in sorted({row["arch"] for row in rows}):
        grid, red = table(arch, [row for row in rows if row["arch"] == arch], versions)
        console.print(grid)
        total += red
    console.print(LEGEND, highlight=False)
    verdict = Text(f"{total} red", "red") if total else Text("all green", "green")
    console.print(verdict, Text(f"on Triton {', '.join(versions)}: {len(rows)} kernels compiled"), sep=" ")
    return int(bool(total))
