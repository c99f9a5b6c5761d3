"""Check that a function computes ``act(x @ W.T + b)``, before it is timed."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels.gated import parse
from ..reference import error_bound, linear_act, rms_error

LinearAct = Callable[[Tensor, Tensor, Tensor], Tensor]

# A result outside the bound may be as far from fp64 as eager's, and no further; 1.001 allows for ties.
EAGER_RATIO = 1.001


def check(function: LinearAct, activation: str, x: Tensor, weight: Tensor, bias: Tensor) -> dict[str, float]:
    """Return the errors of ``function(x, weight, bias)`` against fp64 if it passes two tests.

    On a sweep of pre-activations that every dtype (and TF32) holds exactly, each result must be within the promised
    bound, which tells tanh GELU from erf. On the given data results must be within it, or no worse than eager's.

    A gated activation may be rounded before the product, as PyTorch and oneDNN round it, which is twice the bound on
    the sweep. On the given data that may by chance add up to more than eager's four roundings do, so only the RMS error
    is compared there: docs/design/error.md.

    Raises:
        ValueError: the result is wrong.
    """
    is_gated = parse(activation)[1] != ""
    sweep_x, sweep_weight = torch.zeros_like(x), torch.zeros_like(weight)
    sweep_x[..., 0] = 1
    sweep = torch.linspace(-6, 6, len(weight) // 2 if is_gated else len(weight)).bfloat16()
    sweep_weight[:, 0] = torch.cat((sweep, -sweep)) if is_gated else sweep
    bounds = 2 if is_gated else 1
    _, _, outside = _errors(function, activation, sweep_x, sweep_weight, torch.zeros_like(bias), bounds)
    if outside:
        raise ValueError(f"wrong result: not {activation}, {outside} elements of a sweep are outside the bound")
    maximum, rms, outside = _errors(function, activation, x, weight, bias)
    eager_maximum, eager_rms, _ = _errors(
        lambda x, weight, bias: linear_act(rows_of(x), weight, bias, activation), activation, x, weight, bias
    )
    no_worse = rms <= EAGER_RATIO * eager_rms and (is_gated or maximum <= EAGER_RATIO * eager_maximum)
    if outside and not no_worse:
        of = f"RMS error {rms:.3g}, eager's {eager_rms:.3g}"
        raise ValueError(f"wrong result: max error {maximum:.3g}, eager's {eager_maximum:.3g}; {of}")
    return {"max_abs_error": maximum, "rms_error": rms, "eager_max_abs_error": eager_maximum}


def rows_of(x: Tensor) -> Tensor:
    """Return the rows that enter the product: all of ``[M, K]``, or each sequence's first of ``[B, S, K]`` (pooler)."""
    return x[:, 0] if x.dim() == 3 else x


def _errors(
    function: LinearAct, activation: str, x: Tensor, weight: Tensor, bias: Tensor, bounds: int = 1
) -> tuple[float, float, int]:
    """Return the largest error, the RMS error, and how many elements' errors exceed ``bounds`` times the promised."""
    rows = rows_of(x)
    exact = linear_act(rows.double(), weight.double(), bias.double(), activation)
    bound = error_bound(rows, weight, bias, activation, exact, x.dtype)
    # The function will allocate this freed memory, full of NaN, so that an element it leaves unwritten shows.
    freed = [torch.full_like(exact, math.nan, dtype=x.dtype) for _ in range(4)]
    del freed
    result = function(x, weight, bias)
    error = (result.double() - exact).abs()
    return error.max().item(), rms_error(result, exact), int((~(error <= bounds * bound)).sum())
