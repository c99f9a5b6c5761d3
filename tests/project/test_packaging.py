"""The name ``kernels`` is Hugging Face's, the wheel is ours, and ``import bert_fused`` needs neither of its friends."""

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


def python(code: str, *, path: Path | None = None, cwd: Path = ROOT) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if path is not None:
        # Behind the working directory and ahead of site-packages, where an installed package would be found.
        environment["PYTHONPATH"] = f"{cwd}{os.pathsep}{path}"
    run = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.fixture
def hugging_face_kernels(tmp_path: Path) -> Path:
    """What transformers imports from a ``kernels`` package of the range it accepts."""
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
    out = python(
        "import kernels, transformers.utils\n"
        "assert transformers.utils.is_kernels_available(), 'the stand-in is not recognised'\n"
        "from transformers import BertModel\n"
        "import bert_fused\n"
        "bert_fused.FusedBertIntermediate\n"
        "print(kernels.__file__)",
        path=hugging_face_kernels,
    )
    assert out == str(hugging_face_kernels / "kernels/__init__.py")


def test_a_package_file_would_break_transformers(hugging_face_kernels: Path, tmp_path: Path) -> None:
    """The danger is real: with an ``__init__.py`` in the working directory's ``kernels`` the import dies."""
    root = tmp_path / "checkout"
    (root / "kernels").mkdir(parents=True)
    (root / "kernels/__init__.py").touch()
    with pytest.raises(AssertionError, match="ImportError: cannot import name"):
        python("from transformers import BertModel", path=hugging_face_kernels, cwd=root)


@pytest.mark.parametrize("missing", ["transformers", "triton", "rich"])
def test_import_without(missing: str) -> None:
    out = python(
        f"import importlib.util, sys\n"
        f"find = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda name, *a: None if name == {missing!r} else find(name, *a)\n"
        f"sys.modules[{missing!r}] = None\n"
        f"import torch, bert_fused\n"
        f"x = torch.ones(2, 4, requires_grad=True)\n"
        f"bert_fused.linear_act(x, torch.ones(3, 4)).sum().backward()\n"
        f"print(x.grad is not None)\n"
        f"try:\n"
        f"    bert_fused.fuse(torch.nn.Linear(2, 2))\n"
        f"except ModuleNotFoundError as error:\n"
        f"    print(error)"
    )
    needs = "bert_fused.fuse needs transformers, which is not installed: pip install 'bert-fused[hf]'"
    assert out.split("\n") == (["True", needs] if missing == "transformers" else ["True"])


def test_import_is_light() -> None:
    assert python("import sys, bert_fused; print([m for m in ('transformers', 'rich') if m in sys.modules])") == "[]"


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


def clean_environment(folder: Path) -> Path:
    """The Python of a new virtual environment, which finds in this one whatever it does not have itself.

    It does not find this checkout, which an editable installation adds by a file of its own.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "beside.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "bin" / "python"


def install(python: Path, package: Path) -> None:
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    done = subprocess.run([*command, "--no-build-isolation", str(package)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    python = clean_environment(tmp_path_factory.mktemp("installed"))
    install(python, wheel)
    return python


def outside(python: Path, *arguments: str, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(python), *arguments], cwd=cwd, env=environment | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_wheel_has_what_it_needs_and_no_kernels_of_its_own(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        entry_points = archive.read(f"bert_fused-{bert_fused.__version__}.dist-info/entry_points.txt").decode()
    assert not [name for name in names if not name.startswith(("bert_fused/", "bert_fused-"))]
    for name in ("kernels/linear_act.py", "kernels/tables/sm_90.json", "py.typed", "__main__.py"):
        assert f"bert_fused/{name}" in names
    assert "bert-fused = bert_fused.__main__:main" in entry_points


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


def test_wheel_works_in_a_clean_environment(installed: Path, tmp_path: Path) -> None:
    out = outside(installed, str(ROOT / "tests/project/smoke.py"), cwd=tmp_path)
    assert json.loads(out)["bert_fused"] == bert_fused.__version__


def test_sdist_installs_in_a_clean_environment(sdist: Path, tmp_path: Path) -> None:
    python = clean_environment(tmp_path / "venv")
    install(python, sdist)
    assert outside(python.parent / "bert-fused", "--version", cwd=tmp_path) == f"{bert_fused.__version__}\n"


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
"""
MISTAKES = """
import bert_fused
report = bert_fused.fuse("model")
wrong: int = report.fused
bert_fused.fuse(report, cls_only="always")
bert_fused.linear_act(1, 2)
"""


@pytest.mark.slow  # mypy reads all of torch
def test_types_of_the_installed_package(installed: Path, tmp_path: Path) -> None:
    """mypy --strict accepts a user's program, and finds mistakes in another one."""
    (tmp_path / "good.py").write_text(USER_PROGRAM)
    (tmp_path / "bad.py").write_text(MISTAKES)
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(installed)]
    command += ["--config-file", "", "--cache-dir", str(tmp_path / "cache")]
    good = subprocess.run([*command, "good.py"], cwd=tmp_path, capture_output=True, text=True)
    assert good.returncode == 0, good.stdout
    assert "Success" in good.stdout
    bad = subprocess.run([*command, "bad.py"], cwd=tmp_path, capture_output=True, text=True)
    assert {int(line) for line in re.findall(r"^bad.py:(\d): error", bad.stdout, re.MULTILINE)} == {3, 4, 5, 6}
