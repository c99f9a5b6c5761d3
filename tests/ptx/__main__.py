"""Execute every kernel that is shipped or offered to the tuner, as compiled, in the emulator (``make ptx``).

Exits with 1 if a result is outside of its bound, a byte is not written exactly once, or the program does what the
emulator reports and ``ALLOWED`` does not name.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

import cases
from one import Result, run
from rich.console import Console
from rich.progress import track
from rich.table import Table


def table_of(results: list[Result]) -> Table:
    table = Table()
    for title in ("architecture", "kernel", "cases", "worst share of the bound", "wrong", "seconds"):
        table.add_column(title, justify="left" if title in ("architecture", "kernel") else "right")
    for row in dict.fromkeys(result.row for result in results):
        mine = [result for result in results if result.row == row]
        wrong, seconds = sum(len(result.wrong) for result in mine), sum(result.seconds for result in mine)
        share = max(result.share for result in mine)
        table.add_row(*row, str(len(mine)), f"{share:.2f}", str(wrong), f"{seconds:.1f}")
    return table


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python tests/ptx", description=__doc__)
    parser.add_argument("--arch", type=int, action="append", choices=cases.ARCHS, help="only this one; may be repeated")
    parser.add_argument("--quick", action="store_true", help="only the choice of cases that make test runs")
    parser.add_argument("--json", type=Path, help="write the results to a file")
    options = parser.parse_args(arguments)
    cases_of = cases.choice if options.quick else cases.cases
    jobs = [(arch, i) for arch in options.arch or cases.ARCHS for i in range(len(cases_of(arch)))]
    console, start = Console(width=120), time.perf_counter()
    workers = min(len(os.sched_getaffinity(0)), 8)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        order = {pool.submit(run, arch, i, options.quick): job for job, (arch, i) in enumerate(jobs)}
        done = {order[f]: f.result() for f in track(as_completed(order), "executing", len(jobs), console=console)}
    results = [done[job] for job in sorted(done)]
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results]))
    console.print(table_of(results))
    for result in results:
        for wrong in result.wrong:
            console.print(f"{result.name}: {wrong}", markup=False)
    for why, count in sum((Counter(result.allowed) for result in results), Counter()).items():
        console.print(f"let through {count} times: {why}", markup=False)
    wrong = sum(bool(result.wrong) for result in results)
    console.print(f"{len(results)} cases, {wrong} wrong, {time.perf_counter() - start:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
