"""``docs/numerics.md`` as text: what ``numerics.py`` measured, a summary first."""

from dataclasses import dataclass

import torch
from reference64 import DTYPES, EAGER_RATIO, dtype_name

GRADIENTS = ("d_preact", "d_x", "d_weight", "d_bias")


@dataclass(frozen=True)
class Errors:
    """Largest and RMS error of a tensor, as multiples of u times the RMS of the exact one.

    ``share``: how much of the promised error that is, at the worst element (out, d_preact) or as RMS (other gradients).
    """

    max: float
    rms: float
    share: float


@dataclass(frozen=True)
class Row:
    """What one tensor of one case is off by. ``tanh``: the tanh form, fused, where erf GELU is asked for."""

    dtype: torch.dtype
    activation: str
    K: int
    tensor: str
    ours: Errors
    eager: Errors
    tanh: Errors | None = None


def broken(row: Row) -> list[str]:
    """One line for each promise of docs/design/error.md that a row breaks. NaN breaks all of them."""
    promises = {f"{row.ours.share:.3f} of the promised error": row.ours.share <= 1}
    if row.tensor == "out" and row.dtype != torch.float32:
        for name in ("max", "rms"):
            ours, theirs = getattr(row.ours, name), getattr(row.eager, name)
            promises[f"{name} error {ours:.4g}, eager's {theirs:.4g}"] = ours <= EAGER_RATIO * theirs
    case = f"{row.tensor} {dtype_name(row.dtype)} {row.activation} K={row.K}"
    return [f"{case}: {what}" for what, kept in promises.items() if not kept]


def page(rows: list[Row], shape: tuple[int, int], where: str) -> str:
    """The document; the same for the same rows. ``shape``: M and N. ``where``: what they were measured on and with."""
    M, N = shape
    parts = [
        f"""# Numerics

Written by `make numerics`; not to be edited.

{where}

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
- The **tanh form** is our own kernel with `gelu_tanh` where `gelu` is asked for: rounded as rarely as ours, so that
  what remains is the difference of the two functions.

## GELU and its tanh form

{_tanh_table(rows, "out")}

The same of d_preact, the derivative times d_out:

{_tanh_table(rows, "d_preact")}"""
    ]
    for dtype in DTYPES:
        parts.append(f"## {dtype_name(dtype)}: results\n\n{_forward_table(rows, dtype)}")
        parts.append(f"## {dtype_name(dtype)}: gradients\n\nOurs / eager's.\n\n{_grad_table(rows, dtype)}")
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
    header = ["dtype", "K"] + [
        f"{who} {what}" for who in ("ours", "eager", "tanh form") for what in ("max", "RMS", "bound")
    ]
    lines = [
        [dtype_name(row.dtype), str(row.K)]
        + [cell for errors in (row.ours, row.eager, row.tanh) for cell in (*_pair(errors), f"{errors.share:.2f}")]
        for row in _select(rows, tensor)
        if row.tanh is not None
    ]
    return _table(header, lines)


def _forward_table(rows: list[Row], dtype: torch.dtype) -> str:
    header = ["activation", "K", "ours max", "ours RMS", "eager max", "eager RMS", "RMS ours / eager", "bound"]
    return _table(header, [forward_line(row) for row in _select(rows, "out", dtype)])


def forward_line(row: Row) -> list[str]:
    """The cells of a result's line."""
    ratio = f"{row.ours.rms / row.eager.rms:.2f}"
    return [row.activation, str(row.K), *_pair(row.ours), *_pair(row.eager), ratio, f"{row.ours.share:.2f}"]


def _grad_table(rows: list[Row], dtype: torch.dtype) -> str:
    header = ["activation", "K"] + [f"{tensor} {norm}" for tensor in GRADIENTS for norm in ("max", "RMS")]
    header.insert(4, "d_preact bound")
    cases = dict.fromkeys((row.activation, row.K) for row in rows if row.dtype == dtype)
    return _table(header, [grad_line([r for r in rows if (r.dtype, r.activation, r.K) == (dtype, *c)]) for c in cases])


def grad_line(rows: list[Row]) -> list[str]:
    """The cells of the line of one case's gradients. Without an activation d_preact is d_out."""
    by_tensor = {row.tensor: row for row in rows}
    line = [rows[0].activation, str(rows[0].K)]
    for tensor in GRADIENTS:
        row = by_tensor.get(tensor)
        line += ["", ""] if row is None else map(" / ".join, zip(_pair(row.ours), _pair(row.eager), strict=True))
        if tensor == "d_preact":
            line.append("" if row is None else f"{row.ours.share:.2f}")
    return line
