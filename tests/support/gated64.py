"""Gated activations in fp64, and the bounds of docs/design/error.md for them."""

import itertools

import torch
from reference64 import (
    ACTIVATIONS,
    accumulation_bound,
    act64,
    act_grad64,
    grad_bound,
    linear64,
    rounding_bound,
)
from torch import Tensor

HALVES = ("first", "second")
EVERY = list(itertools.product(ACTIVATIONS, HALVES))
NAMES = {(each, half): f"{each}(a)*b" if half == "first" else f"a*{each}(b)" for each, half in EVERY}


def own_error(activation: str, dtype: torch.dtype) -> float:
    """Largest error of an activation before it is rounded: what multiplying by the other half makes visible."""
    if activation in ("relu", "none"):
        return 0.0
    return 1.9e-6 if (activation, dtype) == ("gelu", torch.bfloat16) else 3e-7


def in_order(activated: Tensor, factor: Tensor, half: str) -> tuple[Tensor, Tensor]:
    return (activated, factor) if half == "first" else (factor, activated)


def gated64(z: Tensor, activation: str, half: str) -> Tensor:
    """``[..., N]`` in fp64 for pre-activations ``[..., 2N]``."""
    activated, factor = in_order(*z.double().chunk(2, -1), half)
    return act64(activated, activation) * factor


def gated_bound(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, half: str) -> tuple[Tensor, Tensor]:
    """The fp64 result for weight ``[2N, K]``, and the promised elementwise error.

    Each factor may be off by what it may be before it is rounded, and the product is rounded once.
    """
    z = linear64(x, weight, bias)
    activated, factor = in_order(*z.chunk(2, -1), half)
    activated = act64(activated, activation)
    of_factor = accumulation_bound(x, weight, bias)
    of_activated = of_factor + own_error(activation, x.dtype)
    ref = activated * factor
    errors = of_activated * factor.abs() + of_factor * activated.abs() + of_factor * of_activated
    return ref, rounding_bound(ref, x.dtype) + errors


def gated_grad64(d_out: Tensor, saved: Tensor, activation: str, half: str) -> tuple[Tensor, Tensor]:
    """The gradient ``[M, 2N]`` at saved pre-activations in fp64, and its elementwise bound.

    One rounding of each, and what the derivative or the activation is off by. tanh's derivative is that of its value.
    """
    z, factor = in_order(*saved.double().chunk(2, -1), half)
    d_activated = d_out.double() * factor
    d_z, d_factor = d_activated * act_grad64(z, activation), d_out.double() * act64(z, activation)
    own = own_error(activation, d_out.dtype)
    of_z = grad_bound(d_z, d_activated.to(d_out.dtype), activation)
    of_z = of_z + (2 * own if activation == "tanh" else 0.0) * d_activated.abs()
    of_factor = rounding_bound(d_factor, d_out.dtype) + own * d_out.double().abs()
    return torch.cat(in_order(d_z, d_factor, half), -1), torch.cat(in_order(of_z, of_factor, half), -1)
