"""The planted faults themselves (``make mutants`` runs them): each can be planted, and a survivor is told."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).with_name("mutants")


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
    for fault in FAULTS:
        planted = fault.planted(mutants.ROOT)
        assert planted != (mutants.ROOT / fault.file).read_text(), fault.name
        compile(planted, fault.file, "exec")


def test_faults_are_many_and_named() -> None:
    assert len(FAULTS) >= 50
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    assert len({(fault.file, fault.old, fault.new) for fault in FAULTS}) == len(FAULTS)


def test_a_text_that_is_not_there_once_is_refused() -> None:
    for old, times in (("no such text", 0), ("import", 4)):
        fault = mutants.Fault("name", "kernels/runtime.py", old, "", "")
        with pytest.raises(ValueError, match=f"name: its old text occurs {times} times in kernels/runtime.py"):
            fault.planted(mutants.ROOT)


CASES = """
[["kernels/configs.py"]]
name = "noticed"
old = "REACH = 4"
new = "REACH = 2"
tests = "tests/test_configs.py::test_an_entry_for_the_shape_reaches_a_factor_of_four"

[["kernels/configs.py"]]
name = "unnoticed"
old = "REACH = 4"
new = "REACH = 2**2"
tests = "tests/test_configs.py::test_an_entry_for_the_shape_reaches_a_factor_of_four"

[["kernels/configs.py"]]
name = "explained"
old = "REACH = 4"
new = "REACH = 2**2"
tests = "tests/test_configs.py::test_an_entry_for_the_shape_reaches_a_factor_of_four"
equivalent = "4 is 2 squared"

[["kernels/configs.py"]]
name = "explained in error"
old = "REACH = 4"
new = "REACH = 2"
tests = "tests/test_configs.py::test_an_entry_for_the_shape_reaches_a_factor_of_four"
equivalent = "it is not"

[["kernels/configs.py"]]
name = "with tests that prove nothing"
old = "REACH = 4"
new = "REACH = 2"
tests = "tests/test_configs.py::test_that_is_not_there"
"""
VERDICTS = {
    "noticed": "killed",
    "unnoticed": "survived",
    "explained": "equivalent",
    "explained in error": "not equivalent",
    "with tests that prove nothing": "broken",
}


def test_verdicts(tmp_path: Path) -> None:
    faults = tmp_path / "faults.toml"
    faults.write_text(CASES)
    command = [sys.executable, str(FOLDER), "--faults", str(faults), "--jobs", "1"]
    everything = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert everything.returncode == 1, everything.stderr
    for name, verdict in VERDICTS.items():
        assert any(line.startswith(f"{verdict} ") and f" {name} " in line for line in everything.stdout.splitlines())
    good = subprocess.run([*command, "noticed"[:5], "--seconds", "0"], capture_output=True, text=True, timeout=100)
    assert good.returncode == 1
    assert "not run, 1: noticed" in good.stdout
