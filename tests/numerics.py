"""How far results are from fp64, ours and eager's, for every dtype, activation and K: writes ``docs/numerics.md``.

``PYTHONPATH=. python tests/numerics.py`` measures on the GPU if there is one, into a page of its own, else in Triton's
interpreter. Same inputs and versions, same page. Exits with 1 if an error is larger than docs/design.md promises.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

if __name__ == "__main__" and not torch.cuda.is_available():
    # Triton reads this when a kernel is decorated.
    os.environ["TRITON_INTERPRET"] = "1"

import numpy
import triton
from checks import (
    ACTIVATIONS,
    DTYPES,
    EAGER_RATIO,
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

from bert_fused import dispatch, ops
from bert_fused.kernels import configs
from bert_fused.kernels.act_grad import act_bwd
from bert_fused.kernels.configs import Config
from bert_fused.kernels.runtime import INTERPRETED
from bert_fused.reference import GRAD_FROM_OUTPUT, act, act_grad
from bert_fused.reference import linear_act as eager

DOCS = Path(__file__).resolve().parent.parent / "docs"
KS = (384, 768, 1024, 3072, 4096)
# No multiple of a tile; rows of 16 bytes, or a GPU would leave the product to cuBLAS.
SHAPE = (67, 136) if INTERPRETED else (2051, 1032)
# What errors are given in: half the distance of neighbouring numbers, relative.
UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
GRADIENTS = ("d_preact", "d_x", "d_weight", "d_bias")

Function = Callable[[Tensor, Tensor, Tensor, str], Tensor]


@dataclass(frozen=True)
class Errors:
    """Largest and RMS error of a tensor, as multiples of u times the RMS of the exact one."""

    max: float
    rms: float


@dataclass(frozen=True)
class Row:
    """What one tensor of one case is off by. ``share``: how much of the promised error ours uses, at its worst element
    (out, d_preact) or as RMS (the other gradients). ``tanh``: the tanh form, fused, where erf GELU is asked for."""

    dtype: torch.dtype
    activation: str
    K: int
    tensor: str
    ours: Errors
    eager: Errors
    share: float
    tanh: Errors | None = None


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
    rows = []
    for tensor, ref in exact.items():
        error = ours[tensor].double() - ref
        if tensor in bounds:
            share = float((error.abs() / bounds[tensor]).max())
        elif dtype == torch.float32:
            share = rms(error) / (RMS_GRAD_FP32 * rms(ref))
        else:
            share = rms(error) / (RMS_GRAD_RATIO * rms(theirs[tensor].double() - ref))
        both = (_errors(t[tensor], ref, dtype) for t in (ours, theirs))
        form = _errors(tanh[tensor], ref, dtype) if tanh else None
        rows.append(Row(dtype, activation, K, tensor, *both, share, form))
    return rows


def _run(function: Function, tensors: tuple[Tensor, ...], activation: str, d_out: Tensor) -> dict[str, Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    out = function(*leaves, activation)  # type: ignore[call-arg, arg-type]
    out.backward(d_out)
    return dict(zip(("out", "d_x", "d_weight", "d_bias"), (out.detach(), *(leaf.grad for leaf in leaves)), strict=True))


def _errors(actual: Tensor, ref: Tensor, dtype: torch.dtype) -> Errors:
    unit = UNIT[dtype] * rms(ref)
    error = actual.double() - ref
    return Errors(error.abs().max().item() / unit, rms(error) / unit)


def broken(row: Row) -> list[str]:
    """What of docs/design.md's promises a row breaks, in words. NaN breaks all of them."""
    promises = {f"{row.share:.3f} of the promised error": row.share <= 1}
    if row.tensor == "out" and row.dtype != torch.float32:
        for name in ("max", "rms"):
            ours, theirs = getattr(row.ours, name), getattr(row.eager, name)
            promises[f"{name} error {ours:.4g}, eager's {theirs:.4g}"] = ours <= EAGER_RATIO * theirs
    case = f"{row.tensor} {dtype_name(row.dtype)} {row.activation} K={row.K}"
    return [f"{case}: {what}" for what, kept in promises.items() if not kept]


def large_tiles(M: int, dtype: str, arch: int) -> Config:
    """Four tiles cover the output: the interpreter pays for each step of each tile, whatever its size."""
    return Config("pointer", dtype, 64, 128, 128, num_warps=1, num_stages=1)


def cases() -> Iterator[tuple[torch.dtype, str, int]]:
    for dtype in DTYPES:
        for activation in ACTIVATIONS:
            for K in KS:
                yield dtype, activation, K


def page(rows: list[Row], where: str) -> str:
    """The document; the same for the same rows."""
    M, N = SHAPE
    parts = [
        f"""# Numerics

Written by `make numerics`; not to be edited. {where}

{_summary(rows)}

## How each number came to be

- **Inputs**: M = {M}, N = {N} ({M * N} outputs, ragged against the tiles), x, W and b random so that pre-activations are of
  order 1, rounded to the dtype; seeded, so that the same versions on the same processor write the same page.
- **Errors** are against fp64 arithmetic on the same rounded inputs, and are multiples of **u · RMS of the exact tensor**, u
  being half the distance of neighbouring numbers: 2^-11 (fp16), 2^-8 (bf16), 2^-24 (fp32). One rounding of numbers of equal
  size is at most 1. "max" is the largest error of any element, "RMS" the root of the mean square.
- **ours** is `bert_fused.linear_act` and its backward; **eager** is `F.linear`, the activation and autograd.
- **bound** is the largest part of the [promised error](design.md#error) that any element of ours uses: at most 1.00.
- **d_x, d_weight, d_bias** are compared with gradients in fp64 throughout, so eager's and our own rounding of the
  pre-activation is part of their error. **d_preact** is the backward kernel alone, at the rounded pre-activation (ReLU and
  tanh: output) that both are given. In d_x and d_weight the product is PyTorch's own, on both sides.
- The **tanh form** is our own kernel with `gelu_tanh`, which is rounded as rarely as ours, where `gelu` is asked for:
  what remains is the difference of the two functions.

## GELU and its tanh form

{_tanh_table(rows)}"""
    ]
    for dtype in DTYPES:
        parts.append(f"## {dtype_name(dtype)}: results\n\n{_forward_table(rows, dtype)}")
        parts.append(f"## {dtype_name(dtype)}: gradients\n\nmax and RMS, ours / eager's.\n\n{_grad_table(rows, dtype)}")
    return "\n\n".join(parts) + "\n"


def _summary(rows: list[Row]) -> str:
    outs, halves = _select(rows, "out"), [row for row in rows if row.dtype != torch.float32]
    grads = [row for row in halves if row.tensor in ("d_x", "d_weight", "d_bias")]
    half_outs = _select(halves, "out")
    ratios = [row.ours.rms / row.eager.rms for row in half_outs]
    gelu = {row.dtype: row for row in outs if row.activation == "gelu" and row.K == 768 and row.tanh}
    times = {dtype_name(dtype): row.tanh.max / row.ours.max for dtype, row in gelu.items() if row.tanh}
    broken_rows = sum(bool(broken(row)) for row in rows)
    verdict = "Every promise is kept" if not broken_rows else f"**{broken_rows} promises are broken**"
    fp32 = max((row.ours.rms / row.eager.rms for row in outs if row.dtype == torch.float32), default=0.0)
    return f"""**In short**

- {verdict}: {len(outs)} cases, {len(rows)} tensors. The result that comes closest to its elementwise bound uses \
{max(row.share for row in outs):.2f} of it, the d_preact that does {max(row.share for row in _select(rows, "d_preact")):.2f}.
- In fp16 and bf16 the RMS error of results is {min(ratios):.2f} to {max(ratios):.2f} of eager's, which rounds twice, and the
  largest error at most {max(row.ours.max / row.eager.max for row in half_outs):.3f} of eager's.
- The tanh form in place of erf GELU, at K = 768: its largest error is {_list(times)} ours.
- Gradients in fp16 and bf16: RMS {min(r.ours.rms / r.eager.rms for r in grads):.2f} to \
{max(r.ours.rms / r.eager.rms for r in grads):.2f} of eager's (d_x, d_weight, d_bias); 1.05 is promised.
- In fp32 nothing is promised against eager, and RMS errors of results are at most {fp32:.2f} of eager's."""


def _list(times: dict[str, float]) -> str:
    return ", ".join(f"{factor:.3g} × ({name})" for name, factor in times.items())


def _select(rows: list[Row], tensor: str, dtype: torch.dtype | None = None) -> list[Row]:
    return [row for row in rows if row.tensor == tensor and dtype in (None, row.dtype)]


def _table(header: list[str], lines: list[list[str]]) -> str:
    rule = ["---" if i < 2 else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))


def _pair(errors: Errors) -> list[str]:
    return [f"{errors.max:.3g}", f"{errors.rms:.3g}"]


def _tanh_table(rows: list[Row]) -> str:
    header = ["dtype", "K", "ours max", "ours RMS", "eager max", "eager RMS", "tanh form max", "tanh form RMS"]
    lines = [
        [dtype_name(row.dtype), str(row.K), *_pair(row.ours), *_pair(row.eager), *_pair(row.tanh)]
        for row in _select(rows, "out")
        if row.tanh is not None
    ]
    return _table(header, lines)


def _forward_table(rows: list[Row], dtype: torch.dtype) -> str:
    header = ["activation", "K", "ours max", "ours RMS", "eager max", "eager RMS", "RMS ours / eager", "bound"]
    return _table(header, [forward_line(row) for row in _select(rows, "out", dtype)])


def forward_line(row: Row) -> list[str]:
    ratio = f"{row.ours.rms / row.eager.rms:.2f}"
    return [row.activation, str(row.K), *_pair(row.ours), *_pair(row.eager), ratio, f"{row.share:.2f}"]


def _grad_table(rows: list[Row], dtype: torch.dtype) -> str:
    found = {(row.activation, row.K, row.tensor): row for row in rows if row.dtype == dtype}
    lines = []
    for activation, K in dict.fromkeys((row.activation, row.K) for row in _select(rows, "out", dtype)):
        line = [activation, str(K)]
        for tensor in GRADIENTS:
            row = found.get((activation, K, tensor))
            line += (
                ["", ""]
                if row is None
                else [f"{o} / {e}" for o, e in zip(_pair(row.ours), _pair(row.eager), strict=True)]
            )
        bound = found.get((activation, K, "d_preact"))
        lines.append([*line, f"{bound.share:.2f}" if bound else ""])
    header = ["activation", "K"] + [f"{tensor} {norm}" for tensor in GRADIENTS for norm in ("max", "RMS")]
    return _table([*header, "d_preact bound"], lines)


def place() -> tuple[Path, str]:
    """The page's path, and the sentence that says where and with what its numbers were measured."""
    versions = f"torch {torch.__version__}, Triton {triton.__version__}, NumPy {numpy.__version__}"
    if INTERPRETED:
        return DOCS / "numerics.md", (
            f"**Measured in Triton's interpreter on a CPU** ({versions}), with its bf16 repaired as in the tests. The\n"
            "kernels' own arithmetic is what a GPU would run, but three things differ there: the order in which a tile's\n"
            "products are added, exponentials (approximate, 2 ulp), and eager, which here is PyTorch's CPU code. No number\n"
            "below was measured on a GPU."
        )
    name = torch.cuda.get_device_name()
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return DOCS / f"numerics-{slug}.md", f"**Measured on one {name}** ({versions})."


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python tests/numerics.py", description=__doc__)
    path, where = place()
    parser.add_argument("--out", type=Path, default=path, metavar="FILE.md", help="default: %(default)s")
    arguments = parser.parse_args(argv)
    rows: list[Row] = []
    for dtype, activation, K in cases():
        rows += measure(dtype, activation, K)
        print(f"\r{dtype_name(dtype)} {activation} K={K}".ljust(40), end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    arguments.out.write_text(page(rows, where))
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
    dispatch.INTERPRETER_DTYPES = dispatch.KERNEL_DTYPES
    torch.set_num_threads(1)
    return mock.patch.object(configs, "default_config", large_tiles)


if __name__ == "__main__":
    with prepared():
        sys.exit(main(sys.argv[1:]))
