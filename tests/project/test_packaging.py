"""Hugging Face's package ``kernels`` stays importable, the wheel works, and ``import bert_fused`` needs only torch."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import bert_fused

ROOT = Path(__file__).parents[2]


def run(command: list[str | Path], cwd: Path = ROOT, **variables: str) -> str:
    """Run a command without the variables that the tests set, and return what it printed."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    done = subprocess.run(command, cwd=cwd, env=environment | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.fixture
def hugging_face_kernels(tmp_path: Path) -> Path:
    """A folder with a package ``kernels`` that transformers accepts as Hugging Face's."""
    package = tmp_path / "kernels"
    package.mkdir()
    names = "CUDAProperties Device KernelizeFallback LayerRepository LocalLayerRepository Mode ROCMProperties"
    decorators = "replace_kernel_forward_from_hub use_kernel_forward_from_hub use_kernelized_func"
    functions = "get_kernel kernelize register_kernel_mapping use_kernel_mapping"
    lines = [f"class {name}: pass" for name in names.split()]
    lines += [f"def {name}(*names): return lambda original: original" for name in decorators.split()]
    lines += [f"def {name}(*args, **kwargs): pass" for name in functions.split()]
    (package / "__init__.py").write_text("\n".join(lines))
    (package / "layer").mkdir()
    information = tmp_path / "kernels-0.18.2.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    return tmp_path


def test_kernels_has_no_package_file() -> None:
    assert not (ROOT / "kernels/__init__.py").exists()
    assert (ROOT / "bert_fused/kernels").is_symlink()
    assert os.readlink(ROOT / "bert_fused/kernels") == "../kernels"


def test_hugging_faces_kernels_package_is_found_from_the_root(hugging_face_kernels: Path) -> None:
    """With a package file of ours in the root's ``kernels`` the import of BertModel would fail."""
    code = (
        "import kernels, transformers.utils\n"
        "assert transformers.utils.is_kernels_available(), 'the stand-in is not recognised'\n"
        "from transformers import BertModel\n"
        "import bert_fused\n"
        "bert_fused.FusedBertIntermediate\n"
        "print(kernels.__file__)"
    )
    # Behind the working directory and ahead of site-packages, where an installed package would be found.
    out = run([sys.executable, "-c", code], PYTHONPATH=f"{ROOT}{os.pathsep}{hugging_face_kernels}")
    assert out == str(hugging_face_kernels / "kernels/__init__.py")


@pytest.mark.parametrize("missing", [["transformers"], ["triton", "rich"]])
def test_linear_act_needs_only_torch(missing: list[str]) -> None:
    code = (
        f"import importlib.util, sys\n"
        f"find = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda name, *a: None if name in {missing} else find(name, *a)\n"
        f"sys.modules.update(dict.fromkeys({missing}))\n"
        f"import torch, bert_fused\n"
        f"x = torch.ones(2, 4, requires_grad=True)\n"
        f"bert_fused.linear_act(x, torch.ones(3, 4)).sum().backward()\n"
        f"print(x.grad is not None, [m for m in ('transformers', 'rich') if sys.modules.get(m)])\n"
        f"try:\n"
        f"    bert_fused.fuse(torch.nn.Linear(2, 2))\n"
        f"except ModuleNotFoundError as error:\n"
        f"    print(error)"
    )
    needs = "bert_fused.fuse needs transformers, which is not installed: pip install 'bert-fused[hf]'"
    said = run([sys.executable, "-c", code]).split("\n")
    assert said == (["True []", needs] if missing == ["transformers"] else ["True []"])


def test_kernels_import_nothing_above_them() -> None:
    for path in (ROOT / "kernels").glob("*.py"):
        text = path.read_text()
        assert "bert_fused" not in text, path
        assert "from .." not in text, path


def build(kind: str, out: Path, source: Path = ROOT) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(out)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (built,) = out.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new virtual environment with the wheel in it.

    It finds everything else in this environment, but not this checkout, which an editable installation adds by a file
    of its own.
    """
    folder = tmp_path_factory.mktemp("installed")
    run([sys.executable, "-m", "venv", "--without-pip", folder])
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "beside.pth").write_text(sysconfig.get_path("purelib"))
    python = folder / "bin" / "python"
    run([sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel])
    return python


@pytest.mark.slow
def test_wheel_has_what_it_needs_and_no_kernels_of_its_own(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        entry_points = archive.read(f"bert_fused-{bert_fused.__version__}.dist-info/entry_points.txt").decode()
    assert not [name for name in names if not name.startswith(("bert_fused/", "bert_fused-"))]
    for name in ("kernels/linear_act.py", "kernels/tables/sm_90.json", "py.typed", "__main__.py"):
        assert f"bert_fused/{name}" in names
    assert "bert-fused = bert_fused.__main__:main" in entry_points


@pytest.mark.slow
def test_sdist_makes_the_same_wheel(wheel: Path, sdist: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    assert (source / "LICENSE").is_file()
    again = build("wheel", tmp_path / "dist", source)
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as second:
        assert {name: first.read(name) for name in first.namelist()} == {
            name: second.read(name) for name in second.namelist()
        }


@pytest.mark.slow
def test_version_comes_from_one_place(wheel: Path, sdist: Path) -> None:
    version = bert_fused.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert wheel.name.startswith(f"bert_fused-{version}-")
    assert sdist.name == f"bert_fused-{version}.tar.gz"
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"bert_fused-{version}.dist-info/METADATA").decode()
    assert f"\nVersion: {version}\n" in metadata
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == version
    written = [path for path in ROOT.glob("bert_fused/*.py") if f'"{version}"' in path.read_text()]
    assert written == [ROOT / "bert_fused/__init__.py"]
    assert f'"{version}"' not in (ROOT / "pyproject.toml").read_text()


@pytest.mark.slow
def test_wheel_works_in_a_clean_environment(installed: Path, tmp_path: Path) -> None:
    out = run([installed, ROOT / "tests/project/smoke.py"], cwd=tmp_path, TRITON_INTERPRET="1")
    assert json.loads(out)["bert_fused"] == bert_fused.__version__


USER_PROGRAM = """
import torch
from torch import Tensor, nn
import bert_fused
from bert_fused import FusedBertIntermediate, FuseReport, Verification

def speed_up(model: nn.Module, x: Tensor) -> str:
    report: FuseReport = bert_fused.fuse(model, unpad=True, cls_only="auto")
    verified: Verification = bert_fused.verify(model, x)
    with bert_fused.fused(model, recompute_preact=True) as again:
        names: tuple[str, ...] = again.fused
    y: Tensor = bert_fused.linear_act(x, torch.ones(3, 4), None, "gelu")
    pooled: Tensor = bert_fused.cls_pool(y, torch.ones(3, 3))
    bert_fused.unfuse(model)
    return f"{report} {verified.max_abs_error + verified.cosine} {names} {pooled} {FusedBertIntermediate}"

report = bert_fused.fuse("model")  # wrong
number: int = report.fused  # wrong
bert_fused.fuse(nn.Linear(1, 1), cls_only="always")  # wrong
bert_fused.linear_act(1, 2)  # wrong
"""


@pytest.mark.slow  # mypy reads all of torch
def test_mypy_finds_just_the_mistakes_of_a_users_program(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(USER_PROGRAM)
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(installed)]
    command += ["--config-file", "", "--cache-dir", str(tmp_path / "cache"), "program.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    found = {int(line) for line in re.findall(r"^program.py:(\d+): error", done.stdout, re.MULTILINE)}
    wrong = {number for number, line in enumerate(USER_PROGRAM.split("\n"), 1) if line.endswith("# wrong")}
    assert found == wrong, done.stdout
