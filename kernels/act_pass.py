"""One pass of an activation over a finished matrix product: ``out = act(preact)``, for shapes that cuBLAS serves."""

import torch
import triton
import triton.language as tl

from .activations import apply_activation
from .launch import launch
from .replay import Launch

BLOCK = 1024


@triton.jit
def act_fwd_kernel(preact_ptr, out_ptr, numel, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    z = tl.load(preact_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    out = apply_activation(z, ACTIVATION, out_ptr.dtype.element_ty)
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=mask)


def act_fwd(preact: torch.Tensor, activation: str, *, out: torch.Tensor) -> Launch | None:
    """Write ``act(preact)`` to ``out``, which may be ``preact`` itself. Both contiguous, of one shape and dtype."""
    if activation == "none" and out is preact:
        return None
    grid = (triton.cdiv(preact.numel(), BLOCK),)
    constants = {"ACTIVATION": activation, "BLOCK": BLOCK, "enable_fp_fusion": True}
    return launch(act_fwd_kernel, grid, preact, out, preact.numel(), **constants)
