"""Time ours and every rival on BERT's shapes, interleaved in one process; each is checked against fp64 first.

Cases are taken in order of rank until the budget is spent. Each case is written as soon as it is measured; the same
command with the same --out goes on where it stopped.
"""

import argparse
import functools
import gc
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from benchmarks import linear, models
from benchmarks.cases import RIVALS, SUITES, Case, cases
from benchmarks.measure import Problem, copy_tb_per_s, matmul_tflops, measure, roofline_us
from benchmarks.records import BadResults, Writer, default_path, environment, gpu_state
from bert_fused.tune.search import fp32_products


def first_guess(case: Case, device: str) -> float:
    """Guess a case's seconds, most of which go into compiling, until a case of its kind has been timed."""
    if device == "cpu":
        return 1.0
    if case.suite == "models":
        return 180.0 if case.rivals == "max-autotune" else 60.0
    return 60.0 if case.rivals == "max-autotune" else 10.0


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks run", description=__doc__)
    parser.add_argument("--suite", choices=SUITES, help="only this suite (default: all)")
    parser.add_argument("--rivals", choices=RIVALS, help="only cases with these rivals (default: all)")
    parser.add_argument("--quick", action="store_true", help="few shapes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget", type=float, default=3600.0, metavar="SECONDS", help="stop after this long")
    parser.add_argument("--rounds", type=int, help="samples of each implementation (default: 30, on a CPU 9 to 100)")
    parser.add_argument(
        "--threads", type=int, default=1, help="on a CPU (default: 1, since threads wait for each other)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="where records go, and where to go on from")
    parser.add_argument("--commit", help="the commit to record if there is no git; may end in -dirty")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; --device cpu rehearses the run")
    counts = (1 if arguments.rounds is None else arguments.rounds, arguments.threads)
    if min(counts) < 1 or not arguments.budget >= 0:
        parser.error("--rounds and --threads must be at least 1, and --budget not negative")
    if arguments.device == "cpu":
        torch.set_num_threads(arguments.threads)
    shared = environment(arguments.device, arguments.commit)
    try:
        writer = Writer(arguments.out or default_path(shared), shared)
    except (BadResults, OSError) as error:
        print(f"python -m benchmarks run: {error}", file=sys.stderr)
        return 2
    suites = (arguments.suite,) if arguments.suite else SUITES
    rivals = (arguments.rivals,) if arguments.rivals else RIVALS
    todo = [case for case in cases(suites, arguments.device, arguments.quick) if case.rivals in rivals]
    return _run(todo, writer, arguments)


def _run(todo: list[Case], writer: Writer, arguments: argparse.Namespace) -> int:
    """Measure the cases that fit the budget; return 1 if ours failed in one, else 0."""
    start = time.monotonic()
    deadline = start + arguments.budget
    console = Console(stderr=True)
    texts = TextColumn("{task.fields[left]} s left"), TextColumn("{task.description}")
    longest: dict[tuple[str, str], float] = {}
    failed = False
    with Progress(BarColumn(), MofNCompleteColumn(), *texts, console=console) as progress:
        task = progress.add_task("", total=len(todo), left="")
        for rank, case in enumerate(todo, 1):
            left = deadline - time.monotonic()
            progress.update(task, description=str(case), left=f"{max(left, 0):.0f}")
            kind = (case.suite, case.rivals)
            if writer.has(case):
                progress.advance(task)
                continue
            if left < longest.get(kind, first_guess(case, arguments.device)):
                # A smaller case of another kind may still fit.
                continue
            begin = time.monotonic()
            try:
                rows = _measure(case, arguments, deadline)
            except Exception as error:  # out of memory, say: the next case may still fit
                rows = [_failure(error)]
            longest[kind] = max(longest.get(kind, 0.0), time.monotonic() - begin)
            failed |= any(row["implementation"] == "ours" and row["error"] not in (None, "out of time") for row in rows)
            writer.write(case, rank, rows)
            progress.advance(task)
            console.print(_line(case, rows), markup=False, highlight=False, soft_wrap=True)
            if not _is_alive(arguments.device):
                console.print("the GPU can do no more after this case; the same command goes on with the next")
                return 1
    done = sum(writer.has(case) for case in todo)
    console.print(f"{done} of {len(todo)} cases in {writer.path}, {time.monotonic() - start:.0f} s", highlight=False)
    return int(failed)


def _measure(case: Case, arguments: argparse.Namespace, deadline: float) -> list[dict[str, Any]]:
    device = arguments.device
    make = models.problem if case.suite == "models" else linear.problem
    # Dynamo gives up on a function after eight shapes, and says so only in its log.
    torch.compiler.reset()
    try:
        with fp32_products(case.dtype), torch.set_grad_enabled(case.suite == "training"):
            problem = make(case, device)
            roofline = roofline_us(device, case.dtype, problem.flops, problem.bytes)
            shared = {
                "fill": problem.fill,
                "roofline_us": roofline,
                "ceilings": {
                    "matmul_tflops": matmul_tflops(device, case.dtype),
                    "copy_tb_per_s": copy_tb_per_s(device),
                },
            }
            state = functools.partial(gpu_state, device)
            rounds = arguments.rounds or _rounds(device, problem, roofline)
            rows = measure(problem, device=device, rounds=rounds, deadline=deadline, state=state)
            return [shared | row for row in rows]
    finally:
        gc.collect()
        if device == "cuda" and _is_alive(device):
            torch.cuda.empty_cache()


def _rounds(device: str, problem: Problem, roofline: float) -> int:
    """Return how many rounds to take: on a CPU, whose calls take up to seconds, about 15 s of them, within bounds."""
    if device == "cuda":
        return 30
    a_round = 2 * roofline * problem.min_calls * len(problem.implementations)
    return max(9, min(100, round(15e6 / a_round)))


def _is_alive(device: str) -> bool:
    """Return whether the GPU still works; after a fault in a kernel it does not."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _failure(error: Exception) -> dict[str, Any]:
    """Return the row of a case that could not be measured at all."""
    timed = ("compile_seconds", "peak_bytes", "gpu", "wall", "tflops", "gpu_state")
    row: dict[str, Any] = dict.fromkeys((*timed, "computes", "accuracy", "fill", "roofline_us", "ceilings"))
    reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return row | {"implementation": "ours", "config": "", "error": reason, "complete": True}


def _line(case: Case, rows: list[dict[str, Any]]) -> str:
    cells = []
    for row in rows:
        timed = row["gpu"] or row["wall"]
        cells.append(f"{row['implementation']} " + (f"{timed['median_us']:.1f}" if timed else f"({row['error']})"))
    return f"{case}: {', '.join(cells)} us"
