"""DDP and FSDP2: two processes train a fused model to what one process trains unfused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

# How the model is wrapped -> kernels launched in a step, forward and backward, on each rank.
WAYS = {
    "one process": (0, 0),
    "ddp, fused before": (3, 3),
    "ddp, fused after": (3, 3),
    "ddp, unpad": (3, 3),
    "fsdp, fused before": (3, 3),
    "fsdp, fused after": (3, 3),
    "fsdp, checkpointed": (5, 3),
    "fsdp, unpad": (3, 3),
    "fsdp, unfused again": (0, 0),
    "fsdp of blocks, fused before": (3, 3),
    "fsdp of blocks, fused after": (0, 0),
    "fsdp of the encoder": (3, 3),
    "fsdp of linears": (0, 0),
}


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    folders = os.pathsep.join([str(HERE.parents[1]), str(HERE.parent / "support")])
    environment = os.environ | {"PYTHONPATH": folders, "TRITON_INTERPRET": "1"}
    arguments = [str(tmp_path / "meeting"), str(tmp_path / "found.json")]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(HERE / "distributed_child.py"), str(rank), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=900)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)

    found = json.loads((tmp_path / "found.json").read_text())
    assert {way: (run["forward"], run["backward"]) for way, run in found.items()} == WAYS
    alone = found["one process"]
    assert min(alone["losses"]) < alone["losses"][0] - 0.01, "nothing is learned that could go wrong"
    for way, run in found.items():
        for what in ("losses", "weights"):
            errors = [abs(mine - other) for mine, other in zip(run[what], alone[what], strict=True)]
            assert max(errors) <= 1e-6, f"{way}: {what} {run[what]}, one process unfused {alone[what]}"
