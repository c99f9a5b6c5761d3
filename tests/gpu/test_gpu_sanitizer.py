"""NVIDIA's compute-sanitizer looks for stray accesses, and races in shared memory. ``make gpu-sanitize`` runs this.

Where the tool is not installed these tests are skipped, and pytest's report says so.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from gpu import DEVICE, MARKS, needs_gpu

from bert_fused.kernels.configs import TMA_ARCHS
from bert_fused.kernels.runtime import arch_of

pytestmark = [
    *MARKS,
    needs_gpu,
    pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed"),
]

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 100  # less than tests/support/watchdog.py gives a test

# No shape is a multiple of a tile: every kernel has rows, columns and a part of K to leave alone.
SCRIPT = """
import sys
import torch
from bert_fused.kernels.elementwise import act_bwd
from bert_fused.kernels.elementwise import act_fwd
from bert_fused.kernels.configs import Config
from bert_fused.kernels.linear_act import linear_act_fwd
configs = {
    "pointer": [Config("pointer", "bfloat16", 64, 64, 64, 4, 3)],
    "tma": [
        Config("tma", "bfloat16", 128, 128, 64, 4, 3),
        Config("tma", "bfloat16", 128, 128, 64, 4, 3, persistent=1, subtiles=2),
    ],
}[sys.argv[1]]
device = sys.argv[2]
shapes = (65, 203, 77), (1, 37, 32), (130, 129, 200)
if sys.argv[1] == "tma":
    shapes = (131, 136, 72), (1, 40, 136), (257, 264, 8)
for config in configs:
    for M, N, K in shapes:
        x, w, b = (torch.randn(s, device=device).bfloat16() for s in ((M, K), (N, K), (N,)))
        out, preact = linear_act_fwd(x, w, b, activation="gelu", save_preact=True, config=config)
        act_bwd(torch.ones_like(out), preact, activation="gelu", bias_grad=True)
        act_fwd(preact.numel(), "gelu")(preact, preact)
        assert out.isfinite().all()
print("all launched")
"""


@pytest.mark.parametrize("kernels", ["pointer", "tma"])
@pytest.mark.parametrize(
    ("tool", "options"),
    # A gap after every allocation: an access past a tensor does not reach the next one. Racecheck's warnings are only
    # guesses.
    [("memcheck", ["--padding", "4096"]), ("racecheck", ["--racecheck-detect-level", "error"])],
    ids=["memcheck", "racecheck"],
)
def test_compute_sanitizer_finds_nothing(tool: str, options: list[str], kernels: str) -> None:
    if kernels == "tma" and arch_of(DEVICE) not in TMA_ARCHS:
        pytest.skip("this GPU has no tensor memory accelerator")
    # torch calls functions that a driver may lack; such failed calls are no findings.
    command = ["compute-sanitizer", "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9", *options]
    command += [sys.executable, "-c", SCRIPT, kernels, DEVICE.type]
    # Without the caching allocator every tensor is its own allocation, whose bounds the tool checks.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        pytest.skip(f"compute-sanitizer took more than {SECONDS} s, and has found nothing so far")
    if "Device not supported" in done.stdout:
        pytest.skip("compute-sanitizer refuses this device")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "all launched" in done.stdout
