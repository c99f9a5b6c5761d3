"""The compiler matrix over several Tritons: what is red. Nothing is compiled here."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import matrix, versions

GREEN = {"kernel": "linear_act_fwd", "arch": 90, "dtype": "float16", "config": "tile", "triton": "3.7.1", "broken": []}
GREEN |= {"activation": "gelu", "registers": 90, "shared_bytes": 98328, "ctas_per_sm": 3, "intended_ctas": 2}
GREEN |= {"right_matrix": "wgmma"}
RED = GREEN | {"triton": "3.6.0", "broken": ["4 spills"]}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every version is there, and 3.7.1 is the pinned one."""
    monkeypatch.setattr(versions, "pinned", lambda package: "3.7.1")
    monkeypatch.setattr(matrix, "environment", lambda package, version: {})


def test_a_cell_has_the_worst_of_its_rows() -> None:
    rows = [GREEN, GREEN | {"registers": 186}, GREEN | {"ctas_per_sm": 2}, GREEN | {"shared_bytes": 1024}]
    assert (matrix.cell(rows).plain, matrix.cell(rows).style) == ("186 regs 96 KB 2/SM", "green")
    mixed = matrix.cell([GREEN, RED, RED, RED | {"activation": "tanh"}])
    assert (mixed.plain, mixed.style) == ("gelu 4 spills\ntanh 4 spills", "red")
    assert matrix.cell([]).style == "red"


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("bad", [False, True], ids=["green", "red"])
def test_the_command(bad: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    def compile_all(arch: str, version: str) -> list[matrix.Row]:
        row = RED if bad and (arch, version) == ("90", "3.6.0") else GREEN
        return [row | {"arch": int(arch), "triton": version}]

    monkeypatch.setattr(matrix, "compile_all", compile_all)
    report = tmp_path / "rows.json"
    command = ["--arch", "80,90", "--tritons", "3.6.0,pinned", "--json", str(report)]
    assert matrix.main(command) == int(bad)
    printed = capsys.readouterr().out
    assert ("gelu 4 spills" in printed) == bad
    assert ("1 red on Triton 3.6.0, 3.7.1" if bad else "all green on Triton 3.6.0, 3.7.1: 4 kernels") in printed
    assert printed.count("90 regs 96 KB 3/SM") == 4 - bad
    assert [(row["arch"], row["triton"]) for row in json.loads(report.read_text())] == [
        (80, "3.6.0"),
        (80, "3.7.1"),
        (90, "3.6.0"),
        (90, "3.7.1"),
    ]


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("code", "message", "reason"),
    [
        (-11, "Fatal Python error\nSegmentation fault\n", "Segmentation fault"),
        (-9, "", "exit status -9, no message"),
    ],
)
def test_a_dead_compiler_is_red(code: int, message: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def died(command: list[str], **_: Any) -> "subprocess.CompletedProcess[str]":
        return subprocess.CompletedProcess(command, code, "", message)

    monkeypatch.setattr(matrix.subprocess, "run", died)
    (row,) = matrix.compile_all("90", "3.7.1")
    assert row["broken"] == [reason]
    assert matrix.table(90, [row], ["3.7.1"])[1] == 1
