"""Small inputs of ``linear_act``, and the memory that a call keeps for its backward pass."""

from collections.abc import Callable

import torch
from torch import Tensor

K, N = 20, 7


def tensors(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, K, generator=generator)
    weight = torch.randn(N, K, generator=generator) / 4
    bias = torch.randn(N, generator=generator)
    return tuple(t.to(dtype).requires_grad_(grad) for t in (x, weight, bias))


def saved_bytes(function: Callable[[], Tensor]) -> tuple[Tensor, dict[tuple[int, ...], int]]:
    """Return a call's result and the tensors kept for its backward pass: shape -> bytes, each storage once."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = function()
    by_shape: dict[tuple[int, ...], int] = {}
    for tensor in kept.values():
        by_shape[tuple(tensor.shape)] = by_shape.get(tuple(tensor.shape), 0) + tensor.nbytes
    return out, by_shape
