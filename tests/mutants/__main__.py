"""``make mutants``: plant the faults of ``faults.toml`` one by one in a copy of the tree; tests should fail each time.

A fault is killed if its tests fail with it and pass without it. The command fails if a fault survives, or if its tests
do not pass without it.
"""

import argparse
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
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, whose pytest brings it
    import tomli as tomllib

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
LIMIT = 240.0  # seconds for one pytest process; some compile kernels

# The exit status of tests that imported a bert_fused other than the copy's.
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
ENVIRONMENT = {
    "PYTHONDONTWRITEBYTECODE": "1",  # its times have whole seconds, so a changed file would look unchanged
    "OMP_NUM_THREADS": "1",
}
GOOD = ("killed", "timed out", "crashed")


@dataclass(frozen=True)
class Fault:
    """In ``file``, ``old`` becomes ``new``; ``tests``, arguments of pytest, should then fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str

    def planted(self, root: Path) -> str:
        """Return the file's text with the fault.

        Raises:
            ValueError: ``old`` is not in it exactly once.
        """
        text = (root / self.file).read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: its old text occurs {text.count(self.old)} times in {self.file}")
        return text.replace(self.old, self.new)


@dataclass(frozen=True)
class Run:
    """How pytest ended: ``passed``, ``failed``, ``timed out``, ``crashed`` or ``broken``; with a fault in place,
    ``survived`` and ``killed`` stand for the first two.
    """

    how: str
    seconds: float = 0.0
    detail: str = ""


def read_faults(path: Path) -> list[Fault]:
    """Read the faults; each is a table under the name of the file that it changes."""
    return [Fault(file=file, **fields) for file, rows in tomllib.loads(path.read_text()).items() for fields in rows]


def unplantable(faults: list[Fault]) -> list[str]:
    """Name the faults whose text has moved, and those whose result is not Python: any test would fail on these."""
    wrong = []
    for fault in faults:
        try:
            compile(fault.planted(ROOT), fault.file, "exec")
        except (OSError, ValueError, SyntaxError) as error:
            wrong.append(str(error) if isinstance(error, ValueError) else f"{fault.name}: {error}")
    return wrong


def copy_repository(target: Path) -> Path:
    """Copy the files that git tracks or would track; links stay links."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True)
    for name in filter(None, listed.stdout.split("\0")):
        source, copy = ROOT / name, target / name
        if source.is_symlink() or source.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy, follow_symlinks=False)
    return target


def run_tests(copy: Path, tests: str, limit: float) -> Run:
    """Run pytest in a copy; at the limit, kill its whole process group."""
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", RUN_TESTS, *OPTIONS, *shlex.split(tests)],
        cwd=copy,
        env=os.environ | ENVIRONMENT | {"XDG_CACHE_HOME": str(copy.parent / "cache")},
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
        return Run("passed", seconds, tests)
    failed = re.search(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", output, re.MULTILINE)
    if process.returncode == 1 and failed is not None:
        return Run("failed", seconds, failed[1].removeprefix("tests/"))
    reason = "bert_fused was not imported from the copy" if process.returncode == ELSEWHERE else output[-400:].strip()
    return Run("broken", seconds, f"status {process.returncode}: {reason}")


def judge(fault: Fault, copy: Path, sound: set[str], deadline: float) -> Run:
    """Run a fault's tests with it in place, and before without it unless these tests are ``sound``."""
    path, text = copy / fault.file, fault.planted(copy)
    if fault.tests not in sound:
        run = run_tests(copy, fault.tests, min(LIMIT, deadline - time.monotonic()))
        if run.how != "passed":
            return Run("broken", run.seconds, f"without the fault: {run.how} {run.detail}")
        sound.add(fault.tests)
    original = path.read_text()
    path.write_text(text)
    try:
        run = run_tests(copy, fault.tests, min(LIMIT, deadline - time.monotonic()))
    finally:
        path.write_text(original)
    return Run({"failed": "killed", "passed": "survived"}.get(run.how, run.how), run.seconds, run.detail)


def judge_all(faults: list[Fault], jobs: int, seconds: float) -> dict[str, Run]:
    """Judge faults for at most ``seconds``, print each run as it ends, and return them by the fault's name."""
    deadline = time.monotonic() + seconds
    runs: dict[str, Run] = {}
    sound: set[str] = set()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, ThreadPoolExecutor(jobs) as workers:
        copies: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for index in range(jobs):
            copies.put(copy_repository(Path(folder, str(index), ROOT.name)))

        def work(fault: Fault) -> None:
            copy = copies.get()
            try:
                run = judge(fault, copy, sound, deadline) if time.monotonic() < deadline else None
            finally:
                copies.put(copy)
            if run is not None and time.monotonic() < deadline:
                runs[fault.name] = run
                print(f"{run.how:<10}{fault.name:<60}{run.seconds:4.0f} s  {run.detail}", flush=True)

        try:
            for done in as_completed([workers.submit(work, fault) for fault in faults]):
                done.result()
        finally:
            workers.shutdown(cancel_futures=True)
    return runs


def main() -> int:
    parser = argparse.ArgumentParser(prog="make mutants", description="Test whether the suite notices planted faults.")
    parser.add_argument("names", nargs="*", help="faults whose names contain one of these; all by default")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time")
    parser.add_argument("--seed", default="", help="shuffle the faults by this text, such as a commit")
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

    started = time.monotonic()
    runs = judge_all(faults, options.jobs, options.seconds)
    not_run = [fault.name for fault in faults if fault.name not in runs]
    if not_run:
        print(f"not run, {len(not_run)}: {'; '.join(not_run)}")
    bad = [f"{run.how}: {name}: {run.detail}" for name, run in runs.items() if run.how not in GOOD]
    if bad:
        print("what is wrong:", *bad, sep="\n")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"{len(runs) - len(bad)} of {len(faults)} found in {time.monotonic() - started:.0f} s, "
        f"{used.ru_utime + used.ru_stime:.0f} CPU seconds"
    )
    return 1 if bad or not runs else 0


if __name__ == "__main__":
    sys.exit(main())
