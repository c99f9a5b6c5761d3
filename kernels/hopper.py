"""The forward of ``linear_act.py`` for Hopper (sm_90) at large M: warps of their own load, others multiply.

Written in Gluon, Triton's dialect with explicit layouts, shared memory and barriers. A block stays on its SM and
computes tile after tile. One producer warp loads x and W through TMA into a ring of stages; consumers wait for a stage,
multiply from it, and give it back. ``ready`` and ``empty`` are the ring's barriers.

One group of consumers with 8 warps shares each tile (cooperative): the producer loads ahead while they store. Two
groups of 4 warps each take every other tile (ping-pong): one multiplies while the other is in its epilogue.
"""

from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .activations import apply_activation
from .configs import Config
from .tiles import tile_start

# Triton 3.9 renamed both.
_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_store_to = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

# Registers of a producer's thread; the consumers get what is left of an SM's.
PRODUCER_REGISTERS = gl.constexpr(24)


@gluon.jit
def _produce(x_desc, w_desc, xs, ws, ready, empty, M, N, K, GROUP_M: gl.constexpr):
    """Fill the ring with the steps of every tile of this block, one after the other."""
    BLOCK_M: gl.constexpr = xs.shape[1]
    BLOCK_N: gl.constexpr = ws.shape[1]
    BLOCK_K: gl.constexpr = xs.shape[2]
    STAGES: gl.constexpr = xs.shape[0]
    num_tiles = gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N)
    step = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        start_m, start_n = tile_start(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        for k in range(0, K, BLOCK_K):
            stage = step % STAGES
            # Parity 1 of a fresh barrier counts as past, so the first round waits for nobody.
            mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
            mbarrier.expect(ready.index(stage), x_desc.block_type.nbytes + w_desc.block_type.nbytes)
            _load(x_desc, [start_m, k], ready.index(stage), xs.index(stage))
            _load(w_desc, [start_n, k], ready.index(stage), ws.index(stage))
            step += 1


@gluon.jit
def _consume(
    GROUP: gl.constexpr, GROUPS: gl.constexpr,
    bias_ptr, out_desc, preact_desc, xs, ws, outs, ready, empty, turns, M, N, K,
    ACTIVATION: gl.constexpr, HAS_BIAS: gl.constexpr, SAVE_PREACT: gl.constexpr,
    GROUP_M: gl.constexpr, SUBTILES: gl.constexpr,
):  # fmt: skip
    """Compute every GROUPS-th tile of this block, from the GROUP-th on."""
    BLOCK_M: gl.constexpr = xs.shape[1]
    BLOCK_N: gl.constexpr = ws.shape[1]
    BLOCK_K: gl.constexpr = xs.shape[2]
    STAGES: gl.constexpr = xs.shape[0]
    WARPS: gl.constexpr = gl.num_warps()
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    columns: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    num_tiles = gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N)
    steps = gl.cdiv(K, BLOCK_K)
    step = GROUP * steps
    turn = 0
    for tile in range(gl.program_id(0) + GROUP * gl.num_programs(0), num_tiles, GROUPS * gl.num_programs(0)):
        start_m, start_n = tile_start(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        if HAS_BIAS:
            offs_n = start_n + gl.arange(0, BLOCK_N, columns)
            bias = gl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0)
        if GROUPS > 1:
            mbarrier.wait(turns.index(GROUP), (turn & 1) ^ (1 - GROUP))
        acc = gl.zeros((BLOCK_M, BLOCK_N), gl.float32, layout)
        for k in range(0, steps):
            stage = step % STAGES
            mbarrier.wait(ready.index(stage), step // STAGES & 1)
            acc = warpgroup_mma(xs.index(stage), ws.index(stage).permute((1, 0)), acc, use_acc=k > 0, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            # All but the newest product are done: the stage before is read.
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=k > 0)
            step += 1
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
        if GROUPS > 1:
            mbarrier.arrive(turns.index(1 - GROUP), count=1)
            step += steps
            turn += 1
        if HAS_BIAS:
            of_columns = gl.convert_layout(bias.to(gl.float32), gl.SliceLayout(0, layout))
            acc = acc + of_columns[None, :]
        _store(acc, outs.index(GROUP), out_desc, preact_desc, start_m, start_n, ACTIVATION, SAVE_PREACT, SUBTILES)
    tma.store_wait(0)


@gluon.jit
def _store(
    acc, buffer, out_desc, preact_desc, start_m, start_n,
    ACTIVATION: gl.constexpr, SAVE_PREACT: gl.constexpr, SUBTILES: gl.constexpr,
):  # fmt: skip
    """Write a tile of pre-activations and their activation, in SUBTILES slices of columns one after the other."""
    BLOCK_M: gl.constexpr = acc.shape[0]
    BLOCK_N: gl.constexpr = acc.shape[1]
    if SUBTILES > 1:
        left, right = acc.reshape((BLOCK_M, 2, BLOCK_N // 2)).permute((0, 2, 1)).split()
        HALF: gl.constexpr = BLOCK_N // 2
        half: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, HALF, 16])
        left = gl.convert_layout(left, half, assert_trivial=True)
        right = gl.convert_layout(right, half, assert_trivial=True)
        _store(left, buffer, out_desc, preact_desc, start_m, start_n, ACTIVATION, SAVE_PREACT, SUBTILES // 2)
        _store(right, buffer, out_desc, preact_desc, start_m, start_n + HALF, ACTIVATION, SAVE_PREACT, SUBTILES // 2)
    else:
        if SAVE_PREACT:
            _copy(acc.to(out_desc.dtype), buffer, preact_desc, start_m, start_n)
        out = apply_activation(acc, ACTIVATION, out_desc.dtype)
        _copy(out.to(out_desc.dtype), buffer, out_desc, start_m, start_n)


@gluon.jit
def _copy(value, buffer, desc, start_m, start_n):
    tma.store_wait(0)  # the copy before has read the buffer
    buffer.store(value)
    fence_async_shared()
    _store_to(desc, [start_m, start_n], buffer)


@gluon.jit
def linear_act_hopper_kernel(
    x_desc, w_desc, bias_ptr, out_desc, preact_desc,
    M, N, K,
    ACTIVATION: gl.constexpr, HAS_BIAS: gl.constexpr, SAVE_PREACT: gl.constexpr,
    STAGES: gl.constexpr, GROUP_M: gl.constexpr, SUBTILES: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """Write ``act(x @ W.T + b)`` to out and, if SAVE_PREACT, ``x @ W.T + b`` to preact. K is at least 1.

    GROUPS: of consumers, 1 (cooperative) or 2 (ping-pong); num_warps is that of one of them.
    """
    BLOCK_M: gl.constexpr = x_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = x_desc.block_type.shape[1]
    BLOCK_N: gl.constexpr = w_desc.block_type.shape[0]
    SLICE: gl.constexpr = out_desc.block_type.shape[1]
    dtype: gl.constexpr = x_desc.dtype
    xs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_K], x_desc.layout)
    ws = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_K], w_desc.layout)
    outs = gl.allocate_shared_memory(dtype, [GROUPS, BLOCK_M, SLICE], out_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    if GROUPS > 1:
        for group in gl.static_range(2):
            mbarrier.init(turns.index(group), count=1)
    fence_async_shared()
    # Arguments are written out where they are used: a tuple with a constexpr cannot be a variable.
    if GROUPS == 1:
        gl.warp_specialize([
            (_consume, (
                0, 1, bias_ptr, out_desc, preact_desc, xs, ws, outs, ready, empty, turns, M, N, K,
                ACTIVATION, HAS_BIAS, SAVE_PREACT, GROUP_M, SUBTILES,
            )),
            (_produce, (x_desc, w_desc, xs, ws, ready, empty, M, N, K, GROUP_M)),
        ], [1], [PRODUCER_REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume, (
                0, 2, bias_ptr, out_desc, preact_desc, xs, ws, outs, ready, empty, turns, M, N, K,
                ACTIVATION, HAS_BIAS, SAVE_PREACT, GROUP_M, SUBTILES,
            )),
            (_consume, (
                1, 2, bias_ptr, out_desc, preact_desc, xs, ws, outs, ready, empty, turns, M, N, K,
                ACTIVATION, HAS_BIAS, SAVE_PREACT, GROUP_M, SUBTILES,
            )),
            (_produce, (x_desc, w_desc, xs, ws, ready, empty, M, N, K, GROUP_M)),
        ], [4, 1], [240, PRODUCER_REGISTERS])  # fmt: skip


def constants_of(config: Config, activation: str, has_bias: bool, save_preact: bool) -> dict[str, Any]:
    """Return the kernel's constexprs, then Triton's options."""
    return {
        "ACTIVATION": activation,
        "HAS_BIAS": has_bias,
        "SAVE_PREACT": save_preact,
        "STAGES": config.num_stages,
        "GROUP_M": config.group_m,
        "SUBTILES": config.subtiles,
        "GROUPS": config.consumers,
        "num_warps": config.num_warps // config.consumers,
        "enable_fp_fusion": True,
    }


def describe(tensor: Tensor, shape: list[int], strides: list[int], block_shape: list[int]) -> Any:
    """Return a descriptor of a tensor, as ``plan.Matrix`` asks for it."""
    layout = layout_of(str(tensor.dtype).removeprefix("torch."), block_shape)
    return TensorDescriptor(tensor, shape, strides, block_shape, layout)


def layout_of(dtype: str, block_shape: list[int]) -> Any:
    """Return how shared memory holds a block that TMA loads or stores."""
    return gl.NVMMASharedLayout.get_default_for(block_shape, getattr(gl, dtype))
