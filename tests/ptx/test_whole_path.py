"""The GPU's own tests with compiled kernels in the emulator: our Python, Triton's C launcher, and the PTX."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.static import stub_driver

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]


def run_gpu_tests(arch: int, folder: Path, *tests: str) -> int:
    """Run tests of tests/gpu for an architecture; return how many passed."""
    stub_driver.build(folder)
    environment = stub_driver.environment(folder) | {"BERT_FUSED_TEST_GPU": "1", "BERT_FUSED_EMULATE": str(arch)}
    environment["PYTHONPATH"] = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(FOLDER)])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *tests]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    return int(passed[1])


def test_models_and_kept_calls_are_right_with_compiled_kernels(tmp_path: Path) -> None:
    files = ("tests/gpu/test_gpu_state.py", "tests/gpu/test_gpu_runtime.py")
    assert run_gpu_tests(90, tmp_path, *files, "-k", "not threads and not compiled") >= 15


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_gpu_test_without_a_clock_passes_with_compiled_kernels(arch: int, tmp_path: Path) -> None:
    assert run_gpu_tests(arch, tmp_path, "tests/gpu") >= 100
