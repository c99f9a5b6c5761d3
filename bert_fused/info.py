"""Versions, device, and which path serves which dtype and shape, with the reason."""

import argparse
import importlib.metadata
import platform
import sys
from collections.abc import Sequence

import torch

from .dispatch import KERNEL_DTYPES, device_reason, interpreted
from .kernels import user_tables
from .kernels.configs import Entry, choose, load_table, load_user_table, shipped_table
from .shapes import MODELS, Sizes, aligned, parse_shapes

HELP = "versions, device, and which path each dtype and shape takes"

ROWS = (1, 32, 512, 2048, 32768)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", type=int, help="show the choices for this compute capability, as 90, without a GPU")
    parser.add_argument(
        "--shapes",
        nargs="?",
        type=parse_shapes,
        metavar="MxNxK,...",
        help=f"show the choices for these, or for all of a model ({', '.join(MODELS)})",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    for package in ("bert-fused", "torch", "triton", "transformers"):
        print(f"{package:<13}{_version(package)}")
    print(f"{'python':<13}{platform.python_version()}")
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    print(f"{'device':<13}{_describe(device)}\n")
    if arguments.arch is not None:
        _print_choices(arguments.arch, "", KERNEL_DTYPES, arguments.shapes)
        return 0
    served = []
    for dtype in (*KERNEL_DTYPES, torch.float64):
        reason = device_reason(device, dtype)
        print(f"{_name(dtype):<10} " + ("Triton" if reason is None else f"PyTorch: {reason}"))
        if reason is None:
            served.append(dtype)
    if served:
        print()
        from .kernels.runtime import arch_of, name_of

        _print_choices(arch_of(device), name_of(device), tuple(served), arguments.shapes)
    else:
        print("\nWhat a GPU would choose: python -m bert_fused info --arch 90")
    return 0


def _print_choices(
    arch: int, device: str, dtypes: tuple[torch.dtype, ...], shapes: Sequence[Sizes] | None = None
) -> None:
    origin = "its table" if load_table(arch) else "no table: computed defaults"
    print(f"sm_{arch}, {origin}; tensors on 16-byte boundaries where their sizes allow")
    if load_user_table(arch, device):
        print(f"measured on this machine: {user_tables.table_path(arch, device)}")
    print(f"{'dtype':<10}{'M':>6}{'N':>6}{'K':>6}  {'choice':<46}because")
    shapes = shapes or [(M, N, K) for K, N in MODELS.values() for M in ROWS]
    for dtype in dtypes:
        name = _name(dtype)
        if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
            name = "tf32"
        for M, N, K in shapes:
            config, why = choose(M, N, K, name, arch, aligned=aligned(N, K, name), device=device)
            print(f"{name:<10}{M:>6}{N:>6}{K:>6}  {config!s:<46}{_reason(why, M, arch, device)}")


def _reason(why: Entry | str, M: int, arch: int, device: str) -> str:
    if isinstance(why, str):
        return why
    nearest = "" if why.m == M else f", nearest to M = {why.m}"
    if why.measured is None:
        return f"shipped table ({shipped_table(arch)['source'].partition(':')[0]}){nearest}"
    m = why.measured
    where = "here" if why in load_user_table(arch, device) else "for the shipped table"
    return f"measured {where} on {m.date}: {m.us:g} us, cuBLAS + pass {m.library_us:g}, eager {m.eager_us:g}{nearest}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        pass
    # Run from a checkout, or from a system whose package has another name.
    module = sys.modules.get(package.replace("-", "_"))
    return str(getattr(module, "__version__", "not installed"))


def _describe(device: torch.device) -> str:
    if device.type == "cpu":
        return "no NVIDIA GPU" + (", kernels run in Triton's interpreter" if interpreted() else "")
    properties = torch.cuda.get_device_properties(device)
    arch = f"sm_{properties.major}{properties.minor}"
    memory = properties.total_memory / 2**30
    return f"{properties.name}, {arch}, {properties.multi_processor_count} SMs, {memory:.0f} GiB"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
