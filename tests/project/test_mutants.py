"""The planted faults themselves (``make mutants`` runs them): each can be planted, and a survivor is told."""

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


def test_every_fault_can_be_planted() -> None:
    """Its text is there once, and what it becomes is Python: else it would be killed by a syntax error."""
    assert mutants.unplantable(FAULTS) == []
    assert all(fault.old != fault.new for fault in FAULTS)


def test_faults_are_many_and_named() -> None:
    assert len(FAULTS) >= 50
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    assert len({(fault.file, fault.old, fault.new) for fault in FAULTS}) == len(FAULTS)


def test_a_text_that_is_not_there_once_is_refused() -> None:
    for old, times in (("no such text", 0), ("import", 4)):
        fault = mutants.Fault("name", "kernels/runtime.py", old, "", "")
        expected = f"name: its old text occurs {times} times in kernels/runtime.py"
        assert mutants.unplantable([fault, fault]) == 2 * [expected]


def test_a_fault_that_is_no_python_is_refused() -> None:
    fault = mutants.Fault("name", "kernels/runtime.py", "INTERPRETER_SMS = 2", "INTERPRETER_SMS = (", "")
    (message,) = mutants.unplantable([fault])
    assert message.startswith("name: '(' was never closed")


@pytest.mark.parametrize(
    ("without", "planted", "equivalent", "word"),
    [
        ("passed", "failed", "", "killed"),
        ("passed", "timed out", "", "timed out"),
        ("passed", "crashed", "", "crashed"),
        ("passed", "passed", "", "survived"),
        ("passed", "passed", "a reason", "equivalent"),
        ("passed", "failed", "a reason", "not equivalent"),
        ("passed", "crashed", "a reason", "not equivalent"),
        ("passed", "broken", "", "broken"),
        ("failed", "failed", "", "broken"),
        ("timed out", "failed", "", "broken"),
        ("broken", "failed", "a reason", "broken"),
    ],
)
def test_verdicts(
    without: str, planted: str, equivalent: str, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file.py"
    file.write_text("x = 1\n")
    ends = {"x = 1\n": without, "x = 2\n": planted}
    monkeypatch.setattr(mutants, "run_tests", lambda *_: mutants.Run(ends[file.read_text()], 1.0))
    fault = mutants.Fault("name", "file.py", "x = 1", "x = 2", "tests", equivalent)
    assert mutants.judge(fault, tmp_path, {}, math.inf).word == word
    assert (word in mutants.GOOD) == (word in ("killed", "timed out", "crashed", "equivalent"))
    assert file.read_text() == "x = 1\n"
    assert mutants.judge(fault, tmp_path, {}, -math.inf) is None


FAULT = """
[["kernels/configs.py"]]
name = "a shorter reach"
old = "REACH = 4"
new = "REACH = 8"
tests = "tests/kernel/test_configs.py::test_an_entry_for_the_shape_reaches_a_factor_of_four"
"""


@pytest.mark.parametrize("planted", ["REACH = 8", "REACH = 2**2"], ids=["killed", "survived"])
def test_the_command(planted: str, tmp_path: Path) -> None:
    """From the file of faults to the exit status: the tests run in the copy, and against its code."""
    faults = tmp_path / "faults.toml"
    faults.write_text(FAULT.replace("REACH = 8", planted))
    command = [sys.executable, str(FOLDER), "--faults", str(faults), "--jobs", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    survived = planted != "REACH = 8"
    assert done.returncode == survived, done.stdout + done.stderr
    assert ("survived" if survived else "test_configs.py::test_an_entry_for_the_shape_reaches") in done.stdout


def test_what_was_not_run_is_named(tmp_path: Path) -> None:
    faults = tmp_path / "faults.toml"
    faults.write_text(FAULT)
    command = [sys.executable, str(FOLDER), "--faults", str(faults), "--seconds", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert "not run, 1: a shorter reach" in done.stdout
