"""The wheel in clean environments with the oldest and with the newest torch and Triton: ``make test-release``.

The environments are kept in ``.release/``; each is some 5 GB, since torch from PyPI brings CUDA along. In each the
wheel is installed and ``smoke.py`` runs in Triton's interpreter, away from the checkout.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
# The least that pyproject.toml asks for; Triton 3.6's interpreter cannot read numpy 2.4's integers.
OLDEST = ("torch==2.11.0", "triton==3.6.0", "numpy<2.4")


def run(*command: str | Path) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stderr}")


def environment(version: str) -> Path:
    """Return the Python of an environment with this torch ("oldest", "newest" or a number) and the Triton it needs."""
    folder = ROOT / ".release" / f"torch-{version}"
    python = folder / "bin" / "python"
    if not python.exists():
        run(sys.executable, "-m", "venv", folder)
    wanted = {"oldest": OLDEST, "newest": ("torch", "numpy")}.get(version, (f"torch=={version}", "numpy"))
    run(python, "-m", "pip", "install", "--quiet", "--upgrade", *wanted)
    return python


def passes(python: Path, wheel: Path) -> bool:
    """Install the wheel anew, run the smoke test and return whether it passed."""
    run(python, "-m", "pip", "install", "--quiet", f"{wheel}[hf]")
    run(python, "-m", "pip", "install", "--quiet", "--force-reinstall", "--no-deps", wheel)
    run(python, "-m", "pip", "check")
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as away:
        command = [python, ROOT / "tests/project/smoke.py"]
        return subprocess.run(command, cwd=away, env=variables | {"TRITON_INTERPRET": "1"}).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch", default="oldest,newest", help="versions of torch (default: %(default)s)")
    versions = parser.parse_args().torch.split(",")
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder)
        (wheel,) = Path(folder).glob("*.whl")
        failed = [version for version in versions if not passes(environment(version), wheel)]
    print(f"failed with torch {', '.join(failed)}" if failed else f"passed with torch {', '.join(versions)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
