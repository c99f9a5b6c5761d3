"""Forward of a linear layer and its activation in one launch: ``out = act(x @ W.T + b)``.

x ``[M, K]``, W ``[N, K]``, b ``[N]``, out and preact ``[M, N]``, all of one dtype: fp16, bf16 or fp32. The product is
accumulated in fp32; bias and activation are applied to the accumulator, so the result is rounded once. ``preact`` is
``x @ W.T + b`` before the activation, stored on request for the backward pass.

The grouped order of tiles is that of Triton's matrix multiplication tutorial.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .act_pass import act_fwd
from .activations import apply_activation
from .configs import Config, get_config
from .launch import launch
from .runtime import arch_of


@triton.jit
def linear_act_fwd_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    out_ptr,
    preact_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SAVE_PREACT: tl.constexpr,
    EVEN_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """With TMA, x_ptr, w_ptr, out_ptr and preact_ptr are tensor descriptors, and the strides are unused."""
    # Tiles in groups of GROUP_M rows share their W tiles in L2.
    pid = tl.program_id(0)
    num_pid_m = tl.cdiv(M, BLOCK_M)
    num_pid_n = tl.cdiv(N, BLOCK_N)
    num_pid_in_group = GROUP_M * num_pid_n
    first_pid_m = (pid // num_pid_in_group) * GROUP_M
    group_size_m = tl.minimum(num_pid_m - first_pid_m, GROUP_M)
    pid_m = first_pid_m + (pid % num_pid_in_group) % group_size_m
    pid_n = (pid % num_pid_in_group) // group_size_m
    start_m = pid_m * BLOCK_M
    start_n = pid_n * BLOCK_N

    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if TMA:
        for k in range(0, K, BLOCK_K):
            x = x_ptr.load([start_m, k])
            w = w_ptr.load([start_n, k])
            acc = tl.dot(x, w.T, acc, input_precision=INPUT_PRECISION)
    else:
        # Rows past the end read the last one again and are dropped when stored: masks would cost registers.
        rows = tl.minimum(offs_m, M - 1).to(tl.int64)
        cols = tl.minimum(offs_n, N - 1).to(tl.int64)
        offs_k = tl.arange(0, BLOCK_K)
        x_ptrs = x_ptr + rows[:, None] * stride_xm + offs_k[None, :].to(tl.int64) * stride_xk
        w_ptrs = w_ptr + cols[None, :] * stride_wn + offs_k[:, None].to(tl.int64) * stride_wk
        for k in range(0, K, BLOCK_K):
            if EVEN_K:
                x = tl.load(x_ptrs)
                w = tl.load(w_ptrs)
            else:
                mask_k = offs_k < K - k
                x = tl.load(x_ptrs, mask=mask_k[None, :], other=0.0)
                w = tl.load(w_ptrs, mask=mask_k[:, None], other=0.0)
            acc = tl.dot(x, w, acc, input_precision=INPUT_PRECISION)
            x_ptrs += tl.cast(stride_xk, tl.int64) * BLOCK_K
            w_ptrs += tl.cast(stride_wk, tl.int64) * BLOCK_K

    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]

    if TMA:
        if SAVE_PREACT:
            preact_ptr.store([start_m, start_n], acc.to(preact_ptr.dtype))
        out_ptr.store([start_m, start_n], apply_activation(acc, ACTIVATION, out_ptr.dtype).to(out_ptr.dtype))
    else:
        # One 64-bit base for the tile and 32-bit offsets inside it: 64-bit offsets per element would spill.
        base = start_m.to(tl.int64) * N + start_n
        offs = tl.arange(0, BLOCK_M)[:, None] * N + tl.arange(0, BLOCK_N)[None, :]
        mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
        if SAVE_PREACT:
            tl.store(preact_ptr + base + offs, acc.to(preact_ptr.dtype.element_ty), mask=mask)
        out = apply_activation(acc, ACTIVATION, out_ptr.dtype.element_ty)
        tl.store(out_ptr + base + offs, out.to(out_ptr.dtype.element_ty), mask=mask)


def linear_act_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    activation: str,
    save_preact: bool,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``(out, preact)``, both contiguous ``[M, N]``; preact is None unless ``save_preact``.

    x ``[M, K]`` and weight ``[N, K]`` may have any strides. ``config`` overrides the lookup; one for TMA needs every
    row of x, weight and out on a 16-byte boundary.
    """
    M, K = x.shape
    N = weight.shape[0]
    if M == 0 or N == 0:
        return x.new_empty(M, N), x.new_empty(M, N) if save_preact else None
    if config is None:
        config = get_config(
            M, N, K, _precision(x.dtype), arch_of(x.device), aligned=_is_aligned(x, N) and _is_aligned(weight, N)
        )
    if config.kernel == "library":
        product = torch.nn.functional.linear(x, weight, bias)
        out = act_fwd(product, activation, out=torch.empty_like(product) if save_preact else product)
        return out, product if save_preact else None

    out = x.new_empty(M, N)
    preact = x.new_empty(M, N) if save_preact else None
    tma = config.kernel == "tma"
    arguments: tuple[Any, ...] = (x, weight, out, preact)
    if tma:
        tiles = [(config.block_m, config.block_k), (config.block_n, config.block_k)]
        tiles += 2 * [(config.block_m, config.block_n)]
        arguments = tuple(
            None if tensor is None else TensorDescriptor.from_tensor(tensor, list(tile))
            for tensor, tile in zip(arguments, tiles, strict=True)
        )
    x_arg, w_arg, out_arg, preact_arg = arguments
    grid = (triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n),)
    launch(
        linear_act_fwd_kernel,
        grid,
        x_arg,
        w_arg,
        bias.contiguous() if bias is not None else None,
        out_arg,
        preact_arg,
        M,
        N,
        K,
        x.stride(0),
        x.stride(1),
        weight.stride(0),
        weight.stride(1),
        ACTIVATION=activation,
        HAS_BIAS=bias is not None,
        SAVE_PREACT=save_preact,
        EVEN_K=K % config.block_k == 0,
        INPUT_PRECISION="tf32" if config.dtype == "tf32" else "ieee",
        TMA=tma,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )
    return out, preact


def _precision(dtype: torch.dtype) -> str:
    """The ``Config.dtype`` that serves a tensor dtype under torch's current fp32 setting."""
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return str(dtype).removeprefix("torch.")


def _is_aligned(matrix: torch.Tensor, N: int) -> bool:
    """Whether every row of ``matrix``, and of an output with N columns, is contiguous and on a 16-byte boundary."""
    columns = matrix.shape[1]
    row_stride, column_stride = matrix.stride()
    elements = 16 // matrix.element_size()
    return (
        column_stride == 1
        and row_stride >= columns
        and row_stride % elements == columns % elements == N % elements == 0
        and matrix.data_ptr() % 16 == 0
    )
