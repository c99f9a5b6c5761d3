"""How far results are from fp64, ours and eager's, for every dtype, activation and K: writes ``docs/numerics.md``.

``PYTHONPATH=. python tests/support/numerics.py`` measures on the GPU if there is one, into a page of its own, else in
Triton's interpreter. Same inputs and versions, same page. Exits with 1 if an error is larger than promised.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch

if __name__ == "__main__" and not torch.cuda.is_available():
    # Triton reads this when a kernel is decorated.
    os.environ["TRITON_INTERPRET"] = "1"

import numpy
import triton
from numerics_page import Errors, Row, broken, page
from reference64 import (
    ACTIVATIONS,
    DTYPES,
    RMS_GRAD_FP32,
    RMS_GRAD_RATIO,
    act64,
    act_grad64,
    dtype_name,
    forward_bound,
    generator,
    grad_bound,
    linear64,
    make_inputs,
    rms,
    saved_grad64,
)
from torch import Tensor

from bert_fused import fallback, ops
from bert_fused.kernels import lookup
from bert_fused.kernels.configs import Config
from bert_fused.kernels.elementwise import act_bwd
from bert_fused.kernels.runtime import INTERPRETED
from bert_fused.reference import GRAD_FROM_OUTPUT, act_grad
from bert_fused.reference import linear_act as eager

DOCS = Path(__file__).resolve().parents[2] / "docs"
KS = (384, 768, 1024, 3072, 4096)
# No multiple of a tile; rows of 16 bytes, or a GPU would leave the product to cuBLAS.
SHAPE = (67, 136) if INTERPRETED else (2051, 1032)
# What errors are given in: half the distance of neighbouring numbers, relative.
UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}

Function = Callable[[Tensor, Tensor, Tensor, str], Tensor]


def measure(dtype: torch.dtype, activation: str, K: int, function: Function = ops.linear_act) -> list[Row]:
    """The result and the gradients of ``function(x, weight, bias, activation)``, each against fp64."""
    device = "cpu" if INTERPRETED else "cuda"
    inputs = make_inputs("unit", *SHAPE, K, dtype, seed=K)
    assert inputs.bias is not None
    x, weight, bias = (t.to(device) for t in (inputs.x, inputs.weight, inputs.bias))
    d_out = torch.randn(SHAPE, generator=generator(K + 1)).to(device, dtype)

    preact = linear64(x, weight, bias)
    exact = {"out": act64(preact, activation)}
    d_preact = d_out.double() * act_grad64(preact, activation)
    exact |= {"d_x": d_preact @ weight.double(), "d_weight": d_preact.t() @ x.double(), "d_bias": d_preact.sum(0)}
    ours, theirs = (_run(f, (x, weight, bias), activation, d_out) for f in (function, eager))
    tanh = _run(function, (x, weight, bias), "gelu_tanh", d_out) if activation == "gelu" else {}

    if activation != "none":
        saved = eager(x, weight, bias, activation if activation in GRAD_FROM_OUTPUT else "none")
        exact["d_preact"] = d_out.double() * saved_grad64(saved, activation)
        ours["d_preact"] = act_bwd(d_out, saved, activation=activation, bias_grad=False)[0]
        theirs["d_preact"] = act_grad(d_out, saved, activation)
        if tanh:
            tanh["d_preact"] = act_bwd(d_out, saved, activation="gelu_tanh", bias_grad=False)[0]

    bounds = {"out": forward_bound(exact["out"], x, weight, bias, activation)}
    if "d_preact" in exact:
        bounds["d_preact"] = grad_bound(exact["d_preact"], d_out, activation)

    def errors(actual: dict[str, Tensor], tensor: str) -> Errors:
        ref = exact[tensor]
        error, eager_error = (t[tensor].double() - ref for t in (actual, theirs))
        if tensor in bounds:
            share = float((error.abs() / bounds[tensor]).max())
        else:
            share = rms(error) / (
                RMS_GRAD_FP32 * rms(ref) if dtype == torch.float32 else RMS_GRAD_RATIO * rms(eager_error)
            )
        unit = UNIT[dtype] * rms(ref)
        return Errors(float(error.abs().max()) / unit, rms(error) / unit, share)

    return [
        Row(dtype, activation, K, tensor, *(errors(found, tensor) for found in (ours, theirs, tanh) if found))
        for tensor in exact
    ]


def _run(function: Function, tensors: tuple[Tensor, ...], activation: str, d_out: Tensor) -> dict[str, Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    out = function(*leaves, activation)  # type: ignore[call-arg, arg-type]
    out.backward(d_out)
    return dict(zip(("out", "d_x", "d_weight", "d_bias"), (out.detach(), *(leaf.grad for leaf in leaves)), strict=True))


def large_tiles(M: int, dtype: str, arch: int) -> Config:
    """Four tiles cover the output: the interpreter pays for each step of each tile, whatever its size."""
    return Config("pointer", dtype, 64, 128, 128, num_warps=1, num_stages=1)


def cases() -> Iterator[tuple[torch.dtype, str, int]]:
    for dtype in DTYPES:
        for activation in ACTIVATIONS:
            for K in KS:
                yield dtype, activation, K


def place() -> tuple[Path, str]:
    """The page's path, and the sentence that says where and with what its numbers were measured."""
    versions = f"torch {torch.__version__}, Triton {triton.__version__}, NumPy {numpy.__version__}"
    if INTERPRETED:
        return DOCS / "numerics.md", (
            f"**Measured in Triton's interpreter on a CPU** ({versions}), with its\n"
            "bf16 repaired as in the tests. The kernels' formulas are what a GPU would run, but three things differ\n"
            "there: the order in which a tile's products are added, exponentials (approximate to 2 ulp), and eager,\n"
            "which here is PyTorch's CPU code. No number below was measured on a GPU."
        )
    name = torch.cuda.get_device_name()
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return DOCS / f"numerics-{slug}.md", f"**Measured on one {name}** ({versions})."


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python tests/support/numerics.py", description=__doc__)
    path, where = place()
    parser.add_argument("--out", type=Path, default=path, metavar="FILE.md", help="default: %(default)s")
    arguments = parser.parse_args(argv)
    rows: list[Row] = []
    for dtype, activation, K in cases():
        rows += measure(dtype, activation, K)
        print(f"\r{dtype_name(dtype)} {activation} K={K}".ljust(40), end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    arguments.out.write_text(page(rows, SHAPE, where))
    print(f"{len(rows)} tensors measured, written to {arguments.out}")
    faults = [fault for row in rows for fault in broken(row)]
    print("\n".join(f"broken promise: {fault}" for fault in faults), file=sys.stderr)
    return int(bool(faults))


def prepared() -> AbstractContextManager[Any]:
    """The interpreter as the tests have it, and with large tiles; on a GPU nothing."""
    if not INTERPRETED:
        return nullcontext()
    import interpreter

    interpreter.install()
    fallback.INTERPRETER_DTYPES = fallback.KERNEL_DTYPES
    torch.set_num_threads(1)
    return mock.patch.object(lookup, "default_config", large_tiles)


if __name__ == "__main__":
    with prepared():
        sys.exit(main(sys.argv[1:]))
