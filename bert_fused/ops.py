"""``linear_act`` and ``cls_pool``: checks, choice of path, autograd, and the operators registered with torch."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from . import reference
from .fallback import device_reason, fallback_reason, forward_ad_is_active, is_plain, log_once
from .kernels import replay
from .reference import ACTIVATIONS, GRAD_FROM_OUTPUT, NEEDS_PREACT

_library = torch.library.Library("bert_fused", "DEF")
_library.define(
    "linear_act_fwd(Tensor x, Tensor weight, Tensor? bias, str activation, bool save_preact) -> (Tensor, Tensor)"
)
_library.define("linear_act_bwd(Tensor d_out, Tensor saved, str activation, bool bias_grad) -> (Tensor, Tensor)")


def _linear_act_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save_preact: bool
) -> tuple[Tensor, Tensor]:
    """x ``[M, K]``, weight ``[N, K]``, bias ``[N]``; ``(out, preact)``, with an empty preact unless it is saved."""
    if x.dim() != 2:
        raise ValueError(f"x must be [M, K], got shape {tuple(x.shape)}")
    if device_reason(x.device, x.dtype) is None:
        from .kernels.linear_act import linear_act_fwd

        out, preact = linear_act_fwd(x, weight, bias, activation=activation, save_preact=save_preact)
    else:
        preact = torch.nn.functional.linear(x, weight, bias)
        out = reference.act(preact, activation)
        # Outputs of an operator must not share memory.
        out = out.clone() if out is preact and save_preact else out
    return out, preact if save_preact and preact is not None else x.new_empty(0)


def _linear_act_bwd(d_out: Tensor, saved: Tensor, activation: str, bias_grad: bool) -> tuple[Tensor, Tensor]:
    """d_out and saved ``[M, N]``; ``(d_preact, d_bias)``, with an empty d_bias unless it is asked for."""
    if device_reason(saved.device, saved.dtype) is None:
        from .kernels.act_grad import act_bwd

        d_preact, d_bias = act_bwd(d_out, saved, activation=activation, bias_grad=bias_grad)
        return d_preact, d_bias if d_bias is not None else saved.new_empty(0)
    d_preact = reference.act_grad(d_out, saved, activation).contiguous()
    # Outputs of an operator must not share memory with its inputs.
    d_preact = d_preact.clone() if d_preact is d_out else d_preact
    return d_preact, d_preact.sum(0) if bias_grad else saved.new_empty(0)


def _linear_act_fwd_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save_preact: bool
) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape if save_preact else (0,))


def _linear_act_bwd_fake(d_out: Tensor, saved: Tensor, activation: str, bias_grad: bool) -> tuple[Tensor, Tensor]:
    return saved.new_empty(saved.shape), saved.new_empty(saved.shape[1] if bias_grad else 0)


_library.impl("linear_act_fwd", _linear_act_fwd, "CompositeExplicitAutograd")
_library.impl("linear_act_bwd", _linear_act_bwd, "CompositeExplicitAutograd")
torch.library.register_fake("bert_fused::linear_act_fwd", _linear_act_fwd_fake, lib=_library)
torch.library.register_fake("bert_fused::linear_act_bwd", _linear_act_bwd_fake, lib=_library)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
    """Keep what the wanted gradients need, and nothing else.

    The pre-activation is kept as an output, although no caller sees it: a saved output knows where it came from, so
    that double backward differentiates through it without x, weight and bias (docs/design/autograd.md).
    """
    x, weight, bias, activation, save_preact = inputs
    out, preact = output
    x_grad, weight_grad = ctx.needs_input_grad[:2]
    from_output = activation in GRAD_FROM_OUTPUT
    recompute = not save_preact and activation in NEEDS_PREACT
    ctx.how = activation, save_preact, recompute
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        x if weight_grad or recompute else None,
        weight if x_grad or recompute else None,
        bias if recompute else None,
        out if from_output else preact if save_preact and activation != "none" else None,
    )


def _backward(
    ctx: Any, how: tuple[str, bool, bool], d_out: Tensor | None, *d_others: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias.

    d_others: the gradient of the pre-activation, where that is an output; None but in a double backward.
    """
    x, weight, bias, saved = ctx.saved_tensors
    activation, save_preact, recompute = how
    d_preact_direct = d_others[0] if d_others else None
    x_grad, weight_grad, bias_grad = ctx.needs_input_grad[:3]
    if not save_preact or torch.compiler.is_compiling():
        d_preact_direct = None  # of an empty tensor, or zeros that Dynamo makes: compiled code is differentiated once
    leading = next((t.shape[:-1] for t in (d_out, d_preact_direct) if t is not None), ())
    d_out, d_preact_direct, x, saved = _rows(d_out), _rows(d_preact_direct), _rows(x), _rows(saved)
    if recompute:
        # By the kernel of the forward, so that it has the bits that would have been saved.
        saved = torch.ops.bert_fused.linear_act_fwd(x, weight, bias, "none", False)[0]
    elif not d_others and activation in NEEDS_PREACT and torch.is_grad_enabled():
        # The saved value, with the derivative of where it came from.
        origin = torch.ops.bert_fused.linear_act_fwd(x, weight, ctx.bias, "none", False)[0]
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
        return None, None, None
    if bias_grad and d_bias is None:
        d_bias = d_preact.sum(0)
    d_x = (d_preact @ weight).reshape(*leading, weight.shape[1]) if x_grad else None
    d_weight = d_preact.t() @ x if weight_grad else None
    return d_x, d_weight, d_bias if bias_grad else None


def _rows(tensor: Any) -> Any:
    """A kept call's tensors have the caller's dimensions."""
    if tensor is None or tensor.dim() == 2:
        return tensor
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])  # -1 is ambiguous where there is no element


class _LinearAct(torch.autograd.Function):
    """``linear_act`` where a gradient is wanted: fewer steps per call than the operator's own registered autograd."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save_preact: bool
    ) -> tuple[Tensor, Tensor | None]:
        out, preact = torch.ops.bert_fused.linear_act_fwd(x, weight, bias, activation, save_preact)
        output = (out, preact if save_preact else None)
        _save(ctx, (x, weight, bias, activation, save_preact), output)
        return output

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_backward(ctx, ctx.how, *d_outputs), None, None


def _eager_graph(activation: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """``_LinearAct`` in eager mode: ``(x, weight, bias, (out, preact))`` to a tuple that begins with out and its graph,
    where x has any number of dimensions.

    One function for each activation, and as few steps as can be: this is a third of a call's time. A kept call and a
    new one save the same, since checkpointing compares what forward and recomputation save.
    """
    how = activation, activation in NEEDS_PREACT, False
    from_output = activation in GRAD_FROM_OUTPUT

    class LinearAct(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, outputs: tuple[Tensor, Tensor | None]
        ) -> tuple[Tensor | None, ...]:
            out, preact = outputs
            ctx.set_materialize_grads(False)
            if x.requires_grad and weight.requires_grad:
                # One output costs less than two: with these a double backward can tie the pre-activation to its origin.
                ctx.save_for_backward(x, weight, None, out if from_output else preact)
                ctx.bias = bias  # eager allows it to change before the backward pass, and only its gradient is wanted
                return (out,)
            ctx.save_for_backward(
                x if weight.requires_grad else None,
                weight if x.requires_grad else None,
                None,
                out if from_output else preact,
            )
            return outputs

        @staticmethod
        def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
            return *_backward(ctx, how, *d_outputs), None

    # What ``apply`` comes to where no functorch transform is active: half of its time goes into asking.
    return cast(Callable[..., tuple[Tensor, Tensor | None]], super(torch.autograd.Function, LinearAct).apply)


_graph_of = {activation: _eager_graph(activation) for activation in ACTIVATIONS}
_kept_call = replay.calls.get
_key_of = replay.key_of
_is_grad_enabled = torch.is_grad_enabled


torch.library.register_autograd(
    "bert_fused::linear_act_fwd",
    lambda ctx, *d_outputs: (*_backward(ctx, ctx.how, *d_outputs), None, None),
    setup_context=lambda ctx, inputs, output: _save(ctx, inputs, output),
    lib=_library,
)


def linear_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "gelu",
    *,
    recompute_preact: bool = False,
) -> Tensor:
    """``act(x @ weight.T + bias)``, differentiable, in one kernel launch where a kernel serves.

    Args:
        x: ``[..., K]``, any strides. fp16, bf16 and fp32 have kernels; other floating dtypes take the PyTorch path.
        weight: ``[N, K]``, of x's dtype and device.
        bias: ``[N]`` or None.
        activation: one of ``"gelu"`` (exact, erf), ``"gelu_tanh"``, ``"relu"``, ``"silu"``, ``"quick_gelu"``,
            ``"tanh"``, ``"none"``.
        recompute_preact: train in less memory: keep no pre-activation, ``[..., N]``, for the backward pass, which
            computes it again from x, weight and bias at the price of one more matrix product. Gradients have the same
            bits. ReLU and tanh, which need only the result, keep none either way; the PyTorch path keeps what eager
            keeps.

    Returns:
        ``[..., N]``, of x's dtype, or of autocast's where autocast is on.

    Raises:
        TypeError: an argument that is not a tensor, is not floating point, or whose dtype differs from the others'.
        ValueError: shapes or devices that do not fit, or an unknown activation.
    """
    if not recompute_preact and not torch.compiler.is_dynamo_compiling() and is_plain(x, weight, bias):
        needs_grad = _is_grad_enabled() and (
            weight.requires_grad or x.requires_grad or (bias is not None and bias.requires_grad)
        )
        call = _kept_call(_key_of(x, weight, bias, activation, needs_grad and activation in NEEDS_PREACT))
        output = call(x, weight, bias) if call is not None else None
        if output is not None:
            if needs_grad:
                return _graph_of[activation](x, weight, bias, output)[0]
            return output[0]
    if isinstance(x, Tensor) and x.is_nested:
        return reference.linear_act(x, weight, bias, activation)  # has no shape that could be checked
    _check(x, weight, bias, activation)
    device_type = x.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):  # meta has no autocast to ask for
        x, weight, bias = _autocast(x, weight, bias, torch.get_autocast_dtype(device_type))
    _check_dtypes(x, weight, bias)
    reason = fallback_reason(x, weight, bias)
    if reason is not None:
        if x.is_cuda and not torch.compiler.is_compiling():
            log_once(reason)
        return reference.linear_act(x, weight, bias, activation)

    needs_grad = torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    if torch.compiler.is_compiling() or (recompute_preact and needs_grad):
        rows = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.reshape(x.shape[:-1].numel(), 0)
        out = _call_operator(rows, weight, bias, activation, recompute_preact, needs_grad)
        return out if x.dim() == 2 else out.view(*x.shape[:-1], weight.shape[0])

    from .kernels.linear_act import linear_act_fwd

    save_preact = needs_grad and activation in NEEDS_PREACT
    output = linear_act_fwd(x, weight, bias, activation=activation, save_preact=save_preact)
    if needs_grad:
        return _graph_of[activation](x, weight, bias, output)[0]
    return output[0]


def _call_operator(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, recompute_preact: bool, needs_grad: bool
) -> Tensor:
    """x ``[M, K]`` to ``[M, N]`` by what torch.compile can trace."""
    if needs_grad:
        save_preact = not recompute_preact and activation in NEEDS_PREACT
        return _LinearAct.apply(x, weight, bias, activation, save_preact)[0]  # type: ignore[no-any-return, no-untyped-call]
    return cast(Tensor, torch.ops.bert_fused.linear_act_fwd(x, weight, bias, activation, False)[0])


def cls_pool(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "tanh",
    *,
    recompute_preact: bool = False,
) -> Tensor:
    """``act(hidden_states[:, 0] @ weight.T + bias)``: BERT's pooler. The first row of each sequence is read in place.

    Args:
        hidden_states: ``[B, S, K]``, S at least 1.
        weight, bias, activation, recompute_preact: as for ``linear_act``.

    Returns:
        ``[B, N]``.

    Raises:
        TypeError, ValueError: as ``linear_act``; also ValueError where ``hidden_states`` is not 3-D or has no tokens.
    """
    if not isinstance(hidden_states, Tensor):
        raise TypeError(f"hidden_states must be a torch.Tensor, got {type(hidden_states).__name__}")
    if hidden_states.dim() != 3 or hidden_states.shape[1] == 0:
        raise ValueError(f"hidden_states must be [B, S, K] with S >= 1, got shape {tuple(hidden_states.shape)}")
    return linear_act(hidden_states.select(1, 0), weight, bias, activation, recompute_preact=recompute_preact)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> None:
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is None and name == "bias":
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, but x is on {x.device}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
    if x.dim() < 1:
        raise ValueError("x must have at least one dimension, got a scalar")
    if weight.dim() != 2:
        raise ValueError(f"weight must be [N, K], got shape {tuple(weight.shape)}")
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x {tuple(x.shape)} and weight {tuple(weight.shape)} differ in K, their last dimension")
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0]):
        raise ValueError(f"bias must be [{weight.shape[0]}] for weight {tuple(weight.shape)}, got {tuple(bias.shape)}")


def _check_dtypes(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dtype != weight.dtype or (bias is not None and bias.dtype != x.dtype):
        dtypes = f"x {x.dtype}, weight {weight.dtype}" + (f", bias {bias.dtype}" if bias is not None else "")
        raise TypeError(f"x, weight and bias must have one dtype, got {dtypes}")


def _autocast(
    x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast as autocast casts the arguments of a linear layer: everything but float64."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)

    return cast(x), cast(weight), cast(bias) if bias is not None else None
