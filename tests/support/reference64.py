"""The promises of docs/design/error.md as bounds, and references and inputs for every test file.

The reference is fp64 arithmetic on the same rounded inputs. It shares no code with the library: erf GELU comes from
erfc, and derivatives from closed forms.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bert_fused.reference import ACTIVATIONS as ACTIVATIONS

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
REGIMES = ("unit", "trained", "integers")

# Half the relative distance of neighbouring numbers; fp32 results may be off by 8 of these.
UNIT_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 8 * 2.0**-24}
# Near zero fp16 is spaced 2^-24 apart. In fp32 an exponential built from exp2 adds an absolute error.
FP16_FLOOR = 6e-8
FP32_EXP2_FLOOR = 3e-7
# 1 / (1 + exp(-z)) underflows where exp(-z) overflows.
UNDERFLOW = 1e-35
BUILT_FROM_EXP2 = ("gelu_tanh", "silu", "quick_gelu", "tanh")

# Absolute errors of the derivatives beyond rounding. 16-bit GELU: its polynomial (kernels/activations.py). fp32: that
# of the forward where it is built from exp2; erf's, and the cancellation of 1 - y^2, are smaller.
GELU_GRAD_FLOOR = 4.1e-6
FP32_GRAD_FLOOR = {"gelu": 1e-7, "gelu_tanh": 3e-7, "silu": 3e-7, "quick_gelu": 3e-7, "tanh": 1e-7}

RMS_GRAD_RATIO = 1.05
RMS_GRAD_FP32 = 1e-5
EAGER_RATIO = 1.001


def dtype_name(dtype: torch.dtype) -> str:
    """For test ids."""
    return str(dtype).removeprefix("torch.")


def shape_name(shape: tuple[int, ...]) -> str:
    """For test ids."""
    return "x".join(map(str, shape))


# ---------------------------------------------------------------------------------------------------------- references


def act64(z: Tensor, activation: str) -> Tensor:
    """The activation of ``z`` in fp64, without cancellation in the tails."""
    z = z.double()
    match activation:
        case "gelu":
            return torch.where(z.isinf(), z.clamp_min(0), z * 0.5 * torch.special.erfc(-z * math.sqrt(0.5)))
        case "gelu_tanh":
            return z * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))
        case "relu":
            return z.clamp_min(0)
        case "silu":
            return z * torch.sigmoid(z)
        case "quick_gelu":
            return z * torch.sigmoid(1.702 * z)
        case "tanh":
            return torch.tanh(z)
    assert activation == "none"
    return z


def act_grad64(z: Tensor, activation: str) -> Tensor:
    """The activation's derivative at ``z`` in fp64."""
    z = z.double()
    match activation:
        case "gelu":
            density = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
            return 0.5 * torch.special.erfc(-z * math.sqrt(0.5)) + z * density
        case "gelu_tanh":
            slope = 2 * math.sqrt(2 / math.pi)
            s = torch.sigmoid(slope * (z + 0.044715 * z**3))
            return s + z * s * (1 - s) * slope * (1 + 3 * 0.044715 * z * z)
        case "relu":
            return (z > 0).double()
        case "silu":
            s = torch.sigmoid(z)
            return s + z * s * (1 - s)
        case "quick_gelu":
            s = torch.sigmoid(1.702 * z)
            return s + 1.702 * z * s * (1 - s)
        case "tanh":
            return 1 / torch.cosh(z) ** 2
    assert activation == "none"
    return torch.ones_like(z)


def saved_grad64(saved: Tensor, activation: str) -> Tensor:
    """The derivative in fp64 at what the forward saves: the output for relu and tanh, else the pre-activation."""
    return 1 - saved.double() ** 2 if activation == "tanh" else act_grad64(saved, activation)


def linear64(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` in fp64."""
    out = x.double() @ weight.double().t()
    return out if bias is None else out + bias.double()


# --------------------------------------------------------------------------------------------------------------- bounds


def magnitude(x: Tensor, weight: Tensor, bias: Tensor | None) -> float:
    """a, the largest sum of ``|x||w| + |b|`` over the outputs; accumulation errors are relative to it."""
    sums = linear64(x.abs(), weight.abs(), None if bias is None else bias.abs())
    return sums.max().item() if sums.numel() else 0.0


def rounding_bound(ref: Tensor, dtype: torch.dtype, activation: str = "none") -> Tensor:
    """One rounding to ``dtype``, and in fp32 a few roundings of the activation itself."""
    floor = FP16_FLOOR if dtype == torch.float16 else 0.0
    if dtype == torch.float32 and activation in BUILT_FROM_EXP2:
        floor = FP32_EXP2_FLOOR
    return (1 + 2.0**-6) * UNIT_ROUNDOFF[dtype] * ref.abs() + floor


def accumulation_bound(x: Tensor, weight: Tensor, bias: Tensor | None) -> float:
    """How far the pre-activations may be off, added up in fp32 in any order."""
    return 2.0**-23 * (1 + x.shape[1] / 16) * magnitude(x, weight, bias)


def forward_bound(ref: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """The promised elementwise error of ``act(x @ weight.T + bias)``, given its fp64 value ``ref``.

    One rounding to the output's dtype, and accumulation in fp32.
    """
    return rounding_bound(ref, x.dtype, activation) + accumulation_bound(x, weight, bias)


def grad_bound(ref: Tensor, d_out: Tensor, activation: str) -> Tensor:
    """Elementwise error of ``d_out`` times the derivative: one rounding, and the derivative's own error times d_out."""
    dtype = d_out.dtype
    # In 16 bits rounding hides the errors of the other activations' fp32 formulas.
    floors = FP32_GRAD_FLOOR if dtype == torch.float32 else {"gelu": GELU_GRAD_FLOOR}
    floor = floors.get(activation, 0.0)
    smallest = FP16_FLOOR if dtype == torch.float16 else UNDERFLOW
    return (1 + 2.0**-6) * UNIT_ROUNDOFF[dtype] * ref.abs() + floor * d_out.double().abs() + smallest


def rms(values: Tensor) -> float:
    """Root of the mean square; 0 for a tensor without elements."""
    return values.double().square().mean().sqrt().item() if values.numel() else 0.0


# ----------------------------------------------------------------------------------------------------------- assertions


def assert_within(actual: Tensor, ref: Tensor, bound: Tensor, what: str = "result") -> None:
    """Every element of ``actual`` lies within ``bound`` of ``ref``. NaN never does."""
    assert actual.shape == ref.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(ref.shape)}"
    error = (actual.double() - ref).abs()
    wrong = ~(error <= bound)
    if wrong.any():
        ratio = torch.where(error.isnan(), math.inf, error / bound.clamp_min(1e-300))
        flat = int(ratio.argmax())
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), ratio.shape))
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} elements outside the bound; worst at {index}: "
            f"{actual[index].item()!r}, expected {ref[index].item()!r}, {ratio[index].item():.3g} x the bound"
        )


def assert_forward(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, what: str = "out"
) -> None:
    """``out`` is ``act(x @ weight.T + bias)`` within the promised elementwise bound, and of x's dtype."""
    assert out.dtype == x.dtype, f"{what}: dtype {out.dtype}, expected {x.dtype}"
    ref = act64(linear64(x, weight, bias), activation)
    assert_within(out, ref, forward_bound(ref, x, weight, bias, activation), what)


def assert_no_worse_than_eager(
    actual: Tensor,
    eager: Tensor,
    ref: Tensor,
    *,
    ratio: float = EAGER_RATIO,
    accumulation: float = 0.0,
    what: str = "result",
) -> None:
    """Maximum and RMS error against ``ref`` are at most ``ratio`` times those of eager PyTorch.

    accumulation: how much more the maximum may be, since eager adds up in another order.
    """
    norms = (("max", lambda e: e.abs().max().item() if e.numel() else 0.0, accumulation), ("rms", rms, 0.0))
    for name, norm, allowed in norms:
        ours, theirs = norm(actual.double() - ref), norm(eager.double() - ref)
        message = f"{what}: {name} error {ours:.4g}, eager's {theirs:.4g} ({ours / max(theirs, 1e-300):.4f} x)"
        assert ours <= ratio * theirs + allowed, message


def assert_bias_grad(d_bias: Tensor, d_out: Tensor, saved: Tensor, activation: str) -> None:
    """``d_bias`` sums the rows of d_preact before these are rounded: their errors in fp32, and one rounding."""
    terms = d_out.double() * saved_grad64(saved, activation)
    ref = terms.sum(0)
    errors = grad_bound(terms, d_out.float(), activation)
    if d_out.dtype != torch.float32 and activation == "gelu":
        errors = errors + GELU_GRAD_FLOOR * d_out.double().abs()
    accumulation = 2.0**-23 * (1 + len(terms) / 16) * terms.abs().sum(0)
    assert d_bias.dtype == d_out.dtype, f"d_bias: dtype {d_bias.dtype}, expected {d_out.dtype}"
    assert_within(d_bias, ref, rounding_bound(ref, d_out.dtype) + errors.sum(0) + accumulation, "d_bias")


def assert_grad(actual: Tensor, eager: Tensor, ref: Tensor, what: str) -> None:
    """A gradient's RMS error: at most 1.05 times eager's in 16 bits, 1e-5 of the gradient in fp32."""
    assert actual.shape == ref.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(ref.shape)}"
    error = rms(actual.double() - ref)
    limit = RMS_GRAD_FP32 * rms(ref) if actual.dtype == torch.float32 else RMS_GRAD_RATIO * rms(eager.double() - ref)
    assert error <= limit, f"{what}: rms error {error:.4g}, limit {limit:.4g} ({error / max(limit, 1e-300):.3f} x)"


# --------------------------------------------------------------------------------------------------------------- inputs


@dataclass(frozen=True)
class Inputs:
    """x ``[M, K]``, weight ``[N, K]``, bias ``[N]`` or None."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_inputs(regime: str, M: int, N: int, K: int, dtype: torch.dtype, *, bias: bool = True, seed: int = 0) -> Inputs:
    """Random inputs of one of ``REGIMES``.

    "unit": pre-activations of order 1 and a bias of that order, so that a misplaced bias shows (freshly initialised
    models have none). "trained": the spread of trained BERT weights, biases mostly negative. "integers": products and
    sums that every dtype holds exactly, in any order.
    """
    g = generator(seed)
    if regime == "integers":
        x, weight = (torch.randint(-1, 2, shape, generator=g) for shape in ((M, K), (N, K)))
        b = torch.randint(-8, 9, (N,), generator=g)
    else:
        x, weight, b = (torch.randn(shape, generator=g) for shape in ((M, K), (N, K), (N,)))
        weight = weight * (0.04 if regime == "trained" else max(K, 1) ** -0.5)
        b = -0.1 + 0.1 * b if regime == "trained" else b
    return Inputs(x.to(dtype), weight.to(dtype), b.to(dtype) if bias else None)


LAYOUTS = ("contiguous", "row_slice", "column_slice", "transposed", "expanded", "cls", "offset1", "offset3", "offset5")


def with_layout(matrix: Tensor, layout: str, around: float = math.nan) -> Tensor:
    """A view with the values of ``matrix`` (its first row throughout for "expanded") and other strides or offset.

    around: the value of the memory around the view.
    """
    rows, columns = matrix.shape
    match layout:
        case "contiguous":
            return matrix.contiguous()
        case "row_slice":
            view = matrix.new_full((2 * rows + 3, columns), around)[3::2]
        case "column_slice":
            view = matrix.new_full((rows, columns + 13), around)[:, 5 : 5 + columns]
        case "transposed":
            view = matrix.new_full((columns, rows), around).t()
        case "expanded":
            return matrix[:1].clone().expand(rows, columns) if rows else matrix
        case "cls":
            view = matrix.new_full((rows, 4, columns), around)[:, 0]
        case _:
            offset = int(layout.removeprefix("offset"))
            view = matrix.new_full((offset + rows * columns,), around)[offset:].view(rows, columns)
    return view.copy_(matrix)


def strided_vector(vector: Tensor) -> Tensor:
    """A view with the values of ``vector`` and stride 3, NaN between."""
    return vector.new_full((3 * len(vector) + 1,), math.nan)[1::3].copy_(vector)
