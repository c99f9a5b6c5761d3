"""The planted faults (``make mutants`` runs them): each can be planted, and one that survives fails the command."""

import importlib.util
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[1] / "mutants"


def load() -> ModuleType:
    specification = importlib.util.spec_from_file_location("mutants", FOLDER / "__main__.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["mutants"] = module  # dataclasses look it up
    specification.loader.exec_module(module)
    return module


mutants = load()
FAULTS = mutants.read_faults(FOLDER / "faults.toml")


def test_every_fault_has_its_text_once_and_is_python() -> None:
    assert mutants.unplantable(FAULTS) == []
    assert all(fault.old != fault.new for fault in FAULTS)
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 50


def test_every_fault_names_tests_that_exist() -> None:
    for fault in FAULTS:
        for test in fault.tests.split(" -k")[0].split():
            path, _, name = test.partition("::")
            assert f"def {name.partition('[')[0]}" in (FOLDER.parents[1] / path).read_text(), fault.name


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("no such text", "", "name: its old text occurs 0 times in kernels/runtime.py"),
        ("import", "", "name: its old text occurs 4 times in kernels/runtime.py"),
        ("INTERPRETER_SMS = 2", "INTERPRETER_SMS = (", "name: '(' was never closed"),
    ],
)
def test_a_fault_that_cannot_be_planted_is_named(old: str, new: str, message: str) -> None:
    (said,) = mutants.unplantable([mutants.Fault("name", "kernels/runtime.py", old, new, "")])
    assert said.startswith(message)


@pytest.mark.parametrize(
    ("without", "planted", "how"),
    [
        ("passed", "failed", "killed"),
        ("passed", "timed out", "timed out"),
        ("passed", "crashed", "crashed"),
        ("passed", "passed", "survived"),
        ("passed", "broken", "broken"),
        ("failed", "failed", "broken"),
        ("timed out", "failed", "broken"),
    ],
)
def test_a_fault_is_found_if_its_tests_end_badly_only_with_it(
    without: str, planted: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file.py"
    file.write_text("x = 1\n")
    ends = {"x = 1\n": without, "x = 2\n": planted}
    monkeypatch.setattr(mutants, "run_tests", lambda *_: mutants.Run(ends[file.read_text()], 1.0))
    fault = mutants.Fault("name", "file.py", "x = 1", "x = 2", "tests")
    assert mutants.judge(fault, tmp_path, set(), math.inf).how == how
    assert (how in mutants.GOOD) == (without == "passed" and planted in ("failed", "timed out", "crashed"))
    assert file.read_text() == "x = 1\n"


FAULTS_OF_A_TEST = """
[["kernels/configs.py"]]
name = "a longer reach"
old = "REACH = 4"
new = "REACH = 8"
tests = "tests/kernel/test_configs.py::test_an_entry_for_the_shape_reaches_a_factor_of_four"

[["kernels/configs.py"]]
name = "the same reach"
old = "REACH = 4"
new = "REACH = 2**2"
tests = "tests/kernel/test_configs.py::test_an_entry_for_the_shape_reaches_a_factor_of_four"
"""


def run_command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    faults = folder / "faults.toml"
    faults.write_text(FAULTS_OF_A_TEST)
    command = [sys.executable, str(FOLDER), "--faults", str(faults), "--jobs", "1", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=500)


def test_a_fault_that_survives_fails_the_command(tmp_path: Path) -> None:
    """The tests run in the copy and against its code."""
    done = run_command(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    killed, survived, *_, count = done.stdout.splitlines()
    assert killed.startswith("killed    a longer reach")
    assert "test_configs.py::test_an_entry_for_the_shape_reaches" in killed
    assert survived.startswith("survived  the same reach")
    assert count.startswith("1 of 2 found")


def test_faults_past_the_time_limit_are_named(tmp_path: Path) -> None:
    done = run_command(tmp_path, "--seconds", "0")
    assert done.returncode == 1
    assert "not run, 2: a longer reach; the same reach" in done.stdout
