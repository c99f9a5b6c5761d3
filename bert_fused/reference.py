"""``act(x @ W.T + b)`` in plain PyTorch: the tests' truth, the benchmarks' baseline, and the path without a kernel.

Every function is made of differentiable torch operations.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels.gated import HALVES, gated, parse

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu", "quick_gelu", "tanh", "none")

# Activations whose derivative is a function of their output, so that the pre-activation need not be kept.
GRAD_FROM_OUTPUT = ("relu", "tanh")
# Names of gated activations, whose pre-activation is twice as wide as the result (``kernels/gated.py``).
GATED = frozenset(gated(activation, half) for activation in ACTIVATIONS for half in HALVES)
NEEDS_PREACT = frozenset(ACTIVATIONS) - {*GRAD_FROM_OUTPUT, "none"} | GATED


def act(z: Tensor, activation: str) -> Tensor:
    """Return the activation named ``activation``, of ``ACTIVATIONS`` or ``GATED``, of a tensor of any shape."""
    name, half = parse(activation)
    if half:
        a, b = z.chunk(2, -1)
        return act(a, name) * b if half == "first" else a * act(b, name)
    match activation:
        case "gelu":
            return F.gelu(z)
        case "gelu_tanh":
            return F.gelu(z, approximate="tanh")
        case "relu":
            return F.relu(z)
        case "silu":
            return F.silu(z)
        case "quick_gelu":
            return z * torch.sigmoid(1.702 * z)
        case "tanh":
            return torch.tanh(z)
        case "none":
            return z
    raise ValueError(f"unknown activation {activation!r}; expected one of {', '.join(ACTIVATIONS)}")


def act_grad(d_out: Tensor, saved: Tensor | None, activation: str) -> Tensor:
    """Return ``d_out`` times the activation's derivative; differentiable in both arguments.

    ``saved`` is the output for the activations in ``GRAD_FROM_OUTPUT``, unused for "none", else the pre-activation.
    """
    if activation == "none":
        return d_out
    assert saved is not None
    name, half = parse(activation)
    if half:
        a, b = saved.chunk(2, -1)
        z, factor = (a, b) if half == "first" else (b, a)
        activated = act(z, name)
        d_z = act_grad(d_out * factor, activated if name in GRAD_FROM_OUTPUT else z, name)
        return torch.cat((d_z, d_out * activated) if half == "first" else (d_out * activated, d_z), -1)
    aten = torch.ops.aten
    result: Tensor
    match activation:
        case "gelu":
            result = aten.gelu_backward(d_out, saved)
        case "gelu_tanh":
            result = aten.gelu_backward(d_out, saved, approximate="tanh")
        case "relu":
            result = aten.threshold_backward(d_out, saved, 0)
        case "tanh":
            result = aten.tanh_backward(d_out, saved)
        case "silu" | "quick_gelu":
            # aten::silu_backward has no derivative of its own. In 16 bits the factors would be rounded one by one.
            slope = 1.702 if activation == "quick_gelu" else 1.0
            z = slope * (saved.float() if saved.element_size() == 2 else saved)
            s = torch.sigmoid(z)
            result = (d_out * (s * (1 + z * (1 - s)))).to(d_out.dtype)
        case _:
            raise ValueError(f"unknown activation {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
    return result


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """Return ``[..., N]`` for x ``[..., K]``, weight ``[N, K]`` and bias ``[N]`` or None.

    For a gated activation ``[..., N]`` for weight ``[2N, K]`` and bias ``[2N]``.
    """
    return act(F.linear(x, weight, bias), activation)


def error_bound(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, exact: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return the largest error we promise for each element of ``exact``, the result in fp64 of the same rounded inputs.

    One rounding to ``dtype``, plus fp32 accumulation over K terms: (1 + 2^-6) u |exact| + 2^-23 (1 + K / 16) a, with a
    the largest sum of |x| |w| + |b| over all outputs. In the product of a gated activation the error of each factor is
    multiplied by the other one. Where this comes from: docs/design/error.md.
    """
    name, half = parse(activation)
    largest = x.double().abs() @ weight.double().abs().t()
    if bias is not None:
        largest = largest + bias.double().abs()
    a = largest.max() if largest.numel() else 0.0
    unit = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 8 * 2.0**-24}[dtype]
    smallest = 6e-8 if dtype == torch.float16 else 0.0  # the distance between the smallest fp16 numbers, and a little
    accumulation = 2**-23 * (1 + x.shape[-1] / 16) * a
    error: Tensor | float = accumulation
    if half and name not in ("relu", "none"):  # no rounding hides the activation's own error
        error = error + (1.9e-6 if (name, dtype) == ("gelu", torch.bfloat16) else 3e-7)
    elif dtype == torch.float32 and name in ("gelu_tanh", "silu", "quick_gelu", "tanh"):
        error = error + 3e-7  # these are built from exp2, which the GPU approximates
    if half:
        halves = F.linear(x.double(), weight.double(), bias.double() if bias is not None else None).chunk(2, -1)
        z, factor = halves if half == "first" else halves[::-1]
        error = factor.abs() * error + (act(z, name).abs() + error) * accumulation
    return (1 + 2**-6) * unit * exact.abs() + error + smallest


def rms_error(result: Tensor, exact: Tensor) -> float:
    """Return the root of the mean squared difference, computed in fp64."""
    return (result.double() - exact.double()).square().mean().sqrt().item()
