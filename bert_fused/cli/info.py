"""Show the versions, the device, and the path that serves each dtype and shape, with the reason."""

import argparse
import platform
from collections.abc import Sequence

import torch

from ..fallback import HAS_TRITON, KERNEL_DTYPES, MIN_ARCH, device_reason, interpreted
from ..kernels.configs import Entry
from ..kernels.lookup import choose, load_table, load_user_table, shipped_table, table_path
from ..ops import path_name
from ..tune.shapes import MODELS, Sizes, aligned, parse_shapes
from .common import Json, add_json, print_json, version

if HAS_TRITON:
    from ..kernels import plan
    from ..kernels.runtime import arch_of, name_of

HELP = "versions, device, and which path each dtype and shape takes"
EXAMPLES = """examples:
  %(prog)s
  %(prog)s --shapes 512x3072x768
  %(prog)s --arch 90 --shapes BERT-base --json
"""

ROWS = (1, 32, 512, 2048, 32768)
PACKAGES = ("bert-fused", "torch", "triton", "transformers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--arch", type=_parse_arch, help="show the choices for this compute capability, as 90, without a GPU"
    )
    parser.add_argument(
        "--shapes",
        nargs="?",
        type=parse_shapes,
        metavar="MxNxK,...",
        help=f"show the choices for these, or for all of a model ({', '.join(MODELS)})",
    )
    add_json(parser)
    parser.set_defaults(run=run)


def _parse_arch(text: str) -> int:
    if not (text.isdecimal() and int(text) >= MIN_ARCH):
        raise argparse.ArgumentTypeError(f"{text!r} is not a compute capability from {MIN_ARCH} on, as 80, 90 or 120")
    return int(text)


def run(arguments: argparse.Namespace) -> int:
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    reasons = {dtype: device_reason(device, dtype) for dtype in (*KERNEL_DTYPES, torch.float64)}
    arch, gpu = arguments.arch, ""
    dtypes: tuple[torch.dtype, ...] = KERNEL_DTYPES
    if arch is None:
        dtypes = tuple(dtype for dtype, reason in reasons.items() if reason is None)
        if dtypes:
            arch, gpu = arch_of(device), name_of(device)
    result: Json = {
        "versions": {package: version(package) for package in PACKAGES} | {"python": platform.python_version()},
        "device": _describe(device),
        "launches": _launches(),
        "paths": {_name(dtype): path_name(device, dtype) for dtype in reasons},
        "choices": None if arch is None else _choices(arch, gpu, dtypes, arguments.shapes),
    }
    if arguments.json:
        print_json(result)
        return 0
    for package, installed in result["versions"].items():
        print(f"{package:<13}{installed}")
    print(f"{'device':<13}{result['device']}")
    print(f"{'launches':<13}{result['launches']}\n")
    if arguments.arch is None:
        for name, path in result["paths"].items():
            print(f"{name:<10} {path}")
        print()
    if result["choices"] is None:
        print("To see what a GPU would choose: python -m bert_fused info --arch 90")
    else:
        _print_choices(result["choices"])
    return 0


def _launches() -> str:
    """Say how the installed Triton launches kernels."""
    if not HAS_TRITON:
        return "none: Triton is not installed"
    return "Triton's C launcher directly" if plan.LAUNCHER_IS_KNOWN else plan.SLOW_LAUNCHES


def _choices(arch: int, device: str, dtypes: tuple[torch.dtype, ...], shapes: Sequence[Sizes] | None = None) -> Json:
    """Return the configuration of each shape on a GPU of this architecture and name, as JSON's types."""
    rows = []
    for dtype in dtypes:
        name = _name(dtype)
        if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
            name = "tf32"
        for M, N, K in shapes or [(M, N, K) for K, N in MODELS.values() for M in ROWS]:
            config, why = choose(M, N, K, name, arch, aligned=aligned(N, K, name), device=device)
            because = _reason(why, M, arch, device)
            rows.append({"dtype": name, "M": M, "N": N, "K": K, "choice": str(config), "because": because})
    return {
        "arch": arch,
        "table": "its table" if load_table(arch) else "no table: computed defaults",
        "measured_table": str(table_path(arch, device)) if load_user_table(arch, device) else None,
        "rows": rows,
    }


def _print_choices(choices: Json) -> None:
    print(f"sm_{choices['arch']}, {choices['table']}; tensors on 16-byte boundaries where their sizes allow")
    if choices["measured_table"] is not None:
        print(f"measured on this machine: {choices['measured_table']}")
    print(f"{'dtype':<10}{'M':>6}{'N':>6}{'K':>6}  {'choice':<46}because")
    for row in choices["rows"]:
        sizes = f"{row['M']:>6}{row['N']:>6}{row['K']:>6}"
        print(f"{row['dtype']:<10}{sizes}  {row['choice']:<46}{row['because']}")


def _reason(why: Entry | str, M: int, arch: int, device: str) -> str:
    if isinstance(why, str):
        return why
    nearest = "" if why.m == M else f", nearest to M = {why.m}"
    if why.measured is None:
        return f"shipped table ({shipped_table(arch)['source'].partition(':')[0]}){nearest}"
    m = why.measured
    where = "here" if why in load_user_table(arch, device) else "for the shipped table"
    return f"measured {where} on {m.date}: {m.us:g} us, cuBLAS + pass {m.library_us:g}, eager {m.eager_us:g}{nearest}"


def _describe(device: torch.device) -> str:
    if device.type == "cpu":
        return "no NVIDIA GPU" + (", kernels run in Triton's interpreter" if interpreted() else "")
    properties = torch.cuda.get_device_properties(device)
    arch = f"sm_{properties.major}{properties.minor}"
    memory = properties.total_memory / 2**30
    return f"{properties.name}, {arch}, {properties.multi_processor_count} SMs, {memory:.0f} GiB"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
