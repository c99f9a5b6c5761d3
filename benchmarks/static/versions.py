"""Install other versions of transformers and Triton, each into a folder of its own, and run a command with each.

``versions`` runs the tests: those of Hugging Face's side on each transformers, those of kernels and launcher on each
Triton. ``matrix`` compiles every configuration shipped or offered to the tuner with each Triton. The pinned versions
stay where they are: a folder goes before them on PYTHONPATH. Folders are kept in ``.versions/``.
"""

import argparse
import importlib.metadata
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

from rich.console import Console
from rich.table import Table

from ..records import ROOT

FOLDER = ROOT / ".versions"
# Versions to test beside the pinned and the newest. pyproject.toml asks for at least the first of each. 5.17.0 and
# 3.6.0 are on a GPU machine of ours, and torch 2.14 comes with 3.8.
TESTED = {"transformers": ("5.14.0", "5.17.0"), "triton": ("3.6.0", "3.8.0")}
_HUB_1 = ("huggingface-hub==1.33.0", "httpx==0.28.1", "httpcore==1.0.9", "h11==0.16.0", "anyio==4.16.0")
# Packages that a version needs instead of the pinned ones.
BESIDE = {
    ("transformers", "5.14.0"): ("tokenizers==0.22.2", *_HUB_1),
    ("transformers", "5.17.0"): _HUB_1,
    ("triton", "3.6.0"): ("numpy<2.4",),  # its interpreter cannot read numpy 2.4's integers
}
TESTS = {
    "transformers": (
        "tests/hf/test_fuse.py",
        "tests/hf/test_fuse_options.py",
        "tests/hf/test_gated_models.py",
        "tests/hf/test_guards_calls.py",
        "tests/hf/test_guards_libraries.py",
        "tests/hf/test_guards_parts.py",
        "tests/hf/test_guards_weights.py",
        "tests/hf/test_modules.py",
        "tests/hf/test_projections.py",
        "tests/hf/test_verify.py",
        "tests/unpad/test_encoder.py",
        "tests/unpad/test_encoder_attention.py",
        "tests/unpad/test_encoder_callers.py",
        "tests/unpad/test_encoder_cls_only.py",
        "tests/unpad/test_encoder_hooks.py",
        "tests/unpad/test_encoder_life.py",
        "tests/unpad/test_encoder_masks.py",
        "tests/unpad/test_encoder_parts.py",
        "tests/unpad/test_encoder_report.py",
        "tests/unpad/test_next_transformers.py",
        "tests/cli/test_check.py",
        "tests/integration/test_sentence_transformers.py",
        "tests/integration/test_trainers.py",
    ),
    "triton": (
        "tests/kernel/test_activations.py",
        "tests/kernel/test_backward.py",
        "tests/kernel/test_forward.py",
        "tests/kernel/test_gated.py",
        "tests/kernel/test_interpreter.py",
        "tests/kernel/test_keys.py",
        "tests/kernel/test_launch.py",
        "tests/kernel/test_memory.py",
        "tests/ops/test_autograd.py",
        "tests/ops/test_compiled.py",
        "tests/ops/test_glu.py",
        "tests/ops/test_ops.py",
        "tests/ops/test_properties.py",
        "tests/ops/test_recompute.py",
        "tests/ptx/test_kernels.py",
        "tests/ptx/test_whole_path.py",
    ),
}


class NoVersion(Exception):
    """A version cannot be installed; the message says why."""


def pinned(package: str) -> str:
    return importlib.metadata.version(package)


def newest(package: str) -> str:
    """Return the newest version that pip would install; without a network, the newest that was installed before."""
    answer = _pip("index", "versions", package)
    found = re.match(rf"{package} \(([\d.]+)\)", answer.stdout)
    if found is not None:
        return found[1]
    kept = [path.name.removeprefix(f"{package}-") for path in FOLDER.glob(f"{package}-[0-9]*")]
    version = max([*kept, pinned(package)], key=_numbers)
    print(f"pip cannot say which {package} is the newest ({_last_line(answer)}): taking {version}", file=sys.stderr)
    return version


def named(package: str, names: str) -> list[str]:
    """Return the versions that ``oldest,pinned,newest`` or numbers stand for, each once.

    Raises:
        NoVersion: a name is neither of these.
    """
    known = {"oldest": lambda: TESTED[package][0], "pinned": lambda: pinned(package), "newest": lambda: newest(package)}
    versions = [known[name]() if name in known else name for name in names.split(",")]
    for version in versions:
        if not all(part.isdecimal() for part in version.split(".")):
            raise NoVersion(f"expected versions, or some of {', '.join(known)}; got {version!r}")
    return list(dict.fromkeys(versions))


def environment(package: str, version: str) -> dict[str, str]:
    """Return the environment of a process that imports a version of a package, and install the version if needed.

    Raises:
        NoVersion: pip cannot install it.
    """
    variables = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")}
    if version == pinned(package):
        return variables
    folder = FOLDER / f"{package}-{version}"
    if not folder.exists():
        FOLDER.mkdir(exist_ok=True)
        # Renamed when complete, so that an interrupted installation is not taken for a complete one.
        partial = tempfile.mkdtemp(dir=FOLDER)
        packages = (f"{package}=={version}", *BESIDE.get((package, version), ()))
        installed = _pip("install", "--quiet", "--no-deps", "--target", partial, *packages)
        if installed.returncode:
            shutil.rmtree(partial)
            raise NoVersion(f"pip cannot install {package} {version}: {_last_line(installed)}")
        os.rename(partial, folder)
    return variables | {"PYTHONPATH": str(folder)}


def _pip(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def _last_line(done: "subprocess.CompletedProcess[str]") -> str:
    return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}, no message"])[-1]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def readme_sentence() -> str:
    """Return the README's sentence about the versions that are tested."""
    tested = [sorted((*versions, pinned(package)), key=_numbers) for package, versions in TESTED.items()]
    lists = [f"{', '.join(versions)} and the newest" for versions in tested]
    torch = pinned("torch").partition("+")[0]
    return (
        f"CI tests with torch {torch} and transformers {lists[0]}, Triton {lists[1]} on the package index of the day "
        "(`make test-versions`)."
    )


def run_tests(package: str, version: str, arguments: list[str]) -> tuple[bool, str]:
    """Return whether the package's tests pass on a version, and pytest's closing line."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "auto", "--maxprocesses", "4", "-p", "no:cacheprovider"]
    variables = environment(package, version) | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, *TESTS[package], *arguments],
        cwd=ROOT,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    last = "no output"
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line.strip() or last
    return process.wait() == 0, last


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks versions", description=__doc__)
    for package, versions in TESTED.items():
        default = ",".join((*versions, "newest"))
        parser.add_argument(
            f"--{package}", default=default, help="versions, separated by commas, or none (default: %(default)s)"
        )
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, after --")
    arguments = parser.parse_args(argv)
    table = Table("package", "version", "result", "seconds")
    failed = 0
    try:
        for package in TESTED:
            names = getattr(arguments, package)
            for version in named(package, names) if names != "none" else []:
                start = time.monotonic()
                print(f"{package} {version}", flush=True)
                passed, closing = run_tests(package, version, arguments.pytest)
                failed += not passed
                table.add_row(package, version, closing, f"{time.monotonic() - start:.0f}")
    except NoVersion as error:
        print(f"python -m benchmarks versions: {error}", file=sys.stderr)
        return 2
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    return int(bool(failed))


def compile_all(arch: str, version: str) -> list[str]:
    """Return what ``python -m benchmarks sass`` finds wrong with an architecture's kernels under a Triton."""
    command = [sys.executable, "-m", "benchmarks", "sass", "--arch", arch]
    done = subprocess.run(command, cwd=ROOT, env=environment("triton", version), capture_output=True, text=True)
    broken = [line for line in done.stderr.splitlines() if line.startswith("budget broken:")]
    return broken or ([_last_line(done)] if done.returncode else [])


def matrix(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks matrix", description=__doc__)
    parser.add_argument(
        "--arch", default="80,86,89,90,100,120", help="compute capabilities, separated by commas (default: %(default)s)"
    )
    parser.add_argument(
        "--tritons", default="oldest,pinned,3.8.0,newest", help="versions, separated by commas (default: %(default)s)"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    arguments = parser.parse_args(argv)
    try:
        versions = named("triton", arguments.tritons)
        for version in versions:
            environment("triton", version)
    except NoVersion as error:
        print(f"python -m benchmarks matrix: {error}", file=sys.stderr)
        return 2
    pairs = list(itertools.product(arguments.arch.split(","), versions))
    failed = 0
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for (arch, version), broken in zip(pairs, pool.map(lambda pair: compile_all(*pair), pairs), strict=True):
            print(
                f"sm_{arch}, Triton {version}: {f'{len(broken)} broken' if broken else 'every limit kept'}", flush=True
            )
            print("".join(f"  {line}\n" for line in broken), end="")
            failed += bool(broken)
    return int(bool(failed))
