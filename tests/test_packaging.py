"""The name ``kernels`` is Hugging Face's, the wheel is ours, and ``import bert_fused`` needs neither of its friends."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


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
        f"report = bert_fused.fuse(torch.nn.Linear(2, 2))\n"
        f"print(x.grad is not None, report.skipped[''])"
    )
    assert out.startswith("True")
    assert ("transformers is not installed" in out) == (missing == "transformers")


def test_import_is_light() -> None:
    assert python("import sys, bert_fused; print([m for m in ('transformers', 'rich') if m in sys.modules])") == "[]"


def test_kernels_import_nothing_above_them() -> None:
    for path in (ROOT / "kernels").glob("*.py"):
        text = path.read_text()
        assert "bert_fused" not in text, path
        assert "from .." not in text, path


def test_wheel(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert not [name for name in names if name.startswith("kernels/")]
    for name in ("kernels/linear_act.py", "kernels/tables/sm_90.json", "py.typed", "__main__.py"):
        assert f"bert_fused/{name}" in names
    out = python(
        "import sys; sys.path.insert(0, 'site'); import bert_fused, bert_fused.kernels.configs as c; "
        "print(bert_fused.__file__); print(len(c.load_table(90)))",
        cwd=tmp_path,
    )
    location, entries = out.splitlines()
    assert location.startswith(str(tmp_path / "site"))
    assert int(entries) > 0
