"""One pass over a matrix: the activation after cuBLAS's product, and its backward.

``out = act(preact)``; ``d_preact = d_out * act'(z)`` and ``d_bias = d_preact.sum(0)``. All are ``[M, N]`` but d_bias,
``[N]``. For a gated activation (``gated.py``) preact and d_preact are ``[M, 2N]``, and d_bias ``[2N]``. Each block of
the backward pass writes the fp32 sum of its own rows, and the sums of all blocks are added afterwards: no atomics, so
the same call gives the same bits.
"""

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import apply_activation, apply_activation_grad, apply_gated, apply_gated_grad
from .gated import parse
from .plan import Launch, Outputs, Plan, keep, key_of, plans
from .runtime import num_sms

FWD_BLOCK = 1024

# A thread loads and stores 8 elements at a time (16 bytes, if they have 16 bits), so each of 4 warps covers 2 rows.
BLOCK_M = 16
BLOCK_N = 128
# Half as many rows where a block has the same columns of two halves: with 16 it spills in fp32.
GATED_BLOCK_M = 8
MAX_ROWS_PER_PROGRAM = 128
# Blocks that an SM should have in flight: each loads 8 KB at a time, and to hide the latency of memory an SM of an H100
# needs some 20 KB in flight. Computed, not measured on a GPU.
BLOCKS_PER_SM = 4


@triton.jit
def act_fwd_kernel(preact_ptr, out_ptr, numel, N, ACTIVATION: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offs = start + tl.arange(0, BLOCK)
    mask = offs < numel
    if GATED == "":
        z = tl.load(preact_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        out = apply_activation(z, ACTIVATION, out_ptr.dtype.element_ty)
    else:
        # Only the first row is found by a 64-bit division: one per element would take longer than the loads.
        row = start // N
        cols = (start - row * N).to(tl.int32) + tl.arange(0, BLOCK)
        a_ptrs = preact_ptr + row * 2 * N + (cols + cols // N * N)
        a = tl.load(a_ptrs, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(a_ptrs + N, mask=mask, other=0.0).to(tl.float32)
        out = apply_gated(a, b, ACTIVATION, GATED, out_ptr.dtype.element_ty)
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=mask)


def act_fwd(numel: int, activation: str, N: int | None = None) -> Launch:
    """Return a launch that takes ``(preact, out)`` and writes ``act(preact)`` to out.

    Both are contiguous and of one dtype; out has ``numel`` elements, and may be preact itself. For a gated activation
    out has rows of N elements, and preact is another tensor.
    """
    name, half = parse(activation)
    constants = {"ACTIVATION": name, "GATED": half, "BLOCK": FWD_BLOCK, "enable_fp_fusion": True}
    return Launch(act_fwd_kernel, triton.cdiv(numel, FWD_BLOCK), (numel, N), constants)


def library_plan(shape: tuple[int, ...], activation: str, save_preact: bool) -> Plan:
    """Return a plan that computes ``act(x @ W.T + b)``, of this shape, by cuBLAS and one activation pass."""
    N = shape[-1] if parse(activation)[1] else None
    launch = act_fwd(math.prod(shape), activation, N) if activation != "none" or save_preact else None

    def plan(x: Tensor, weight: Tensor, bias: Tensor | None) -> Outputs:
        product = _product(x, weight, bias)
        out = product.new_empty(shape) if save_preact or N else product
        if launch is not None:
            launch(product, out)
        return out, product if save_preact else None

    return plan


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``F.linear`` of the arguments, in no graph and in x's dtype."""
    if torch.is_grad_enabled():
        with torch.no_grad():
            return _product(x, weight, bias)
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return _product(x, weight, bias)
    if x.dim() == 2:
        return torch.nn.functional.linear(x, weight, bias)
    # For more dimensions ``F.linear`` returns a view, which could not be detached in place, and may round before it
    # adds the bias.
    product = torch.nn.functional.linear(x.reshape(x.shape[:-1].numel(), x.shape[-1]), weight, bias)
    return product.resize_(*x.shape[:-1], weight.shape[0])


@triton.jit
def act_bwd_kernel(
    d_out_ptr, saved_ptr, d_preact_ptr, partial_ptr,
    M, N,
    stride_dm, stride_dn,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, BIAS_GRAD: tl.constexpr,
    ROWS_PER_PROGRAM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    num_pid_n = tl.cdiv(N, BLOCK_N)
    pid_m = tl.program_id(0) // num_pid_n
    pid_n = tl.program_id(0) % num_pid_n
    offs_m = pid_m.to(tl.int64) * ROWS_PER_PROGRAM + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    width = 2 * N if GATED != "" else N
    offs = offs_m[:, None] * width + offs_n[None, :]
    d_out_ptrs = d_out_ptr + offs_m[:, None] * stride_dm + offs_n[None, :].to(tl.int64) * stride_dn
    # Rows are summed once, at the end: a sum across threads in every step would make all of them wait for each other.
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    total_b = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for _ in range(0, ROWS_PER_PROGRAM, BLOCK_M):
        mask = (offs_m < M)[:, None] & mask_n[None, :]
        d_out = tl.load(d_out_ptrs, mask=mask, other=0.0).to(tl.float32)
        saved = tl.load(saved_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        if GATED == "":
            d_preact = apply_activation_grad(d_out, saved, ACTIVATION, saved_ptr.dtype.element_ty)
        else:
            b = tl.load(saved_ptr + offs + N, mask=mask, other=0.0).to(tl.float32)
            d_preact, d_b = apply_gated_grad(d_out, saved, b, ACTIVATION, GATED, saved_ptr.dtype.element_ty)
            tl.store(d_preact_ptr + offs + N, d_b.to(d_preact_ptr.dtype.element_ty), mask=mask)
            if BIAS_GRAD:
                total_b += d_b
        tl.store(d_preact_ptr + offs, d_preact.to(d_preact_ptr.dtype.element_ty), mask=mask)
        if BIAS_GRAD:
            total += d_preact
        offs_m += BLOCK_M
        offs += tl.cast(width, tl.int64) * BLOCK_M
        d_out_ptrs += tl.cast(stride_dm, tl.int64) * BLOCK_M
    if BIAS_GRAD:
        partial_ptrs = partial_ptr + pid_m.to(tl.int64) * width + offs_n
        tl.store(partial_ptrs, tl.sum(total, axis=0), mask=mask_n)
        if GATED != "":
            tl.store(partial_ptrs + N, tl.sum(total_b, axis=0), mask=mask_n)


def rows_per_program(M: int, N: int, num_sms: int) -> int:
    """Return how many rows a block works through.

    As many as leave every SM enough blocks, since each block adds a row of sums.
    """
    rows = M * triton.cdiv(N, BLOCK_N) // (BLOCKS_PER_SM * num_sms)
    power_of_two: int = triton.next_power_of_2(rows + 1) // 2
    return min(max(power_of_two, BLOCK_M), MAX_ROWS_PER_PROGRAM)


def act_bwd(d_out: Tensor, saved: Tensor, *, activation: str, bias_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Return ``(d_preact, d_bias)``; d_bias is None unless ``bias_grad``.

    d_out ``[M, N]`` may have any strides. saved ``[M, N]`` is the output for relu and tanh, the pre-activation for the
    other activations; ``[M, 2N]`` for a gated one.
    """
    saved = saved.contiguous()
    key = key_of(d_out, saved, None, f"backward of {activation}", bias_grad)
    plan = plans.get(key)
    if plan is None:
        plan = _backward_plan(d_out, saved, activation, bias_grad)
        keep(key, plan)
    gradients: tuple[Tensor, Tensor | None] = plan(d_out, saved)
    return gradients


def _backward_plan(
    d_out: Tensor, saved: Tensor, activation: str, bias_grad: bool
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]:
    (M, N), width = d_out.shape, saved.shape[1]
    name, half = parse(activation)
    rows = rows_per_program(M, N, num_sms(saved.device))
    num_pid_m = triton.cdiv(M, rows)
    constants = {
        "ACTIVATION": name,
        "GATED": half,
        "BIAS_GRAD": bias_grad,
        "ROWS_PER_PROGRAM": rows,
        "BLOCK_M": GATED_BLOCK_M if half else BLOCK_M,
        "BLOCK_N": BLOCK_N,
        "enable_fp_fusion": True,
    }
    launch = Launch(act_bwd_kernel, num_pid_m * triton.cdiv(N, BLOCK_N), (M, N, *d_out.stride()), constants)

    def plan(d_out: Tensor, saved: Tensor) -> tuple[Tensor, Tensor | None]:
        d_preact = torch.empty_like(saved)
        partial = torch.empty(num_pid_m, width, dtype=torch.float32, device=saved.device) if bias_grad else None
        if M and N:
            launch(d_out, saved, d_preact, partial)
        return d_preact, partial.sum(0).to(saved.dtype) if partial is not None else None

    return plan
