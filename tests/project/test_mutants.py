"""The planted faults (``make mutants`` runs them): each can be planted, and one that survives fails the command."""

import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from mutants import __main__ as mutants

ROOT = Path(__file__).parents[2]
FAULTS = mutants.read_faults(ROOT / "tests/mutants/faults.toml")


def test_every_fault_has_its_text_once_and_is_python() -> None:
    assert mutants.unplantable(FAULTS) == []
    assert all(fault.old != fault.new for fault in FAULTS)
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 50


def test_every_fault_names_tests_that_exist() -> None:
    for fault in FAULTS:
        for test in fault.tests.split(" -k")[0].split():
            path, _, name = test.partition("::")
            assert not name or f"def {name.partition('[')[0]}(" in (ROOT / path).read_text(), fault.name


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


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str, **ends: str) -> int:
    """The exit status of the command where all tests pass without a fault, and end as said with each."""
    pairs = [(name, f"x = {value}") for value, name in enumerate(ends, 2)]
    faults = [mutants.Fault(name, "kernels/runtime.py", "INTERPRETER_SMS = 2", new, name) for name, new in pairs]

    def run_tests(copy: Path, name: str, limit: float) -> Any:
        planted = "INTERPRETER_SMS = 2" not in (copy / "kernels/runtime.py").read_text()
        return mutants.Run(ends[name] if planted else "passed", 1.0)

    monkeypatch.setattr(mutants, "read_faults", lambda path: faults)
    monkeypatch.setattr(mutants, "run_tests", run_tests)
    monkeypatch.setattr(sys, "argv", ["mutants", *arguments])
    return mutants.main()


def test_a_fault_that_survives_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, noticed="failed", hung="timed out") == 0
    assert "2 of 2 found" in capsys.readouterr().out
    assert run_main(monkeypatch, noticed="failed", ignored="passed") == 1
    printed = capsys.readouterr().out
    assert "1 of 2 found" in printed
    assert "survived: ignored" in printed
    assert run_main(monkeypatch, "ticed", noticed="failed", ignored="passed") == 0
    assert run_main(monkeypatch, "--seconds", "0", noticed="failed", ignored="passed") == 1
    assert "not run, 2: noticed; ignored" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("test", "how", "detail"),
    [
        ("from bert_fused import __version__ as v; assert not v", "failed", "test_it.py::test_it"),
        ("pass", "broken", "bert_fused was not imported from the copy"),
        ("import time; time.sleep(99)", "timed out", "after 3 s"),
        ("import os; os.abort()", "crashed", "SIGABRT"),
    ],
)
def test_a_run_says_how_the_tests_of_a_copy_ended(test: str, how: str, detail: str, tmp_path: Path) -> None:
    copy = mutants.copy_repository(tmp_path / "copy")
    assert os.readlink(copy / "bert_fused/kernels") == "../kernels"
    (copy / "test_it.py").write_text(f"def test_it(): {test}")
    run = mutants.run_tests(copy, "test_it.py", 3 if how == "timed out" else 200)
    assert (run.how, run.detail.removeprefix("status 97: ")) == (how, detail)
