"""A choice of the compiled kernels in the emulator, and a fault in one; ``make ptx`` and ``make mutants`` run all."""

import json
import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
# This process interprets kernels, so another compiles them.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
ENVIRONMENT |= {
    "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT), str(ROOT / "tests/support")])
}


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=500
    )


def test_a_choice_of_kernels_is_right_as_compiled(tmp_path: Path) -> None:
    done = run(str(FOLDER), "--quick", "--json", str(tmp_path / "results.json"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert {result["row"][0] for result in results} == {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"}
    assert all(0 < result["share"] <= 1 and not result["wrong"] for result in results)


# What the interpreter does not have: barriers of a block, and waits for matrix products.
PLANTED = """
import sys
sys.path.insert(0, {folder!r})
import execute, faults
case = faults.kernels()["sm_90 TMA"]
compiled = execute.compiled(case)
assert faults.finding(case, compiled.asm["ptx"], compiled.metadata) == ""
print(faults.finding(case, compiled.asm["ptx"].replace("bar.sync", "// bar.sync"), compiled.metadata))
print(faults.finding(case, compiled.asm["ptx"].replace("wgmma.wait_group", "// wgmma.wait_group"), compiled.metadata))
"""


def test_a_kernel_without_its_barriers_or_waits_is_found() -> None:
    done = run("-c", PLANTED.format(folder=str(FOLDER)))
    assert done.stdout.split("\n")[:2] == ["race", "race"], done.stdout + done.stderr
