"""Measure the errors of ours and eager against fp64 for every dtype, activation and K; write ``docs/numerics.md``.

``make numerics`` measures in Triton's interpreter. The same versions give the same page. Exits with 1 if an error is
larger than promised.
"""

import argparse
import itertools
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is decorated

import interpreter
import numpy
import triton
from gated64 import gated64, gated_bound, gated_grad64
from reference64 import (
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

from bert_fused import fallback, ops, reference
from bert_fused.kernels import lookup
from bert_fused.kernels.configs import Config
from bert_fused.kernels.elementwise import act_bwd
from bert_fused.kernels.gated import parse

PAGE = Path(__file__).resolve().parents[2] / "docs" / "numerics.md"
M, N = 67, 136  # no multiples of a tile
GATED = ("gelu(a)*b", "silu(a)*b")  # ModernBERT's and SwiGLU: the other half and other activations differ by no step
CASES = tuple(itertools.product(DTYPES, (*ACTIVATIONS, *GATED), (384, 768, 1024, 3072, 4096)))
NORMS = ("max", "RMS", "bound")
GRADIENTS = ("d_preact", "d_x", "d_weight", "d_bias")
# Half the relative distance of neighbouring numbers, the unit of errors.
UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}

Function = Callable[[Tensor, Tensor, Tensor, str], Tensor]


@dataclass(frozen=True)
class Errors:
    """Largest and RMS error of a tensor, as multiples of u times the RMS of the exact one.

    ``share``: how much of the promised error is used, at the worst element (out, d_preact) or as RMS (other gradients).
    """

    max: float
    rms: float
    share: float


@dataclass(frozen=True)
class Row:
    """The errors of one tensor of one case. ``tanh``: of the fused tanh form, if the activation is erf GELU."""

    dtype: torch.dtype
    activation: str
    K: int
    tensor: str
    ours: Errors
    eager: Errors
    tanh: Errors | None = None


def broken(row: Row) -> list[str]:
    """Return one line for each promise of docs/design/error.md that a row breaks. NaN breaks all of them."""
    promises = {f"{row.ours.share:.3f} of the promised error": row.ours.share <= 1}
    if row.tensor == "out" and row.dtype != torch.float32:
        for name in ("max", "rms"):
            ours, theirs = getattr(row.ours, name), getattr(row.eager, name)
            promises[f"{name} error {ours:.4g}, eager's {theirs:.4g}"] = ours <= EAGER_RATIO * theirs
    case = f"{row.tensor} {dtype_name(row.dtype)} {row.activation} K={row.K}"
    return [f"{case}: {what}" for what, kept in promises.items() if not kept]


def measure(dtype: torch.dtype, activation: str, K: int, function: Function = ops.linear_act) -> list[Row]:
    """Compare the result and the gradients of ``function(x, weight, bias, activation)`` with fp64."""
    name, half = parse(activation)
    inputs = make_inputs("unit", M, 2 * N if half else N, K, dtype, seed=K)
    x, weight, bias = inputs.x, inputs.weight, inputs.bias
    assert bias is not None
    d_out = torch.randn((M, N), generator=generator(K + 1)).to(dtype)

    preact = linear64(x, weight, bias)
    if half:
        exact = {"out": gated64(preact, name, half)}
        d_preact = gated_grad64(d_out, preact, name, half)[0]
        bounds = {"out": gated_bound(x, weight, bias, name, half)[1]}
    else:
        exact = {"out": act64(preact, activation)}
        d_preact = d_out.double() * act_grad64(preact, activation)
        bounds = {"out": forward_bound(exact["out"], x, weight, bias, activation)}
    exact |= {"d_x": d_preact @ weight.double(), "d_weight": d_preact.t() @ x.double(), "d_bias": d_preact.sum(0)}
    ours, theirs = (_run(f, (x, weight, bias), activation, d_out) for f in (function, reference.linear_act))
    tanh = _run(function, (x, weight, bias), "gelu_tanh", d_out) if activation == "gelu" else {}

    if activation != "none":
        kept = activation if activation in reference.GRAD_FROM_OUTPUT else "none"
        saved = reference.linear_act(x, weight, bias, kept)
        if half:
            exact["d_preact"], bounds["d_preact"] = gated_grad64(d_out, saved, name, half)
        else:
            exact["d_preact"] = d_out.double() * saved_grad64(saved, activation)
            bounds["d_preact"] = grad_bound(exact["d_preact"], d_out, activation)
        ours["d_preact"] = act_bwd(d_out, saved, activation=activation, bias_grad=False)[0]
        theirs["d_preact"] = reference.act_grad(d_out, saved, activation)
        if tanh:
            tanh["d_preact"] = act_bwd(d_out, saved, activation="gelu_tanh", bias_grad=False)[0]

    def errors(actual: dict[str, Tensor], tensor: str) -> Errors:
        ref = exact[tensor]
        error, eager_error = (t[tensor].double() - ref for t in (actual, theirs))
        limit = RMS_GRAD_FP32 * rms(ref) if dtype == torch.float32 else RMS_GRAD_RATIO * rms(eager_error)
        share = float((error.abs() / bounds[tensor]).max()) if tensor in bounds else rms(error) / limit
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


def page(rows: list[Row]) -> str:
    versions = f"torch {torch.__version__}, Triton {triton.__version__}, NumPy {numpy.__version__}"
    parts = [
        f"""# Numerics

Written by `make numerics`; not to be edited.

**Measured in Triton's interpreter on a CPU** ({versions}), with its
bf16 repaired as in the tests. The kernels' formulas are what a GPU would run, but three things differ
there: the order in which a tile's products are added, exponentials (approximate to 2 ulp), and eager,
which here is PyTorch's CPU code. No number below was measured on a GPU.

On a CPU that oneDNN serves, its operator applies the activation to the fp32 sum as well, before the one rounding, so
results in bf16 have smaller errors than eager's; in fp32 they are eager's. Of a gated activation it also rounds the
activated half before the product: twice, where eager rounds four times. `tests/ops/test_onednn.py` holds this.

{_summary(rows)}

## How each number came to be

- **Inputs**: M = {M}, N = {N}: {M * N} outputs, ragged against the tiles. x, W and b are random and rounded to the
  dtype, pre-activations of order 1. They are seeded: the same versions on the same processor write the same page.
- **Errors** are against fp64 arithmetic on the same rounded inputs, in multiples of **u · RMS of the exact tensor**. u
  is half the distance of neighbouring numbers: 2^-11 (fp16), 2^-8 (bf16), 2^-24 (fp32). "max" is the largest error of
  any element (a large element rounds by more), "RMS" the root of the mean square.
- **ours** is `bert_fused.linear_act` and its backward; **eager** is `F.linear`, the activation and autograd.
- **bound** is the largest part of the [promised elementwise error](design/error.md#error) that any element uses, so
  at most 1.00 for ours. The bound's second part, accumulation, grows with K, and so does what hides below it.
- **d_x, d_weight, d_bias** are compared with gradients in fp64 throughout, so that the rounding of the pre-activation,
  ours and eager's, is part of their error. Their matrix products are PyTorch's own on both sides. **d_preact** is the
  backward kernel alone, at the rounded pre-activation (ReLU and tanh: output) that both are given.
- **Gated** activations, as `gelu(a)*b`, have a bound of their own, and twice the columns: 2 N pre-activations. Of the
  two halves that may be activated, and of the activations, the page has those that models have.
- The **tanh form** is our own kernel with `gelu_tanh` where `gelu` is asked for: rounded as rarely as ours, so that
  what remains is the difference of the two functions.

## GELU and its tanh form

{_tanh_table(rows, "out")}

The same of d_preact, the derivative times d_out:

{_tanh_table(rows, "d_preact")}"""
    ]
    for dtype in DTYPES:
        parts.append(f"## {dtype_name(dtype)}: results\n\n{result_table(rows, dtype)}")
        parts.append(f"## {dtype_name(dtype)}: gradients\n\nOurs / eager's.\n\n{gradient_table(rows, dtype)}")
    return "\n\n".join(parts) + "\n"


def _summary(rows: list[Row]) -> str:
    outs, halves = _select(rows, "out"), [row for row in rows if row.dtype != torch.float32]
    results, singles = _select(halves, "out"), _select(rows, "out", torch.float32)
    grads = [row for row in halves if row.tensor in ("d_x", "d_weight", "d_bias")]
    gelus = [row for row in outs if row.tanh and row.K == 768]
    tanh = ", ".join(f"{row.tanh.share:.1f} ({dtype_name(row.dtype)})" for row in gelus if row.tanh)
    faults = sum(bool(broken(row)) for row in rows)
    verdict = f"**{faults} promises are broken**" if faults else "Every promise is kept"
    nearest, nearest_grad = (max(r.ours.share for r in _select(rows, name)) for name in ("out", "d_preact"))
    largest = max(row.ours.max / row.eager.max for row in results)
    return f"""**In short**

- {verdict}: {len(outs)} cases, {len(rows)} tensors. Of the promised elementwise error results use at most
  {nearest:.2f}, and d_preact {nearest_grad:.2f}.
- In fp16 and bf16 the RMS error of results is {_range(results)} of eager's, which rounds the pre-activation as well,
  and the largest error at most {largest:.3f} of eager's; 1.001 is promised.
- The tanh form in place of erf GELU is off by {tanh} times the promised
  error at K = 768. Its RMS error shows it in fp32 and fp16, and hardly in bf16.
- Gradients d_x, d_weight and d_bias in fp16 and bf16 have RMS errors of {_range(grads)} of eager's; 1.05 is promised.
- In fp32 results have RMS errors of {_range(singles)} of eager's; nothing is promised against eager there."""


def _range(rows: list[Row]) -> str:
    ratios = [row.ours.rms / row.eager.rms for row in rows]
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


def _select(rows: list[Row], tensor: str, dtype: torch.dtype | None = None) -> list[Row]:
    return [row for row in rows if row.tensor == tensor and dtype in (None, row.dtype)]


def _table(header: list[str], lines: list[list[str]]) -> str:
    rule = ["---" if i < 2 else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))


def _digits(value: float) -> str:
    return f"{value:#.3g}" if value < 100 else f"{value:.0f}"


def _pair(errors: Errors) -> list[str]:
    return [_digits(errors.max), _digits(errors.rms)]


def _tanh_table(rows: list[Row], tensor: str) -> str:
    header = ["dtype", "K"] + [f"{who} {what}" for who in ("ours", "eager", "tanh form") for what in NORMS]
    lines = [
        [dtype_name(row.dtype), str(row.K)]
        + [cell for errors in (row.ours, row.eager, row.tanh) for cell in (*_pair(errors), f"{errors.share:.2f}")]
        for row in _select(rows, tensor)
        if row.tanh is not None
    ]
    return _table(header, lines)


def result_table(rows: list[Row], dtype: torch.dtype) -> str:
    header = ["activation", "K", "ours max", "ours RMS", "eager max", "eager RMS", "RMS ours / eager", "bound"]
    lines = []
    for row in _select(rows, "out", dtype):
        shares = f"{row.ours.rms / row.eager.rms:.2f}", f"{row.ours.share:.2f}"
        lines.append([row.activation, str(row.K), *_pair(row.ours), *_pair(row.eager), *shares])
    return _table(header, lines)


def gradient_table(rows: list[Row], dtype: torch.dtype) -> str:
    """Return the table of a dtype's gradients. Without an activation d_preact is d_out."""
    header = ["activation", "K"] + [f"{tensor} {norm}" for tensor in GRADIENTS for norm in ("max", "RMS")]
    header.insert(4, "d_preact bound")
    lines = []
    for case in dict.fromkeys((row.activation, row.K) for row in rows if row.dtype == dtype):
        by_tensor = {row.tensor: row for row in rows if (row.dtype, row.activation, row.K) == (dtype, *case)}
        line = list(map(str, case))
        for tensor in GRADIENTS:
            row = by_tensor.get(tensor)
            line += ["", ""] if row is None else map(" / ".join, zip(_pair(row.ours), _pair(row.eager), strict=True))
            if tensor == "d_preact":
                line.append("" if row is None else f"{row.ours.share:.2f}")
        lines.append(line)
    return _table(header, lines)


def large_tiles(M: int, dtype: str, arch: int) -> Config:
    """Cover the output with four tiles: the interpreter takes as long for a large tile as for a small one."""
    return Config("pointer", dtype, 64, 128, 128, num_warps=1, num_stages=1)


def prepared() -> AbstractContextManager[object]:
    """The interpreter as the tests have it, with large tiles."""
    interpreter.install()
    fallback.INTERPRETER_DTYPES = fallback.KERNEL_DTYPES
    torch.set_num_threads(1)
    return mock.patch.object(lookup, "default_config", large_tiles)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python tests/support/numerics.py", description=__doc__)
    parser.add_argument("--out", type=Path, default=PAGE, metavar="FILE.md", help="default: %(default)s")
    arguments = parser.parse_args(argv)
    rows: list[Row] = []
    for dtype, activation, K in CASES:
        rows += measure(dtype, activation, K)
        print(f"\r{dtype_name(dtype)} {activation} K={K}".ljust(40), end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    arguments.out.write_text(page(rows))
    print(f"{len(rows)} tensors measured, written to {arguments.out}")
    faults = [fault for row in rows for fault in broken(row)]
    print("\n".join(f"broken promise: {fault}" for fault in faults), file=sys.stderr)
    return int(bool(faults))


if __name__ == "__main__":
    with prepared():
        sys.exit(main(sys.argv[1:]))
