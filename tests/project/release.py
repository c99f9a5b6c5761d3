"""The wheel in a clean environment with the oldest and with the newest torch and Triton: ``make test-release``.

Environments are kept in ``.release/``; each is some 5 GB, since those of PyPI bring CUDA along. In each the wheel is
installed and ``smoke.py`` run in Triton's interpreter, away from the checkout.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".release"
# What pyproject.toml asks for at least; Triton 3.6's interpreter cannot read numpy 2.4's integers.
OLDEST = "2.11.0"
BESIDE = {"2.11.0": ("triton==3.6.0", "numpy<2.4")}


def pip(*arguments: str, python: str | Path = sys.executable) -> str:
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


def newest() -> str:
    """The newest torch that pip would install here."""
    found = re.match(r"torch \(([\d.]+)", pip("index", "versions", "torch"))
    assert found is not None
    return found[1]


def environment(torch: str) -> Path:
    """The Python of an environment that holds a version of torch with the Triton that it asks for."""
    folder = FOLDER / f"torch-{torch}"
    python = folder / "bin" / "python"
    done = folder / ".done"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pip("install", "--quiet", f"torch=={torch}", *BESIDE.get(torch, ("numpy",)), python=python)
        done.touch()
    return python


def smoke(python: Path, wheel: Path) -> int:
    """Install the wheel anew and run the smoke test; its exit status."""
    pip("install", "--quiet", f"{wheel}[hf]", python=python)
    pip("install", "--quiet", "--force-reinstall", "--no-deps", str(wheel), python=python)
    pip("check", python=python)
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as away:
        command = [str(python), str(ROOT / "tests/project/smoke.py")]
        return subprocess.run(command, cwd=away, env=variables | {"TRITON_INTERPRET": "1"}).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch", default="oldest,newest", help="versions of torch (default: %(default)s)")
    named = {"oldest": lambda: OLDEST, "newest": newest}
    versions = [named[name]() if name in named else name for name in parser.parse_args().torch.split(",")]
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        (wheel,) = Path(folder).glob("*.whl")
        for version in versions:
            print(f"torch {version}", flush=True)
            if smoke(environment(version), wheel):
                failed.append(version)
    for version in failed:
        print(f"failed with torch {version}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
