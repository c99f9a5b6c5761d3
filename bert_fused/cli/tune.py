"""Measure this GPU once: which configuration is fastest for each of BERT's shapes, beside cuBLAS and eager PyTorch.

Each candidate runs first in a process of its own, where its numbers are checked against fp64, so that one that hangs or
breaks the GPU costs only itself. The winners go into a table in the user's cache directory, which lookup prefers from
then on. Shapes are measured in order of rank, those without an entry first, and each is written at once, so that a run
that is cut off keeps its results. Exits with 1 if nothing was measured or kept, with 2 if it cannot start.
"""

import argparse
import contextlib
import datetime
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import bert_fused

from ..fallback import HAS_TRITON, device_reason, interpreted
from ..kernels import lookup
from ..kernels.configs import Config, Entry, Measured
from ..kernels.lookup import entry_row, load_user_table, parse_rows, remember, shipped_table
from ..timing import graph_sampler
from ..tune import shapes as bert
from ..tune.candidates import candidates
from ..tune.search import EAGER, Budget, GpuUnusable, NotMeasured, Outcome, SamplerOf, Shape, Trial, tune_shape
from ..tune.trials import Trials
from .common import CommandError, version, with_bar

if HAS_TRITON:
    from ..kernels.plan import LAUNCHER_IS_KNOWN, plans
    from ..kernels.runtime import arch_of, name_of

HELP = "measure this GPU once, and prefer what is fastest from then on"
EXAMPLES = """examples:
  %(prog)s
  %(prog)s --shapes BERT-base,512x1536x384 --dtypes bfloat16 --budget 120
  %(prog)s --export my_gpu.json

BERT_FUSED_TABLES names another folder for the table, or is "off".
"""

DTYPES = ("bfloat16", "float16", "tf32")


@dataclass(frozen=True)
class Gpu:
    device: torch.device
    name: str
    arch: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--budget", type=float, default=300.0, metavar="SECONDS", help="stop after this long (300)")
    parser.add_argument(
        "--shapes",
        type=bert.parse_shapes,
        metavar="MxNxK,...",
        help=f"measure these, or those of a model ({', '.join(bert.MODELS)}); default all three models",
    )
    parser.add_argument(
        "--dtypes", type=_parse_dtypes, default=DTYPES[:2], metavar="DTYPE,...", help=f"of {', '.join(DTYPES)}"
    )
    parser.add_argument("--device", default="cuda", help="which GPU, as cuda:1; default the current one")
    parser.add_argument("--export", type=Path, metavar="FILE", help="also write a table to contribute: kernels/tables")
    parser.set_defaults(run=run)


def _parse_dtypes(text: str) -> tuple[str, ...]:
    dtypes = tuple(dict.fromkeys(text.split(",")))
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise argparse.ArgumentTypeError(f"{dtype!r} is not one of {', '.join(DTYPES)}")
    return dtypes


def run(arguments: argparse.Namespace) -> int:
    gpu = find_gpu(arguments.device)
    todo = _shapes_to_measure(arguments)
    source = f"measured on {gpu.name}, {versions()}, {datetime.date.today()}, {commit()}"
    known = {(e.m, e.n, e.k, e.config.dtype) for e in load_user_table(gpu.arch, gpu.name)}
    problem = _keep((), gpu, source)
    if problem and arguments.export is None:
        raise CommandError(f"{problem}; set BERT_FUSED_TABLES to a folder of yours")
    todo.sort(key=lambda shape: (shape.M, shape.N, shape.K, shape.dtype) in known)
    start = time.monotonic()
    print(f"{gpu.name}, sm_{gpu.arch}, {versions()}: {len(todo)} shapes, at most {arguments.budget:.0f} s\n")

    entries: list[Entry] = []
    kept = False
    failures: dict[str, list[str]] = {}
    with Trials(gpu.device) as trial:
        results = measure(todo, gpu, Budget(start + arguments.budget), graph_sampler, trial)
        for shape, outcome in with_bar(results, len(todo)):
            print(f"{shape!s:<26}{describe(outcome)}", flush=True)
            if isinstance(outcome, NotMeasured):
                continue
            for name, reason in outcome.failed.items():
                failures.setdefault(f"{shape.dtype} {name}", []).append(reason)
            entries.append(entry_of(shape, outcome))
            problem = problem or _keep(entries[-1:], gpu, source)
            kept = kept or not problem
            if arguments.export is not None:
                with contextlib.suppress(CommandError):  # the last export raises it again
                    export(arguments.export, gpu, entries, source)
    print(f"\n{len(entries)} of {len(todo)} shapes measured in {time.monotonic() - start:.0f} s")
    if len(entries) < len(todo):
        print("run it again to measure the rest, which then comes first")
    for name, reasons in failures.items():
        print(f"{name} failed at {len(reasons)} shapes: {reasons[0]}", file=sys.stderr)
    if problem:
        print(f"tune: {problem}", file=sys.stderr)
    if kept:
        print(f"table: {lookup.table_path(gpu.arch, gpu.name)}")
    if arguments.export is not None:
        export(arguments.export, gpu, entries, source)
        print(f"exported: {arguments.export}")
    return 0 if kept or arguments.export is not None else 1


def _shapes_to_measure(arguments: argparse.Namespace) -> list[Shape]:
    """Return the shapes asked for; raise CommandError if one offers no choice, or if --export's folder is missing."""
    todo = [Shape(M, N, K, dtype) for M, N, K in arguments.shapes or bert.all_shapes() for dtype in arguments.dtypes]
    for shape in todo:
        if not bert.aligned(shape.N, shape.K, shape.dtype):
            raise CommandError(f"{shape}: cuBLAS serves rows that are not on 16-byte boundaries; nothing to choose")
    if arguments.export is not None and not arguments.export.resolve().parent.is_dir():
        raise CommandError(f"there is no folder {arguments.export.resolve().parent} to export to")
    return todo


def find_gpu(name: str) -> Gpu:
    """Return the GPU to measure; raise CommandError if there is none."""
    kind, _, index = name.partition(":")
    if kind != "cuda" or not torch.cuda.is_available():
        raise CommandError("tuning needs an NVIDIA GPU, and there is none that PyTorch can use")
    if index and not (index.isdecimal() and int(index) < torch.cuda.device_count()):
        raise CommandError(f"there is no GPU {name}")
    device = torch.device("cuda", int(index) if index else torch.cuda.current_device())
    reason = device_reason(device, torch.float16)
    if reason is None and interpreted():
        reason = "TRITON_INTERPRET is set"
    if reason is not None:
        raise CommandError(f"no kernel runs on this GPU: {reason}")
    torch.cuda.set_device(device)
    return Gpu(device, name_of(device), arch_of(device))


def _keep(entries: Iterable[Entry], gpu: Gpu, source: str) -> str | None:
    """Add entries to this GPU's table; return why it cannot be written, or None."""
    try:
        remember(entries, gpu.arch, gpu.name, source)
    except OSError as error:
        where = lookup.table_path(gpu.arch, gpu.name) or "a table"
        return f"cannot write {where}: {error.strerror or error}"
    plans.clear()
    return None


def measure(
    shapes: Iterable[Shape], gpu: Gpu, budget: Budget, sampler_of: SamplerOf, trial: Trial | None = None
) -> Iterator[tuple[Shape, Outcome | NotMeasured]]:
    """Measure each shape in the order given, until the budget ends or Ctrl-C. trial: as for ``tune_shape``."""
    for shape in shapes:
        if not budget.suffices():
            return
        every = candidates(shape.M, shape.N, shape.K, shape.dtype, gpu.arch)
        proposed = [config for config in every if config.kernel != "hopper" or LAUNCHER_IS_KNOWN]
        try:
            outcome = tune_shape(shape, proposed, gpu.device, budget=budget, sampler_of=sampler_of, trial=trial)
        except NotMeasured as reason:
            yield shape, reason
        except torch.OutOfMemoryError:
            yield shape, NotMeasured("out of memory")
        except (GpuUnusable, KeyboardInterrupt) as reason:
            yield shape, NotMeasured(str(reason) or "interrupted")
            return
        else:
            yield shape, outcome
        if gpu.device.type == "cuda":
            torch.cuda.empty_cache()


def describe(outcome: Outcome | NotMeasured) -> str:
    if isinstance(outcome, NotMeasured):
        return f"not measured: {outcome}"
    library, eager = outcome.times[_library(outcome)], outcome.times[EAGER]
    line = f"{outcome.config!s:<44}{outcome.times[str(outcome.config)]:9.2f} us"
    line += f"   cuBLAS + pass {library:9.2f}   eager {eager:9.2f}"
    return line + (f"   ({outcome.unseen} candidates not tried)" if outcome.unseen else "")


def entry_of(shape: Shape, outcome: Outcome) -> Entry:
    """Return the table's entry for a shape, with the medians that decided."""
    times = [outcome.times[name] for name in (str(outcome.config), _library(outcome), EAGER)]
    us, library_us, eager_us = (round(microseconds, 3) for microseconds in times)
    measured = Measured(us, library_us, eager_us, str(datetime.date.today()), versions())
    return Entry(shape.M, shape.N, shape.K, outcome.config, measured)


def _library(outcome: Outcome) -> str:
    return str(Config("library", outcome.config.dtype))


def export(path: Path, gpu: Gpu, entries: Iterable[Entry], source: str) -> None:
    """Write this GPU's measured entries and, of the shipped table, what they do not replace.

    Raises:
        CommandError: the file cannot be written, or nothing was measured.
    """
    measured = (*load_user_table(gpu.arch, gpu.name), *entries)
    if not measured:
        raise CommandError("nothing was measured that could be exported")
    shipped = shipped_table(gpu.arch)
    by_shape = {
        (entry.n is None, entry.config.dtype, entry.n or 0, entry.k or 0, entry.m): entry
        for entry in (*parse_rows(shipped["entries"]), *measured)
    }
    if shipped["source"]:
        source = f"{source}; entries without measured times: {shipped['source']}"
    try:
        lookup.write(path, {"arch": gpu.arch, "source": source}, [entry_row(by_shape[key]) for key in sorted(by_shape)])
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror or error}") from error


def versions() -> str:
    return f"torch {torch.__version__}, Triton {version('triton')}"


def commit() -> str:
    """Return this package's commit ($COMMIT, or its checkout's), else its version."""
    root = Path(bert_fused.__file__).resolve().parents[1]
    found = os.environ.get("COMMIT", "")
    if not found and (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--exclude=*", "--dirty"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    return f"commit {found}" if found else f"bert_fused {bert_fused.__version__}"
