"""Versions, device, and which path serves which dtype and shape, with the reason."""

import argparse
import importlib.metadata
import platform
import sys

import torch

from .dispatch import KERNEL_DTYPES, device_reason, interpreted
from .kernels.configs import get_config, load_table

HELP = "versions, device, and which path each dtype and shape takes"

# BertIntermediate's K and N; the pooler's N is its K.
MODELS = {"MiniLM": (384, 1536), "BERT-base": (768, 3072), "BERT-large": (1024, 4096)}
ROWS = (1, 32, 512, 2048, 32768)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", type=int, help="show the choices for this compute capability, as 90, without a GPU")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    for package in ("bert-fused", "torch", "triton", "transformers"):
        print(f"{package:<13}{_version(package)}")
    print(f"{'python':<13}{platform.python_version()}")
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    print(f"{'device':<13}{_describe(device)}\n")
    if arguments.arch is not None:
        _print_choices(arguments.arch, KERNEL_DTYPES)
        return 0
    served = []
    for dtype in (*KERNEL_DTYPES, torch.float64):
        reason = device_reason(device, dtype)
        print(f"{_name(dtype):<10} " + ("Triton" if reason is None else f"PyTorch: {reason}"))
        if reason is None:
            served.append(dtype)
    if served:
        print()
        from .kernels.runtime import arch_of

        _print_choices(arch_of(device), tuple(served))
    else:
        print("\nWhat a GPU would choose: python -m bert_fused info --arch 90")
    return 0


def _print_choices(arch: int, dtypes: tuple[torch.dtype, ...]) -> None:
    origin = "its table" if load_table(arch) else "no table: computed defaults"
    print(f"sm_{arch}, {origin}; tensors on 16-byte boundaries")
    print(f"{'dtype':<10}{'model':<11}{'K':>5}{'N':>6}  {'rows':>6}  choice")
    for dtype in dtypes:
        name = _name(dtype)
        if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
            name = "tf32"
        for model, (K, N) in MODELS.items():
            for M in ROWS:
                config = get_config(M, N, K, name, arch, aligned=True)
                reason = " (IEEE fp32 has no tensor cores)" if config.kernel == "library" and name == "float32" else ""
                print(f"{name:<10}{model:<11}{K:>5}{N:>6}  {M:>6}  {config}{reason}")


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
