"""``make mutants``: whether the suite notices the faults of ``faults.toml``, planted one by one in a copy of the tree.

A fault is killed if its tests fail with it and pass without it. The command fails if one survives that is not explained
as equivalent, if an explained one is killed after all, or if a fault's tests prove nothing.
"""

import argparse
import dataclasses
import os
import queue
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, whose pytest brings it
    import tomli as tomllib

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# Of one pytest process; some compile kernels.
LIMIT = 240.0

# An exit status of its own for tests that imported another bert_fused than the copy's.
ELSEWHERE = 97
RUN_TESTS = f"""
import sys
from pathlib import Path
import pytest
status = pytest.main(sys.argv[1:])
module = sys.modules.get("bert_fused")
here = module is not None and Path(module.__file__).resolve().is_relative_to(Path.cwd().resolve())
sys.exit(status if here else {ELSEWHERE})
"""
OPTIONS = ("-q", "-x", "--tb=no", "--show-capture=no", "-p", "no:cacheprovider")

GOOD = {"killed": "green", "timed out": "green", "crashed": "green", "equivalent": "cyan"}


@dataclass(frozen=True)
class Fault:
    """One ``old`` in ``file`` becomes ``new``; ``tests``, arguments of pytest, should then fail.

    equivalent: why no test can tell the two apart; empty if one should.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str
    equivalent: str = ""

    def planted(self, root: Path) -> str:
        """The file's text with the fault.

        Raises:
            ValueError: ``old`` is not in it exactly once.
        """
        text = (root / self.file).read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: its old text occurs {text.count(self.old)} times in {self.file}")
        return text.replace(self.old, self.new)


@dataclass(frozen=True)
class Run:
    """How one pytest process ended: ``passed``, ``failed``, ``timed out``, ``crashed`` or ``broken``."""

    how: str
    seconds: float
    detail: str = ""


@dataclass(frozen=True)
class Verdict:
    fault: Fault
    word: str
    detail: str
    seconds: float


def read_faults(path: Path) -> list[Fault]:
    """A table per fault, under the name of the file that it is in."""
    return [Fault(file=file, **fields) for file, rows in tomllib.loads(path.read_text()).items() for fields in rows]


def unplantable(faults: list[Fault]) -> list[str]:
    """What is wrong with faults whose text has changed, or that are not Python and so would be killed by anything."""
    wrong = []
    for fault in faults:
        try:
            compile(fault.planted(ROOT), fault.file, "exec")
        except (OSError, ValueError, SyntaxError) as error:
            wrong.append(str(error) if isinstance(error, ValueError) else f"{fault.name}: {error}")
    return wrong


def copy_repository(target: Path) -> Path:
    """What git tracks and what it would: links stay links."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        source, copy = ROOT / name, target / name
        if source.is_symlink() or source.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy, follow_symlinks=False)
    return target


def run_tests(copy: Path, tests: str, limit: float) -> Run:
    """pytest in a copy; its whole process group ends with the limit."""
    environment = os.environ | {
        "PYTHONDONTWRITEBYTECODE": "1",  # a second's resolution would take a changed file for the old one
        "OMP_NUM_THREADS": "1",
        "XDG_CACHE_HOME": str(copy.parent / "cache"),
    }
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", RUN_TESTS, *OPTIONS, *shlex.split(tests)],
        cwd=copy,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return Run("timed out", time.monotonic() - started, f"after {limit:.0f} s")
    seconds = time.monotonic() - started
    if process.returncode < 0:
        return Run("crashed", seconds, signal.Signals(-process.returncode).name)
    if process.returncode == 0:
        return Run("passed", seconds)
    failed = re.search(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", output, re.MULTILINE)
    if process.returncode == 1 and failed is not None:
        return Run("failed", seconds, failed[1].removeprefix("tests/"))
    said = "bert_fused was not imported from the copy" if process.returncode == ELSEWHERE else output[-400:].strip()
    return Run("broken", seconds, f"status {process.returncode}: {said}")


def judge(fault: Fault, copy: Path, unchanged: dict[str, Run], deadline: float) -> Verdict | None:
    """What becomes of a fault; None if the deadline comes first. ``unchanged`` keeps the runs without any fault."""
    path, text = copy / fault.file, fault.planted(copy)
    run = unchanged.get(fault.tests) or run_tests(copy, fault.tests, min(LIMIT, deadline - time.monotonic()))
    if run.how == "passed":
        unchanged[fault.tests] = run
        original = path.read_text()
        path.write_text(text)
        try:
            run = run_tests(copy, fault.tests, min(LIMIT, deadline - time.monotonic()))
        finally:
            path.write_text(original)
    else:
        run = dataclasses.replace(run, how="broken", detail=f"without the fault: {run.how} {run.detail}")
    if time.monotonic() > deadline:
        return None
    word = {"failed": "killed", "passed": "survived"}.get(run.how, run.how)
    detail = run.detail
    if fault.equivalent and word != "broken":
        word, detail = ("equivalent", fault.equivalent) if word == "survived" else ("not equivalent", detail)
    return Verdict(fault, word, detail, run.seconds)


def judge_all(faults: list[Fault], jobs: int, seconds: float, console: Console) -> list[Verdict]:
    """The verdicts that are in within ``seconds``, in order of arrival; each is printed as it comes."""
    deadline = time.monotonic() + seconds
    verdicts: list[Verdict] = []
    unchanged: dict[str, Run] = {}
    with (
        tempfile.TemporaryDirectory(prefix="mutants-") as folder,
        Progress(console=console) as progress,
        ThreadPoolExecutor(jobs) as workers,
    ):
        copies: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for index in range(jobs):
            copies.put(copy_repository(Path(folder, str(index), ROOT.name)))

        def work(fault: Fault) -> Verdict | None:
            copy = copies.get()
            try:
                return judge(fault, copy, unchanged, deadline) if time.monotonic() < deadline else None
            finally:
                copies.put(copy)

        bar = progress.add_task("faults", total=len(faults))
        try:
            for done in as_completed([workers.submit(work, fault) for fault in faults]):
                verdict = done.result()
                progress.advance(bar)
                if verdict is not None:
                    verdicts.append(verdict)
                    progress.console.print(line(verdict), soft_wrap=True)
        finally:
            workers.shutdown(cancel_futures=True)
    return verdicts


def line(verdict: Verdict) -> Text:
    word = Text(f"{verdict.word:<15}", GOOD.get(verdict.word, "bold red"))
    return word + Text(f"{verdict.fault.name:<56} {verdict.seconds:4.0f} s  {verdict.detail}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="make mutants", description="Whether the suite notices planted faults.")
    parser.add_argument("names", nargs="*", help="faults whose names contain one of these; all by default")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long; chosen by --seed")
    parser.add_argument("--seed", default="", help="order of the faults, such as a commit")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--faults", type=Path, default=HERE / "faults.toml")
    options = parser.parse_args()

    faults = read_faults(options.faults)
    misfits = unplantable(faults)
    if misfits:
        print("\n".join(misfits))
        return 1
    faults = [fault for fault in faults if not options.names or any(name in fault.name for name in options.names)]
    if options.seed:
        random.Random(options.seed).shuffle(faults)

    console = Console()
    started = time.monotonic()
    verdicts = judge_all(faults, options.jobs, options.seconds, console)

    bad = [verdict for verdict in verdicts if verdict.word not in GOOD]
    judged = {verdict.fault for verdict in verdicts}
    not_run = [fault.name for fault in faults if fault not in judged]
    if not_run:
        console.print(f"not run, {len(not_run)}: {'; '.join(not_run)}")
    if bad:
        table = Table("fault", "verdict", "file", "tests or reason", title="what is wrong")
        for verdict in bad:
            table.add_row(verdict.fault.name, verdict.word, verdict.fault.file, verdict.detail or verdict.fault.tests)
        console.print(table)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    counts = ", ".join(f"{count} {word}" for word, count in Counter(v.word for v in verdicts).most_common())
    console.print(
        f"{counts or 'nothing'} of {len(faults)} in {time.monotonic() - started:.0f} s, "
        f"{used.ru_utime + used.ru_stime:.0f} CPU seconds"
    )
    return 1 if bad or not verdicts else 0


if __name__ == "__main__":
    sys.exit(main())
