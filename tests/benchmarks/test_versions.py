"""``python -m benchmarks versions`` and ``matrix``, without installing or compiling anything."""

import io
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.static import versions

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Versions go here, and 3.7.1 is the pinned one."""
    monkeypatch.setattr(versions, "FOLDER", tmp_path / ".versions")
    monkeypatch.setattr(versions, "pinned", lambda package: "3.7.1")
    return tmp_path / ".versions"


def pip_that(monkeypatch: pytest.MonkeyPatch, **answer: Any) -> list[tuple[str, ...]]:
    """Replaces pip. The list is of what it was asked."""
    asked: list[tuple[str, ...]] = []

    def pip(*arguments: str) -> "subprocess.CompletedProcess[str]":
        asked.append(arguments)
        if "--target" in arguments and not answer.get("returncode"):
            Path(arguments[arguments.index("--target") + 1], "triton").mkdir()
        return subprocess.CompletedProcess([], **{"returncode": 0, "stdout": "", "stderr": ""} | answer)

    monkeypatch.setattr(versions, "_pip", pip)
    return asked


def test_a_version_is_installed_once_and_completely(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    asked = pip_that(monkeypatch)
    assert versions.environment("triton", "3.6.0")["PYTHONPATH"] == str(folder / "triton-3.6.0")
    assert (folder / "triton-3.6.0/triton").is_dir()
    assert len(list(folder.iterdir())) == 1
    (install,) = asked
    assert install[:3] == ("install", "--quiet", "--no-deps")
    assert install[-2:] == ("triton==3.6.0", "numpy<2.4")
    assert "TRITON_INTERPRET" not in versions.environment("triton", "3.6.0")
    assert "PYTHONPATH" not in versions.environment("triton", "3.7.1")
    assert len(asked) == 1


def test_a_failed_installation_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    pip_that(monkeypatch, returncode=1, stderr="a\nERROR: No matching distribution\n")
    with pytest.raises(versions.NoVersion, match=r"cannot install triton 9\.0\.0: ERROR: No matching"):
        versions.environment("triton", "9.0.0")
    assert list(folder.iterdir()) == []
    for command, name in ((versions.matrix, "matrix"), (versions.main, "versions")):
        option = ["--tritons"] if name == "matrix" else ["--transformers", "none", "--triton"]
        assert command([*option, "9.0.0"]) == 2
        assert f"benchmarks {name}: pip cannot install triton 9.0.0" in capsys.readouterr().err
        assert command([*option, "frog"]) == 2
        assert "got 'frog'" in capsys.readouterr().err


def test_newest_is_what_pip_answers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip_that(monkeypatch, stdout="triton (3.10.0)\nAvailable versions: 3.10.0, 3.9.0, 3.6.0\n")
    assert versions.newest("triton") == "3.10.0"
    assert versions.named("triton", "oldest,pinned,newest,3.6.0") == ["3.6.0", "3.7.1", "3.10.0"]


def test_newest_without_a_network_is_the_newest_installed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    pip_that(monkeypatch, returncode=1, stderr="no network")
    assert versions.newest("triton") == "3.7.1"
    for version in ("3.9.0", "3.10.1", "3.10.0"):
        (folder / f"triton-{version}").mkdir(parents=True)
    assert versions.newest("triton") == "3.10.1"
    assert "no network): taking 3.10.1" in capsys.readouterr().err


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("code", [0, 1])
def test_versions_runs_the_tests_of_each_version_under_it(code: int, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    pip_that(monkeypatch)
    runs: list[tuple[list[str], str | None]] = []

    class Process:
        def __init__(self, command: list[str], *, env: dict[str, str], **_: Any) -> None:
            runs.append((command, env.get("PYTHONPATH")))
            self.code = code if "PYTHONPATH" in env else 0
            self.stdout = io.StringIO("..F\n12 passed in 3.45s\n")

        def wait(self) -> int:
            return self.code

    monkeypatch.setattr(versions.subprocess, "Popen", Process)
    assert versions.main(["--triton", "3.6.0,pinned", "--transformers", "5.17.0", "--", "-x"]) == code
    assert [path and Path(path).name for _, path in runs] == ["transformers-5.17.0", "triton-3.6.0", None]
    for package, (command, _) in zip(("transformers", "triton", "triton"), runs, strict=True):
        assert command[-1] == "-x"
        named = [part for part in command if part.endswith(".py")]
        assert named == list(versions.TESTS[package])
        assert all((ROOT / path).exists() for path in named)
    assert capsys.readouterr().out.count("12 passed in 3.45s") == 6


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("status", "stderr", "reason"),
    [
        (0, "", None),
        (1, "a warning\nbudget broken: linear_act_fwd 90 tile: 4 bytes spilled\n", "tile: 4 bytes spilled"),
        (-11, "Fatal Python error\nSegmentation fault\n", "Segmentation fault"),
        (-9, "", "exit status -9, no message"),
    ],
)
def test_matrix_fails_where_sass_fails(
    status: int, stderr: str, reason: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pip_that(monkeypatch)

    def sass(command: list[str], *, env: dict[str, str], **_: Any) -> "subprocess.CompletedProcess[str]":
        assert command[1:4] == ["-m", "benchmarks", "sass"]
        bad = command[-1] == "90" and "PYTHONPATH" in env  # on 3.6.0, not on the pinned 3.7.1
        return subprocess.CompletedProcess(command, status if bad else 0, "", stderr if bad else "")

    monkeypatch.setattr(versions.subprocess, "run", sass)
    assert versions.matrix(["--arch", "80,90", "--tritons", "3.6.0,pinned"]) == bool(status)
    printed = capsys.readouterr().out.splitlines()
    good = [f"sm_{arch}, Triton {version}: every limit kept" for arch in (80, 90) for version in ("3.6.0", "3.7.1")]
    if reason is None:
        assert printed == good
    else:
        assert printed[:3] == [*good[:2], "sm_90, Triton 3.6.0: 1 broken"]
        assert printed[3].endswith(reason)


def test_pyproject_and_readme_name_the_tested_versions() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    oldest = {package: tested[0].removesuffix(".0") for package, tested in versions.TESTED.items()}
    assert f'hf = ["transformers>={oldest["transformers"]}"]' in project
    assert f"triton>={oldest['triton']}; sys_platform == 'linux'" in project
    assert versions.readme_sentence() in " ".join((ROOT / "README.md").read_text().split())
