"""``linear_act``, ``linear_glu`` and ``cls_pool``: check the arguments, and choose the path."""

import functools
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from . import onednn, reference
from .autograd import check, check_dtypes, launch, operator, record
from .fallback import HAS_TRITON, device_reason, fallback_reason, is_disabled, is_plain, log_once
from .kernels.gated import HALVES, gated
from .reference import NEEDS_PREACT

if HAS_TRITON:
    from .kernels.plan import keep, key_of, plans

ONEDNN = "oneDNN where no gradient is wanted"  # a path, as reports print it

_is_grad_enabled = torch.is_grad_enabled


def linear_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "gelu",
    *,
    recompute_preact: bool = False,
) -> Tensor:
    """Return ``act(x @ weight.T + bias)``, differentiable, in one kernel launch where a fused kernel serves.

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
        TypeError: an argument is not a tensor or not floating point, or its dtype differs from the others'.
        ValueError: shapes or devices do not fit, or the activation is unknown.
    """
    if not torch.compiler.is_dynamo_compiling() and is_plain(x, weight, bias):
        needs_grad = _is_grad_enabled() and (
            weight.requires_grad or x.requires_grad or (bias is not None and bias.requires_grad)
        )
        save_preact = needs_grad and not recompute_preact and activation in NEEDS_PREACT
        plan = plans.get(key_of(x, weight, bias, activation, save_preact))
        if plan is not None and not needs_grad:  # an equal call has passed the checks below
            return plan(x, weight, bias)[0]
        if plan is not None and type(plan) is not functools.partial:  # those of _on_cpu have no gradient
            return record(x, weight, bias, activation, plan(x, weight, bias))[0]
    return _new_call(x, weight, bias, activation, recompute_preact)


def linear_glu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "gelu",
    *,
    activated: Literal["first", "second"] = "first",
    recompute_preact: bool = False,
) -> Tensor:
    """Return ``act(a) * b``, where ``a, b = (x @ weight.T + bias).chunk(2, dim=-1)``: a gated MLP's first half.

    In one kernel launch where a fused kernel serves, differentiable; both halves of the weight are read in place.

    Args:
        x: as for ``linear_act``.
        weight: ``[2N, K]``: the rows of a, then those of b.
        bias: ``[2N]`` or None.
        activation: as for ``linear_act``. ``"silu"`` makes it SwiGLU, ``"none"`` the bilinear unit.
        activated: ``"second"`` for models that compute ``a * act(b)``.
        recompute_preact: as for ``linear_act``; here every activation keeps its pre-activation, ``[..., 2N]``.

    Returns:
        ``[..., N]``, of x's dtype, or of autocast's where autocast is on.

    Raises:
        TypeError: as ``linear_act``.
        ValueError: as ``linear_act``; also if the weight's rows do not make two halves, or ``activated`` is none of the
            two.
    """
    if activated not in HALVES:
        raise ValueError(f"activated must be one of {', '.join(HALVES)}, got {activated!r}")
    return linear_act(x, weight, bias, gated(activation, activated), recompute_preact=recompute_preact)


def cls_pool(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "tanh",
    *,
    recompute_preact: bool = False,
) -> Tensor:
    """Return ``act(hidden_states[:, 0] @ weight.T + bias)``, BERT's pooler; reads each sequence's first row in place.

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


def path_name(device: torch.device, dtype: torch.dtype, kind: onednn.Kind = "activation") -> str:
    """Return what serves most calls on tensors of this device and dtype: "Triton", ``ONEDNN``, or PyTorch and why."""
    reason = device_reason(device, dtype)
    if reason is None:
        return "Triton"
    if device.type == "cpu" and dtype in onednn.from_rows(kind) and not is_disabled():
        return ONEDNN
    return f"PyTorch ({reason})"


def _new_call(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, recompute_preact: bool) -> Tensor:
    """Serve a call of ``linear_act`` that has no plan: check it, cast it, and take the path that can serve it."""
    if isinstance(x, Tensor) and x.is_nested:
        return reference.linear_act(x, weight, bias, activation)  # a nested tensor has no shape to check
    check(x, weight, bias, activation)
    device_type = x.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):  # meta has no autocast to ask for
        x, weight, bias = _autocast(x, weight, bias, torch.get_autocast_dtype(device_type))
    check_dtypes(x, weight, bias)
    needs_grad = torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    reason = fallback_reason(x, weight, bias)
    if reason is not None:
        if torch.compiler.is_compiling():
            return reference.linear_act(x, weight, bias, activation)
        if x.is_cuda:
            log_once(reason)
        if needs_grad or x.device.type != "cpu":
            return reference.linear_act(x, weight, bias, activation)
        return _on_cpu(x, weight, bias, activation)

    save_preact = needs_grad and not recompute_preact and activation in NEEDS_PREACT
    if torch.compiler.is_compiling():
        rows = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.reshape(x.shape[:-1].numel(), 0)
        out: Tensor = operator(rows, weight, bias, activation, save_preact)[0]
        return out if x.dim() == 2 else out.view(*x.shape[:-1], out.shape[1])
    outputs = launch(x, weight, bias, activation, save_preact)
    return record(x, weight, bias, activation, outputs)[0] if needs_grad else outputs[0]


def _on_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """Serve a call that needs no gradient by oneDNN or PyTorch, and keep the choice for equal calls."""
    function = onednn.linear_act if onednn.serves(x, weight, bias, activation) else reference.linear_act
    if HAS_TRITON and is_plain(x, weight, bias):
        keep(key_of(x, weight, bias, activation, False), functools.partial(_outputs, function, activation))
    return function(x, weight, bias, activation)


def _outputs(
    function: Callable[..., Tensor], activation: str, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, None]:
    return function(x, weight, bias, activation), None


def _autocast(
    x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast as autocast casts the arguments of a linear layer: everything but float64."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)

    return cast(x), cast(weight), cast(bias) if bias is not None else None
