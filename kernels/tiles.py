"""Output tiles of the forward kernel: the order in which blocks compute them, and how one is stored.

The grouped order is that of Triton's matrix multiplication tutorial.
"""

import triton
import triton.language as tl

from .activations import apply_gated


@triton.jit
def tile_start(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Return the first row and column of an output tile.

    The order of tiles goes through groups of GROUP_M rows of tiles, so that a group's tiles share W tiles in L2.
    """
    num_tiles_m = tl.cdiv(M, BLOCK_M)
    num_tiles_n = tl.cdiv(N, BLOCK_N)
    num_tiles_in_group = GROUP_M * num_tiles_n
    first_tile_m = (tile // num_tiles_in_group) * GROUP_M
    group_size_m = tl.minimum(num_tiles_m - first_tile_m, GROUP_M)
    tile_m = first_tile_m + (tile % num_tiles_in_group) % group_size_m
    tile_n = (tile % num_tiles_in_group) // group_size_m
    return tile_m * BLOCK_M, tile_n * BLOCK_N


@triton.jit
def _halves(acc):
    """Return the left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(acc, (acc.shape[0], 2, acc.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def store(
    acc, acc_b, out_ptr, preact_ptr, start_m, start_n, M, N,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, SAVE_PREACT: tl.constexpr, TMA: tl.constexpr, SUBTILES: tl.constexpr,
):  # fmt: skip
    """Write a tile of pre-activations and their activation, in SUBTILES slices of columns one after the other.

    acc_b: if GATED, the pre-activations of the second half, which are N columns further right.
    """
    BLOCK_M: tl.constexpr = acc.shape[0]
    BLOCK_N: tl.constexpr = acc.shape[1]
    HALF: tl.constexpr = SUBTILES // 2
    if SUBTILES > 1:
        left, right = _halves(acc)
        left_b, right_b = _halves(acc_b)
        middle = start_n + BLOCK_N // 2
        store(left, left_b, out_ptr, preact_ptr, start_m, start_n, M, N, ACTIVATION, GATED, SAVE_PREACT, TMA, HALF)
        store(right, right_b, out_ptr, preact_ptr, start_m, middle, M, N, ACTIVATION, GATED, SAVE_PREACT, TMA, HALF)
    elif TMA:
        if SAVE_PREACT:
            preact_ptr.store([start_m, start_n], acc.to(preact_ptr.dtype))
            if GATED != "":
                preact_ptr.store([start_m, N + start_n], acc_b.to(preact_ptr.dtype))
        out = apply_gated(acc, acc_b, ACTIVATION, GATED, out_ptr.dtype)
        out_ptr.store([start_m, start_n], out.to(out_ptr.dtype))
    else:
        # One 64-bit base for the tile and 32-bit offsets inside it: 64-bit offsets per element would spill.
        rows = tl.arange(0, BLOCK_M)[:, None]
        cols = tl.arange(0, BLOCK_N)[None, :]
        base = start_m.to(tl.int64) * N + start_n
        offs = rows * N + cols
        mask = (start_m + rows < M) & (start_n + cols < N)
        if SAVE_PREACT:
            preact_ptrs = preact_ptr + base + offs
            if GATED != "":  # its rows are twice as long
                preact_ptrs = preact_ptr + (base + start_m.to(tl.int64) * N) + (offs + rows * N)
            tl.store(preact_ptrs, acc.to(preact_ptr.dtype.element_ty), mask=mask)
            if GATED != "":
                tl.store(preact_ptrs + N, acc_b.to(preact_ptr.dtype.element_ty), mask=mask)
        out = apply_gated(acc, acc_b, ACTIVATION, GATED, out_ptr.dtype.element_ty)
        tl.store(out_ptr + base + offs, out.to(out_ptr.dtype.element_ty), mask=mask)
