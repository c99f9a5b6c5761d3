"""The fused blocks in Hugging Face's Kernel Hub layout: ``python examples/kernel_hub/build.py FOLDER`` writes
``FOLDER/build``.

The files are copied from this package; they import each other relatively. Operators get a name of their own, so that
one process can load these layers and an installed bert_fused. The Hub's own package is not needed here.
"""

import argparse
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
PACKAGE = HERE.parent.parent / "bert_fused"
COPIED = ("autograd.py", "fallback.py", "guards.py", "onednn.py", "ops.py", "reference.py")
INIT = '''"""BERT's dense blocks as single Triton kernels, for Hugging Face's kernelize. Made by bert_fused."""

from . import layers
from .ops import cls_pool, linear_act

__all__ = ["cls_pool", "layers", "linear_act"]
'''


def build(folder: Path, backends: tuple[str, ...] = ("cuda",)) -> list[Path]:
    """Write one variant for each backend, replacing its folder; return the folders."""
    files = {"__init__.py": INIT, "layers.py": (HERE / "layers.py").read_text()}
    files |= {name: (PACKAGE / name).read_text() for name in COPIED}
    for path in sorted((PACKAGE / "kernels").rglob("*")):
        if path.suffix in (".py", ".json"):
            files[path.relative_to(PACKAGE).as_posix()] = path.read_text()
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:12]
    variants = []
    for backend in backends:
        # Names the module and its operators, one name for each content and backend.
        identity = f"bert_fused_{backend}_{digest}"
        variant = folder / "build" / f"torch-{backend}"
        shutil.rmtree(variant, ignore_errors=True)
        for name, text in files.items():
            path = variant / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(re.sub(r"\bbert_fused\b", identity, text) if name == "autograd.py" else text)
        metadata = {"id": identity, "name": "bert-fused", "version": 1, "license": "Apache-2.0", "python-depends": []}
        metadata["backend"] = {"type": backend}
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
        (variant / "py.typed").touch()
        variants.append(variant)
    return variants


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python examples/kernel_hub/build.py", description=__doc__)
    parser.add_argument("folder", type=Path, help="where to write the repository")
    parser.add_argument("--backends", nargs="+", choices=("cuda", "cpu"), default=["cuda"], help="default cuda")
    arguments = parser.parse_args(argv)
    for variant in build(arguments.folder, tuple(arguments.backends)):
        print(variant)
    return 0


if __name__ == "__main__":
    sys.exit(main())
