"""Gradients of ``linear_act`` and ``linear_glu``: the operator registered with torch, and the Function that puts a
launched call into autograd's graph.

Both have the same backward. torch.compile traces the operator. An eager call launches first and is recorded by the
Function, which costs the host a quarter of what the operator costs.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from . import reference
from .fallback import HAS_TRITON, device_reason, forward_ad_is_active
from .kernels.gated import parse
from .reference import ACTIVATIONS, GATED, GRAD_FROM_OUTPUT, NEEDS_PREACT

if HAS_TRITON:
    from .kernels import elementwise
    from .kernels import linear_act as forward

Outputs = tuple[Tensor, Tensor | None]  # out and preact


def launch(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save_preact: bool) -> Outputs:
    """Return ``(out, preact)`` for x ``[..., K]``, by a kernel, in no graph; preact is None unless saved."""
    return forward.linear_act_fwd(x, weight, bias, activation=activation, save_preact=save_preact)


def check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> None:
    """Raise TypeError or ValueError for arguments of the operator that do not fit, without comparing dtypes."""
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is None and name == "bias":
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, but x is on {x.device}")
    if activation not in ACTIVATIONS and activation not in GATED:
        name = parse(activation)[0] if isinstance(activation, str) else activation
        raise ValueError(f"unknown activation {name!r}; expected one of {', '.join(ACTIVATIONS)}")
    if x.dim() < 1:
        raise ValueError("x must have at least one dimension, got a scalar")
    if weight.dim() != 2:
        raise ValueError(f"weight must be [N, K], got shape {tuple(weight.shape)}")
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x {tuple(x.shape)} and weight {tuple(weight.shape)} differ in K, their last dimension")
    if activation in GATED and weight.shape[0] % 2:
        raise ValueError(f"weight must have an even number of rows, two halves, got shape {tuple(weight.shape)}")
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0]):
        raise ValueError(f"bias must be [{weight.shape[0]}] for weight {tuple(weight.shape)}, got {tuple(bias.shape)}")


def check_dtypes(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise TypeError unless x, weight and bias have one dtype."""
    if x.dtype != weight.dtype or (bias is not None and bias.dtype != x.dtype):
        dtypes = f"x {x.dtype}, weight {weight.dtype}" + (f", bias {bias.dtype}" if bias is not None else "")
        raise TypeError(f"x, weight and bias must have one dtype, got {dtypes}")


_library = torch.library.Library("bert_fused", "DEF")
_library.define(
    "linear_act_fwd(Tensor x, Tensor weight, Tensor? bias, str activation, bool save_preact) -> (Tensor, Tensor)"
)
_library.define("linear_act_bwd(Tensor d_out, Tensor saved, str activation, bool bias_grad) -> (Tensor, Tensor)")


operator = torch.ops.bert_fused.linear_act_fwd


def _linear_act_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save_preact: bool
) -> tuple[Tensor, Tensor]:
    """Return ``(out, preact)`` for x ``[M, K]``, weight ``[N, K]``, bias ``[N]``; preact is empty unless saved.

    out is ``[M, N]``, for a gated activation ``[M, N / 2]``.
    """
    if x.dim() != 2:
        raise ValueError(f"x must be [M, K], got shape {tuple(x.shape)}")
    # Later eager calls use the plan made here and are not checked again.
    check(x, weight, bias, activation)
    check_dtypes(x, weight, bias)
    if device_reason(x.device, x.dtype) is None:
        out, preact = launch(x, weight, bias, activation, save_preact)
    else:
        preact = torch.nn.functional.linear(x, weight, bias)
        out = reference.act(preact, activation)
        # Outputs of an operator must not share memory.
        out = out.clone() if out is preact and save_preact else out
    return out, preact if save_preact and preact is not None else x.new_empty(0)


def _linear_act_bwd(d_out: Tensor, saved: Tensor, activation: str, bias_grad: bool) -> tuple[Tensor, Tensor]:
    """Return ``(d_preact, d_bias)`` for d_out and saved ``[M, N]``; d_bias is empty unless ``bias_grad``.

    For a gated activation saved is ``[M, 2N]``.
    """
    if (d_out.shape[0], d_out.shape[1] * (2 if activation in GATED else 1)) != saved.shape:
        raise ValueError(f"d_out {tuple(d_out.shape)} and saved {tuple(saved.shape)} differ in shape")
    if device_reason(saved.device, saved.dtype) is None:
        d_preact, d_bias = elementwise.act_bwd(d_out, saved, activation=activation, bias_grad=bias_grad)
        return d_preact, d_bias if d_bias is not None else saved.new_empty(0)
    d_preact = reference.act_grad(d_out, saved, activation).contiguous()
    # Outputs of an operator must not share memory with its inputs.
    d_preact = d_preact.clone() if d_preact is d_out else d_preact
    return d_preact, d_preact.sum(0) if bias_grad else saved.new_empty(0)


def _linear_act_fwd_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save_preact: bool
) -> tuple[Tensor, Tensor]:
    M, N = x.shape[0], weight.shape[0]
    out = x.new_empty(M, N // 2 if activation in GATED else N)
    return out, x.new_empty((M, N) if save_preact else (0,))


def _linear_act_bwd_fake(d_out: Tensor, saved: Tensor, activation: str, bias_grad: bool) -> tuple[Tensor, Tensor]:
    return saved.new_empty(saved.shape), saved.new_empty(saved.shape[1] if bias_grad else 0)


_library.impl("linear_act_fwd", _linear_act_fwd, "CompositeExplicitAutograd")
_library.impl("linear_act_bwd", _linear_act_bwd, "CompositeExplicitAutograd")
torch.library.register_fake("bert_fused::linear_act_fwd", _linear_act_fwd_fake, lib=_library)
torch.library.register_fake("bert_fused::linear_act_bwd", _linear_act_bwd_fake, lib=_library)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Save what the operator's backward needs for the wanted gradients, and nothing else.

    The pre-activation is saved as an output, although no caller sees it: a saved output knows where it came from, so
    that double backward differentiates through it without x, weight and bias (docs/design/autograd.md).
    """
    x, weight, bias, activation, save_preact = inputs
    out, preact = output
    x_grad, weight_grad = ctx.needs_input_grad[:2]
    recompute = not save_preact and activation in NEEDS_PREACT
    ctx.activation = activation
    ctx.set_materialize_grads(False)
    if not save_preact:
        ctx.mark_non_differentiable(preact)
    ctx.save_for_backward(
        x if weight_grad or recompute else None,
        weight if x_grad or recompute else None,
        bias if recompute else None,
        out if activation in GRAD_FROM_OUTPUT else preact if save_preact and activation != "none" else None,
    )


def _backward(ctx: Any, d_out: Tensor | None, *d_others: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, weight and bias, and None for the two arguments after them.

    d_others: if the pre-activation is an output, its gradient, which is None except in a double backward.
    """
    x, weight, bias, saved = ctx.saved_tensors
    x_grad, weight_grad, bias_grad = ctx.needs_input_grad[:3]
    activation = ctx.activation
    d_preact_direct = d_others[0] if d_others else None
    leading = next((t.shape[:-1] for t in (d_out, d_preact_direct) if t is not None), ())
    d_out, d_preact_direct, x, saved = _rows(d_out), _rows(d_preact_direct), _rows(x), _rows(saved)
    if activation in NEEDS_PREACT and saved is None:
        # The forward's kernel computes it again, so that it has the bits that would have been saved.
        saved = operator(x, weight, bias, "none", False)[0]
    elif activation in NEEDS_PREACT and not d_others and torch.is_grad_enabled():
        # Keep the saved value, and give it the derivative of the product that it came from.
        origin = operator(x, weight, ctx.bias, "none", False)[0]
        saved = saved + (origin - origin.detach())
    d_bias: Tensor | None = None
    if d_out is None:
        d_preact = d_preact_direct
    elif torch.is_grad_enabled() or forward_ad_is_active() or d_preact_direct is not None or activation == "none":
        # Second derivatives: only torch's own operations can be differentiated again.
        d_preact = reference.act_grad(d_out, saved, activation)
        d_preact = d_preact if d_preact_direct is None else d_preact + d_preact_direct
    else:
        d_preact, d_bias = torch.ops.bert_fused.linear_act_bwd(d_out, saved, activation, bias_grad)
    if d_preact is None:
        return None, None, None, None, None
    if bias_grad and d_bias is None:
        d_bias = d_preact.sum(0)
    d_x = (d_preact @ weight).reshape(*leading, weight.shape[1]) if x_grad else None
    d_weight = d_preact.t() @ x if weight_grad else None
    return d_x, d_weight, d_bias if bias_grad else None, None, None


def _rows(tensor: Any) -> Any:
    """Return a tensor ``[..., N]`` as ``[M, N]``: in an eager call tensors have the caller's dimensions."""
    if tensor is None or tensor.dim() == 2:
        return tensor
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])  # -1 is ambiguous where there is no element


torch.library.register_autograd("bert_fused::linear_act_fwd", _backward, setup_context=_save, lib=_library)


class _Record(torch.autograd.Function):
    """Record a launched call, ``(x, weight, bias, activation, (out, preact))``, in the graph.

    Returns a tuple that begins with out, which is then in the graph. x has any number of dimensions. This is a third of
    a call's time. A call with a plan saves the same tensors as one without, since checkpointing compares what forward
    and recomputation save.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, outputs: Outputs
    ) -> tuple[Tensor | None, ...]:
        out, preact = outputs
        saved = out if activation in GRAD_FROM_OUTPUT else preact
        ctx.activation = activation
        ctx.set_materialize_grads(False)
        if saved is None and activation in NEEDS_PREACT:
            ctx.save_for_backward(x, weight, bias, None)  # the backward pass recomputes the pre-activation
            return (out,)
        if x.requires_grad and weight.requires_grad:
            # One output costs less than two: with these a double backward can tie the pre-activation to its origin.
            ctx.save_for_backward(x, weight, None, saved)
            ctx.bias = bias  # eager allows it to change before the backward pass, and only its gradient is wanted
            return (out,)
        ctx.save_for_backward(x if weight.requires_grad else None, weight if x.requires_grad else None, None, saved)
        return outputs

    backward = staticmethod(_backward)


# ``apply`` without its check for functorch transforms, which takes half of its time: callers know that none is active.
record = cast(Callable[..., tuple[Tensor, ...]], super(torch.autograd.Function, _Record).apply)
