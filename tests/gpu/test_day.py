"""``benchmarks/gpu.sh``, rehearsed: a script in the place of Python, and limits a hundred times shorter."""

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 570  # of the 600 that one command has on the GPU machine

# The stand-in knows a step by its arguments. Only the collection of tests is real.
PYTHON = f"""#!/bin/sh
[ "$1" = -c ] && exit 0
case "$*" in
*exact_on_integers*) step=integers ;;
*" tune "*) step=tune ;;
*"not alone"*) step=tests ;;
*sanitizer.py*-m\\ alone*) step=alone ;;
*) step=other ;;
esac
echo "$step $BERT_FUSED_TEST_GPU $BERT_FUSED_TABLES $*" >>"$CALLS"
echo "$step: first line"
[ "$step" = "$FAILS" ] && exit 3
[ "$step" = "$HANGS" ] && trap "" INT && while :; do sleep 0.05; done
[ -n "$COLLECT" ] && [ "$2" = pytest ] && exec "{sys.executable}" "$@" --collect-only -qq -n 0
[ $step = tune ] && echo "{{}}" >"$OUT/tuned.json"
echo "$step: last line"
"""

TIMEOUT = f"""#!/bin/sh
[ "$1 $2 $3 $4" = "-s INT -k 5" ] || exit 99
echo "$5" >>"$LIMITS"
[ -n "$COLLECT" ] && limit=100 || limit=$(($5 / 100)).9
shift 5
exec {shutil.which("timeout")} -s INT -k 0.1 $limit "$@"
"""


class Day:
    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        self.out.mkdir()
        for name, text in (("python", PYTHON), ("timeout", TIMEOUT)):
            path = folder / name
            path.write_text(text)
            path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def run(self, what: str = "day", *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        files = {name: str(self.folder / name.lower()) for name in ("CALLS", "LIMITS")}
        given = {"PATH": f"{self.folder}:{os.environ['PATH']}", "OUT": str(self.out), "COMMIT": "abc123"}
        plain = {k: v for k, v in os.environ.items() if "XDIST" not in k and k not in ("TRITON_INTERPRET", "HANGS")}
        return subprocess.run(
            ["sh", str(ROOT / "benchmarks" / "gpu.sh"), what, str(self.folder / "python"), *arguments],
            cwd=self.folder,
            env=plain | files | given | {"FAILS": "", "HANGS": "", "COLLECT": ""} | variables,
            capture_output=True,
            text=True,
            timeout=300,
        )

    def calls(self) -> dict[str, str]:
        """The steps in order, each with its arguments."""
        return dict(line.split(" ", 1) for line in (self.folder / "calls").read_text().splitlines())

    def log(self, name: str) -> str:
        return (self.out / f"{name}.log").read_text()


@pytest.fixture
def day(tmp_path: Path) -> Day:
    return Day(tmp_path)


def test_day_runs_its_steps_and_keeps_their_logs(day: Day) -> None:
    done = day.run()
    assert done.returncode == 0, done.stdout + done.stderr
    calls = day.calls()
    assert list(calls) == ["integers", "tune", "tests", "alone"]
    assert calls["tune"].endswith(
        f"-m bert_fused tune --shapes BERT-base,MiniLM --dtypes bfloat16 --budget 150 --export {day.out}/tuned.json"
    )
    for name in ("integers", "tests", "alone"):
        assert calls[name].startswith("1 off -m pytest tests/gpu"), "of what ships, on the GPU"
    assert sorted(path.name for path in day.out.iterdir()) == sorted(
        ["day.txt", "integers.log", "tune.log", "tuned.json", "tests.log"]
    )
    summary = (day.out / "day.txt").read_text()
    assert re.fullmatch(
        r"commit abc123\n" + "".join(rf"{n}: exit status 0 after \d+ s\n" for n in ("integers", "tune", "tests")),
        summary,
    )
    assert all(line in done.stdout for line in summary.splitlines())


def test_each_command_fits_its_time_limit(day: Day) -> None:
    """If every step hangs, 20 s are left to find the GPU."""
    day.run()
    limits = [int(limit) + 5 for limit in (day.folder / "limits").read_text().split()]
    assert len(limits) == 4
    assert sum(limits) <= SECONDS - 20
    for what in ("test", "sanitize"):
        (day.folder / "limits").unlink()
        assert day.run(what).returncode == 0
        assert sum(int(limit) + 5 for limit in (day.folder / "limits").read_text().split()) <= SECONDS - 5


@pytest.mark.parametrize("step", ["integers", "tune", "tests", "alone"])
@pytest.mark.parametrize("how", ["FAILS", "HANGS"])
def test_a_step_that_fails_or_hangs_costs_itself(how: str, step: str, day: Day) -> None:
    done = day.run(**{how: step})
    assert done.returncode == 1, done.stdout + done.stderr
    assert list(day.calls()) == ["integers", "tune", "tests", "alone"]
    log = "tests" if step == "alone" else step
    statuses = dict(re.findall(r"^(\w+): exit status (\d+)", (day.out / "day.txt").read_text(), re.MULTILINE))
    assert statuses == {"integers": "0", "tune": "0", "tests": "0"} | {log: "3" if how == "FAILS" else "137"}
    for name in ("integers", "tune", "tests", "alone"):
        written = day.log("tests" if name == "alone" else name)
        assert f"{name}: first line\n" in written
        assert (f"{name}: last line\n" in written) == (name != step)


@pytest.mark.slow
def test_day_collects_each_gpu_test_in_its_step(day: Day) -> None:
    done = day.run(COLLECT="1")
    assert done.returncode == 0, done.stdout + done.stderr + day.log("integers") + day.log("tests")
    names = set(re.findall(r"::(test_\w+)", day.log("integers")))
    assert names == {"test_this_machine_runs_the_kernels", "test_every_configuration_is_exact_on_integers"}
    collected = re.findall(r"^tests/gpu/(\w+)\.py::(test_\w+)", day.log("tests"), re.MULTILINE)
    files = {path.stem for path in Path(__file__).parent.glob("test_gpu*.py")}
    assert {file for file, _ in collected} == files - {"test_gpu_sanitizer"}
    calls = day.calls()
    assert "-n 4 -m not alone" in calls["tests"]
    assert "-n 1 -m alone" in calls["alone"]
    # The clocks, once, after all others.
    assert [name for _, name in collected].count("test_graph_and_event_samplers_agree_on_a_long_product") == 1
    assert collected[-1] == ("test_gpu_benchmarks", "test_graph_and_event_samplers_agree_on_a_long_product")
    day.run("sanitize")
    assert day.calls()["other"].startswith("1 off -m pytest tests/gpu/test_gpu_sanitizer.py -n 2")


def test_a_day_without_a_commit_is_refused(day: Day) -> None:
    done = day.run(COMMIT="", GIT_DIR="/nonexistent")
    assert (done.returncode, done.stderr) == (2, "gpu.sh: there is no git here: set COMMIT to what is measured\n")
    assert not (day.folder / "calls").exists()


def test_an_unknown_command_is_refused(day: Day) -> None:
    done = day.run("frog")
    assert (done.returncode, done.stderr) == (2, "gpu.sh: frog is none of day, test, sanitize and bench\n")
