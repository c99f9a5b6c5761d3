"""Forward of a linear layer and its activation in one launch: ``out = act(x @ W.T + b)``.

x ``[M, K]``, W ``[N, K]``, b ``[N]``, out and preact ``[M, N]``, all of one dtype: fp16, bf16 or fp32. The product is
accumulated in fp32; bias and activation are applied to the accumulator, so the result is rounded once. ``preact`` is
``x @ W.T + b`` before the activation, stored on request for the backward pass.

For a gated activation (``gated.py``) W is ``[2N, K]``, b ``[2N]`` and preact ``[M, 2N]``: a tile of out comes from two
accumulators, one for each half of W's rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .configs import Config
from .elementwise import library_plan
from .gated import gated_config, parse
from .lookup import get_config
from .plan import LAUNCHER_IS_KNOWN, Launch, Matrix, Outputs, Plan, keep, key_of, plans
from .runtime import arch_of, name_of, num_sms
from .tiles import store, tile_start

if LAUNCHER_IS_KNOWN:  # Gluon is experimental: another Triton's may lack what this needs, or mean something else by it
    from . import hopper


@triton.jit
def _product_tma(
    x_desc, w_desc, start_m, start_n, N, K,
    GATED: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return a tile of ``x @ W.T`` and, if GATED, the one N columns further right.

    Loads through descriptors, which read zeros outside of x and W.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc_b = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        x = x_desc.load([start_m, k])
        w = w_desc.load([start_n, k])
        acc = tl.dot(x, w.T, acc, input_precision=INPUT_PRECISION)
        if GATED != "":
            w_b = w_desc.load([N + start_n, k])
            acc_b = tl.dot(x, w_b.T, acc_b, input_precision=INPUT_PRECISION)
    return acc, acc_b


@triton.jit
def _product_pointer(
    x_ptr, w_ptr, start_m, start_n, M, N, K,
    stride_xm, stride_xk, stride_wn, stride_wk,
    GATED: tl.constexpr, EVEN_K: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return the same as ``_product_tma``, but load through pointers."""
    # Rows past the end read the last one again and are dropped when stored: masks would cost registers.
    rows = tl.minimum(start_m + tl.arange(0, BLOCK_M), M - 1).to(tl.int64)
    cols = tl.minimum(start_n + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    ks = offs_k.to(tl.int64)
    x_ptrs = x_ptr + rows[:, None] * stride_xm + ks[None, :] * stride_xk
    w_ptrs = w_ptr + cols[None, :] * stride_wn + ks[:, None] * stride_wk
    to_b = tl.cast(N, tl.int64) * stride_wn
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc_b = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            mask_k = offs_k < K - k
            x = tl.load(x_ptrs, mask=mask_k[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=mask_k[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=INPUT_PRECISION)
        if GATED != "":
            w_b = tl.load(w_ptrs + to_b) if EVEN_K else tl.load(w_ptrs + to_b, mask=mask_k[:, None], other=0.0)
            acc_b = tl.dot(x, w_b, acc_b, input_precision=INPUT_PRECISION)
        x_ptrs += tl.cast(stride_xk, tl.int64) * BLOCK_K
        w_ptrs += tl.cast(stride_wk, tl.int64) * BLOCK_K
    return acc, acc_b


@triton.jit
def linear_act_fwd_kernel(
    x_ptr, w_ptr, bias_ptr, out_ptr, preact_ptr,
    M, N, K,
    stride_xm, stride_xk, stride_wn, stride_wk,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, SAVE_PREACT: tl.constexpr,
    EVEN_K: tl.constexpr, INPUT_PRECISION: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    PERSISTENT: tl.constexpr, SUBTILES: tl.constexpr,
):  # fmt: skip
    """Write ``act(x @ W.T + b)`` to out and, if SAVE_PREACT, ``x @ W.T + b`` to preact.

    GATED: the half that is activated, "first" or "second", of W's 2N rows; "" if W has N rows.
    With TMA, x_ptr, w_ptr, out_ptr and preact_ptr are tensor descriptors, and the strides are unused; if GATED, N is a
    multiple of BLOCK_N then. The grid has a block per tile, or any number of blocks if PERSISTENT. K is at least 1.
    """
    # Without this the compiler guards the loop over K, and behind that guard ptxas 12.8 (Triton 3.6) serializes wgmma.
    tl.assume(K > 0)
    if PERSISTENT:
        num_tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
        first, stop, step = tl.program_id(0), num_tiles, tl.num_programs(0)
    else:
        first, stop, step = 0, 1, 1  # constants: the compiler drops the loop
    for index in range(first, stop, step):
        tile = index if PERSISTENT else tl.program_id(0)
        start_m, start_n = tile_start(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        # Loaded before the product and added after it, so that no thread waits for the bias: if the sum started with
        # the bias, the first tiles would wait for one latency of memory.
        if HAS_BIAS:
            offs_n = start_n + tl.arange(0, BLOCK_N)
            bias = tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0)
            if GATED != "":
                bias_b = tl.load(bias_ptr + N + offs_n, mask=offs_n < N, other=0.0)
        if TMA:
            acc, acc_b = _product_tma(
                x_ptr, w_ptr, start_m, start_n, N, K, GATED, INPUT_PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
            )
        else:
            acc, acc_b = _product_pointer(
                x_ptr, w_ptr, start_m, start_n, M, N, K, stride_xm, stride_xk, stride_wn, stride_wk,
                GATED, EVEN_K, INPUT_PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        if HAS_BIAS:
            acc += bias.to(tl.float32)[None, :]
            if GATED != "":
                acc_b += bias_b.to(tl.float32)[None, :]
        store(acc, acc_b, out_ptr, preact_ptr, start_m, start_n, M, N, ACTIVATION, GATED, SAVE_PREACT, TMA, SUBTILES)


def linear_act_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str,
    save_preact: bool,
    config: Config | None = None,
) -> Outputs:
    """Return ``(out, preact)``, both contiguous ``[..., N]`` and in no graph; preact is None unless ``save_preact``.

    x ``[..., K]`` and weight ``[N, K]`` may have any strides. For a gated activation weight is ``[2N, K]`` and preact
    ``[..., 2N]``. A given ``config`` is used instead of the tables and the kept plans; one for TMA needs every row of
    x, weight and out on a 16-byte boundary and, for a gated activation, N to be a multiple of its ``block_n``.
    """
    if config is not None:
        return _make_plan(x, weight, bias, activation, save_preact, config)(x, weight, bias)
    key = key_of(x, weight, bias, activation, save_preact)
    plan = plans.get(key)
    if plan is None:
        plan = _make_plan(x, weight, bias, activation, save_preact, None)
        if x.numel() and weight.numel():  # the key of an empty CPU tensor is also that of one on the meta device
            keep(key, plan)
    outputs: Outputs = plan(x, weight, bias)
    return outputs


def _make_plan(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save_preact: bool, config: Config | None
) -> Plan:
    """Return a function of x, weight and bias that serves this call and every call with the same key."""
    width, K = weight.shape
    half = parse(activation)[1]
    N = width // 2 if half else width
    M = x.shape[:-1].numel()
    shape, preact_shape = (*x.shape[:-1], N), (*x.shape[:-1], width)
    if M == 0 or N == 0:
        return lambda x, *_: (x.new_empty(shape), x.new_empty(preact_shape) if save_preact else None)
    rows = x.detach().reshape(M, K)
    if config is None:
        aligned = _is_aligned(rows, N) and _is_aligned(weight, N)
        precision, arch, device = _precision(x.dtype), arch_of(x.device), name_of(x.device)
        config = get_config(M, width, K, precision, arch, aligned=aligned, device=device)
        if config.kernel == "hopper" and not LAUNCHER_IS_KNOWN:  # measured on this machine with another Triton
            config = get_config(M, width, K, precision, arch, aligned=aligned)
        config = gated_config(config, M, N, arch) if half else config
    if config.kernel == "library" or K == 0:  # a product of nothing is the bias, and the kernel assumes K > 0
        return library_plan(shape, activation, save_preact)

    launch = _launch_of(rows, weight, bias, activation, save_preact, config)
    copies_x = rows.data_ptr() != x.data_ptr()
    copies_bias = bias is not None and not bias.is_contiguous()

    def plan(x: Tensor, weight: Tensor, bias: Tensor | None) -> Outputs:
        if copies_x:
            x = x.contiguous()
        if copies_bias and bias is not None:
            bias = bias.contiguous()
        out = x.new_empty(*shape)  # a tuple would take longer
        preact = x.new_empty(*preact_shape) if save_preact else None
        launch(x, weight, bias, out, preact)
        return out, preact

    return plan


def _launch_of(
    rows: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save_preact: bool, config: Config
) -> Launch:
    """Return a launch of the kernel that takes ``(x, weight, bias, out, preact)``. rows: x as ``[M, K]``."""
    (M, K), width = rows.shape, weight.shape[0]
    name, half = parse(activation)
    N = width // 2 if half else width
    num_blocks = triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n)
    if config.persistent:
        num_blocks = min(num_blocks, config.persistent * num_sms(rows.device))
    matrices = None
    if config.kernel in ("tma", "hopper"):

        def matrix(shape: list[int], strides: tuple[int, ...], *block_shape: int) -> Matrix:
            descriptor = hopper.describe if config.kernel == "hopper" else TensorDescriptor
            return Matrix(shape, [*strides], [*block_shape], descriptor)

        stored = config.block_m, config.block_n // config.subtiles
        matrices = (
            matrix([M, K], rows.stride(), config.block_m, config.block_k),
            matrix([width, K], weight.stride(), config.block_n, config.block_k),
            None,
            matrix([M, N], (N, 1), *stored),
            matrix([M, width], (width, 1), *stored),
        )
    if config.kernel == "hopper":
        constants = hopper.constants_of(config, activation, bias is not None, save_preact)
        return Launch(hopper.linear_act_hopper_kernel, num_blocks, (M, N, K), constants, matrices)
    constants = {
        "ACTIVATION": name,
        "GATED": half,
        "HAS_BIAS": bias is not None,
        "SAVE_PREACT": save_preact,
        "EVEN_K": K % config.block_k == 0,
        "INPUT_PRECISION": "tf32" if config.dtype == "tf32" else "ieee",
        "TMA": config.kernel == "tma",
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "PERSISTENT": config.persistent > 0,
        "SUBTILES": config.subtiles,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": True,
    }
    numbers = (M, N, K, *rows.stride(), *weight.stride())
    return Launch(linear_act_fwd_kernel, num_blocks, numbers, constants, matrices)


def _precision(dtype: torch.dtype) -> str:
    """Return the ``Config.dtype`` that serves a tensor dtype under torch's current fp32 setting."""
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return str(dtype).removeprefix("torch.")


def _is_aligned(matrix: Tensor, N: int) -> bool:
    """Return whether ``matrix`` and an output with N columns have contiguous rows on 16-byte boundaries."""
    columns = matrix.shape[1]
    row_stride, column_stride = matrix.stride()
    elements = 16 // matrix.element_size()
    return (
        column_stride == 1
        and row_stride >= columns
        and row_stride % elements == columns % elements == N % elements == 0
        and matrix.data_ptr() % 16 == 0
    )
