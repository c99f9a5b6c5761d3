"""The compiler matrix over several Tritons: what is red, and how their folders come to be. Nothing is compiled here."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import matrix, tritons

GREEN = {"kernel": "linear_act_fwd", "arch": 90, "dtype": "float16", "config": "tile", "triton": "3.7.1", "broken": []}
GREEN |= {"activation": "gelu", "registers": 90, "shared_bytes": 98328, "ctas_per_sm": 3, "intended_ctas": 2}
GREEN |= {"right_matrix": "wgmma"}
RED = GREEN | {"triton": "3.6.0", "broken": ["4 spills"]}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tritons go here, and 3.7.1 is the pinned one."""
    monkeypatch.setattr(tritons, "FOLDER", tmp_path / ".tritons")
    monkeypatch.setattr(tritons, "pinned", lambda: "3.7.1")
    return tmp_path / ".tritons"


def pip_that(monkeypatch: pytest.MonkeyPatch, **answer: Any) -> list[tuple[str, ...]]:
    """Replaces pip. The list is of what it was asked."""
    asked: list[tuple[str, ...]] = []

    def pip(*arguments: str) -> "subprocess.CompletedProcess[str]":
        asked.append(arguments)
        if "--target" in arguments and not answer.get("returncode"):
            Path(arguments[arguments.index("--target") + 1], "triton").mkdir()
        return subprocess.CompletedProcess([], **{"returncode": 0, "stdout": "", "stderr": ""} | answer)

    monkeypatch.setattr(tritons, "_pip", pip)
    return asked


def test_a_cell_has_the_worst_of_its_rows() -> None:
    rows = [GREEN, GREEN | {"registers": 186}, GREEN | {"ctas_per_sm": 2}, GREEN | {"shared_bytes": 1024}]
    assert (matrix.cell(rows).plain, matrix.cell(rows).style) == ("186 regs 96 KB 2/SM", "green")
    mixed = matrix.cell([GREEN, RED, RED, RED | {"activation": "tanh"}])
    assert (mixed.plain, mixed.style) == ("gelu 4 spills\ntanh 4 spills", "red")
    assert matrix.cell([]).style == "red"


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("bad", [False, True], ids=["green", "red"])
def test_the_command(bad: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    def compile_all(arch: str, version: str) -> list[matrix.Row]:
        row = RED if bad and (arch, version) == ("90", "3.6.0") else GREEN
        return [row | {"arch": int(arch), "triton": version}]

    pip_that(monkeypatch)
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


@pytest.mark.usefixtures("folder")
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


def test_a_version_is_installed_once_and_completely(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    asked = pip_that(monkeypatch)
    assert tritons.environment("3.6.0")["PYTHONPATH"] == str(folder / "3.6.0")
    assert (folder / "3.6.0/triton").is_dir()
    assert len(list(folder.iterdir())) == 1
    (install,) = asked
    assert install[:3] == ("install", "--quiet", "--no-deps")
    assert install[-2:] == ("triton==3.6.0", "numpy<2.4")
    assert "TRITON_INTERPRET" not in tritons.environment("3.6.0")
    assert "PYTHONPATH" not in tritons.environment("3.7.1")
    assert len(asked) == 1


def test_a_failed_installation_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    pip_that(monkeypatch, returncode=1, stderr="a\nERROR: No matching distribution\n")
    with pytest.raises(tritons.NoTriton, match=r"cannot install Triton 9\.0\.0: ERROR: No matching"):
        tritons.environment("9.0.0")
    assert list(folder.iterdir()) == []
    for command, name in ((matrix.main, "matrix"), (tritons.main, "tritons")):
        assert command(["--tritons", "9.0.0"]) == 2
        assert f"benchmarks {name}: pip cannot install Triton 9.0.0" in capsys.readouterr().err
        assert command(["--tritons", "frog"]) == 2
        assert "got 'frog'" in capsys.readouterr().err


def test_the_newest_is_pips_answer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip_that(monkeypatch, stdout="triton (3.10.0)\nAvailable versions: 3.10.0, 3.9.0, 3.6.0\n")
    assert tritons.newest() == "3.10.0"
    assert tritons.named("oldest,pinned,newest,3.6.0") == ["3.6.0", "3.7.1", "3.10.0"]


def test_without_a_network_the_newest_is_what_is_there(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    pip_that(monkeypatch, returncode=1, stderr="no network")
    with pytest.raises(tritons.NoTriton, match="no network"):
        tritons.newest()
    for version in ("3.9.0", "3.10.1", "3.10.0"):
        (folder / version).mkdir(parents=True)
    assert tritons.newest() == "3.10.1"
    assert "taking 3.10.1" in capsys.readouterr().err


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("code", [0, 1])
def test_the_interpreters_tests_run_under_each(code: int, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    pip_that(monkeypatch)
    runs: list[tuple[list[str], str | None]] = []

    def run(command: list[str], *, env: dict[str, str], **_: Any) -> "subprocess.CompletedProcess[str]":
        runs.append((command, env.get("PYTHONPATH")))
        return subprocess.CompletedProcess(command, code if "PYTHONPATH" in env else 0)

    monkeypatch.setattr(tritons.subprocess, "run", run)
    assert tritons.main(["--tritons", "3.6.0,pinned", "--", "-x"]) == code
    assert [path and Path(path).name for _, path in runs] == ["3.6.0", None]
    for command, _ in runs:
        assert command[-1] == "-x"
        assert len([part for part in command if part.endswith(".py")]) == len(tritons.TESTS)
    assert ("failed on Triton 3.6.0" in capsys.readouterr().err) == bool(code)
