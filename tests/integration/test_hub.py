"""The Kernel Hub's layout, built from the same kernels, used by Hugging Face's own package."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from examples.kernel_hub import build as hub

ROOT = Path(__file__).parents[2]


def test_hub_build_writes_the_layout_of_the_kernel_hub(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert hub.main([str(tmp_path)]) == 0
    variant = tmp_path / "build/torch-cuda"
    assert capsys.readouterr().out == f"{variant}\n"
    assert [path.name for path in (tmp_path / "build").iterdir()] == ["torch-cuda"]
    for name in ("__init__.py", "layers.py", "metadata.json", "kernels/linear_act.py", "kernels/tables/sm_90.json"):
        assert (variant / name).is_file()
    metadata = json.loads((variant / "metadata.json").read_text())
    assert metadata["python-depends"] == []
    assert metadata["backend"] == {"type": "cuda"}
    assert f'Library("{metadata["id"]}"' in (variant / "autograd.py").read_text()
    for path in variant.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                named = [node.module or ""]
            assert not [name for name in named if name.partition(".")[0] in ("bert_fused", "kernels", "transformers")]
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
                home = path.parent / node.module.replace(".", "/")
                assert home.with_suffix(".py").is_file() or home.is_dir(), f"{path.name} imports {node.module}"


def test_building_the_hub_layout_again_gives_the_same_files(tmp_path: Path) -> None:
    (variant,) = hub.build(tmp_path)
    first = {path: path.read_bytes() for path in variant.rglob("*") if path.is_file()}
    (variant / "stale.py").touch()
    hub.build(tmp_path)
    assert {path: path.read_bytes() for path in variant.rglob("*") if path.is_file()} == first


@pytest.mark.parametrize("company", ["alone", "beside"])
def test_kernelize_uses_the_built_layers(company: str, tmp_path: Path) -> None:
    """In a process of its own, since ``kernelize`` marks transformers' classes."""
    hub.build(tmp_path, ("cuda", "cpu"))
    # The checkout comes first, and with it the folder kernels/, which must not be taken for Hugging Face's package.
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    command = [sys.executable, str(ROOT / "tests/integration/hub_child.py"), str(tmp_path), company]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
