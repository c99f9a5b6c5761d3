"""The watchdog of the GPU tests: one fault or hang costs one test. Faults and hangs are planted; no GPU is needed."""

import os
import re
import subprocess
import sys
from pathlib import Path

SUPPORT = Path(__file__).parents[1] / "support"

CONFTEST = """
import watchdog
from watchdog import pytest_configure, pytest_runtest_protocol, pytest_runtest_teardown

watchdog.SECONDS = 2
"""

# Stands for torch, whose import takes each new worker seconds.
TORCH = """
class cuda:
    dead = False

    def is_initialized():
        return True

    def synchronize():
        if cuda.dead:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
"""

SUITE = """
import time
import pytest
import torch


@pytest.mark.parametrize("i", range(8))
def test_before(i):
    torch.cuda.synchronize()


def test_fault():
    torch.cuda.dead = True
    torch.cuda.synchronize()


def test_fault_that_shows_later():
    torch.cuda.dead = True


def test_hang():
    time.sleep(3600)


@pytest.fixture
def hangs_afterwards():
    yield
    time.sleep(3600)


def test_hang_after_a_failure(hangs_afterwards):
    assert False


@pytest.mark.parametrize("i", range(8))
def test_after(i):
    torch.cuda.synchronize()
"""


def test_one_fault_or_hang_costs_one_test(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "torch.py").write_text(TORCH)
    (tmp_path / "test_planted.py").write_text(SUITE)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    variables = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "2", "-v", "-rf", "-p", "no:cacheprovider", "--max-worker-restart=99"],
        cwd=tmp_path,
        env=variables | {"PYTHONPATH": f"{tmp_path}:{SUPPORT}"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    failed = set(re.findall(r"^FAILED test_planted.py::(\w+)", done.stdout, re.MULTILINE))
    assert failed == {"test_fault", "test_fault_that_shows_later", "test_hang", "test_hang_after_a_failure"}, (
        done.stdout
    )
    passed = re.findall(r"PASSED.* test_planted.py::(test_(?:before|after)\[\d\])", done.stdout)
    assert len(passed) == len(set(passed)) == 16, done.stdout
    # The log says which test died, and where a hanging one waited.
    assert done.stderr.count("the GPU can do no more: CUDA error: an illegal memory access") == 2, done.stderr
    assert done.stderr.count("Timeout (") == 2, done.stderr
    assert "in test_hang\n" in done.stderr
