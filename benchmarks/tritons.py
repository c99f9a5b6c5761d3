"""The interpreter's tests on the oldest and the newest Triton, each installed into a folder of its own.

The pinned Triton stays where it is: a folder goes before it on PYTHONPATH. Its folder is kept in ``.tritons/``.
"""

import argparse
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile

from .records import ROOT

FOLDER = ROOT / ".tritons"
# pyproject.toml asks for at least this one.
OLDEST = "3.6.0"
# Its interpreter cannot read numpy 2.4's integers.
BESIDE = {"3.6.0": ("numpy<2.4",)}
# The tests whose kernels the interpreter runs. The others are about launching and compiling, or run no kernel.
TESTS = ("forward", "backward", "variants", "properties", "interpreter", "ops", "recompute", "memory", "activations")


class NoTriton(Exception):
    """A version of Triton cannot be installed; the message says why."""


def pinned() -> str:
    return importlib.metadata.version("triton")


def newest() -> str:
    """The newest version that pip would install here; without a network, the newest that was installed before."""
    answer = _pip("index", "versions", "triton")
    found = re.match(r"triton \(([\d.]+)\)", answer.stdout)
    if found is not None:
        return found[1]
    kept = sorted((tuple(map(int, path.name.split("."))) for path in FOLDER.glob("[0-9]*")), reverse=True)
    if not kept:
        raise NoTriton(f"pip cannot say which Triton is the newest: {_last_line(answer.stderr)}")
    version = ".".join(map(str, kept[0]))
    print(f"pip cannot say which Triton is the newest; taking {version}, installed before", file=sys.stderr)
    return version


def named(names: str) -> list[str]:
    """Versions from ``oldest,pinned,newest`` or numbers, each once.

    Raises:
        NoTriton: one is named that no package index could have, or pip cannot tell the newest.
    """
    known = {"oldest": lambda: OLDEST, "pinned": pinned, "newest": newest}
    versions = [known[name]() if name in known else name for name in names.split(",")]
    for version in versions:
        if not all(part.isdecimal() for part in version.split(".")):
            raise NoTriton(f"expected versions, or some of {', '.join(known)}; got {version!r}")
    return list(dict.fromkeys(versions))


def environment(version: str) -> dict[str, str]:
    """The environment of a process that imports a version of Triton, which is installed if it has to be.

    Raises:
        NoTriton: pip cannot install it.
    """
    variables = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")}
    if version == pinned():
        return variables
    folder = FOLDER / version
    if not folder.exists():
        FOLDER.mkdir(exist_ok=True)
        # Renamed when complete, so that an installation that was cut off is not taken for one.
        partial = tempfile.mkdtemp(dir=FOLDER)
        packages = (f"triton=={version}", *BESIDE.get(version, ()))
        installed = _pip("install", "--quiet", "--no-deps", "--target", partial, *packages)
        if installed.returncode:
            shutil.rmtree(partial)
            raise NoTriton(f"pip cannot install Triton {version}: {_last_line(installed.stderr)}")
        os.rename(partial, folder)
    return variables | {"PYTHONPATH": str(folder)}


def _pip(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it says nothing"])[-1]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks tritons", description=__doc__)
    parser.add_argument(
        "--tritons", default="oldest,newest", help="versions, separated by commas (default: %(default)s)"
    )
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, after --")
    arguments = parser.parse_args(argv)
    tests = [str(path) for name in TESTS if (path := ROOT / f"tests/test_{name}.py").exists()]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, *arguments.pytest]
    failed = []
    try:
        for version in named(arguments.tritons):
            variables = environment(version) | {"OMP_NUM_THREADS": "1"}
            print(f"Triton {version}", flush=True)
            if subprocess.run(command, cwd=ROOT, env=variables).returncode:
                failed.append(version)
    except NoTriton as error:
        print(f"python -m benchmarks tritons: {error}", file=sys.stderr)
        return 2
    for version in failed:
        print(f"failed on Triton {version}", file=sys.stderr)
    return int(bool(failed))
