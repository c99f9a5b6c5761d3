"""The keys of plans: calls that differ in anything that a launch depends on have different keys."""

from typing import Any

import pytest
import torch
from torch import Tensor

from bert_fused.kernels import plan as launching
from bert_fused.kernels.plan import key_of


def leaves() -> list[Tensor]:
    return [torch.randn(6, 8), torch.randn(12, 8), torch.randn(12)]


def test_a_key_tells_apart_what_a_launch_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, b = leaves()
    square = torch.randn(8, 8)
    variants: list[tuple[Any, ...]] = [
        (x, w, b, "gelu", False),
        (x, w, b, "relu", False),
        (x, w, b, "gelu", True),
        (x, w, None, "gelu", False),
        (x.half(), w, b, "gelu", False),
        (x, w.half(), b, "gelu", False),
        (x, w, b.half(), "gelu", False),
        (x[:5], w, b, "gelu", False),
        (x.view(2, 3, 8), w, b, "gelu", False),
        (x, w[:11], b, "gelu", False),
        (x, w, b[:11], "gelu", False),
        (x.t().contiguous().t(), w, b, "gelu", False),
        (torch.randn(6, 16)[:, :8], w, b, "gelu", False),
        (x, square, b, "gelu", False),
        (x, square.t(), b, "gelu", False),
        (x, w, torch.randn(24)[::2], "gelu", False),
    ]
    monkeypatch.setattr(launching, "_fp32_precision", lambda *_: "ieee")
    keys = [key_of(*variant) for variant in variants]
    monkeypatch.setattr(launching, "_fp32_precision", lambda *_: "tf32")
    keys.append(key_of(x, w, b, "gelu", False))
    assert len(set(keys)) == len(keys)

    class Elsewhere:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

        def get_device(self) -> int:
            return 3

        def __getattr__(self, name: str) -> Any:
            return getattr(self.tensor, name)

    moved = [[Elsewhere(t) if i == j else t for j, t in enumerate((x, w, b))] for i in range(3)]
    assert len({key_of(*tensors, "gelu", False) for tensors in ([x, w, b], *moved)}) == 4


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_sparse_and_nested_tensors_have_no_dense_ones_key() -> None:
    x, w, b = leaves()
    dense = key_of(x, w, b, "gelu", False)
    assert key_of(x.to_sparse(), w, b, "gelu", False) != dense
    assert key_of(x, w.to_sparse(), b, "gelu", False) != dense
    assert key_of(x, w, b.to_sparse(), "gelu", False) != dense
    assert key_of(torch.nested.nested_tensor([x, x]), w, b, "gelu", False) is None


def test_a_lazily_zero_tensor_has_a_key_of_its_own() -> None:
    x, w, b = leaves()
    for place in range(3):
        zero = [torch._efficientzerotensor(t.shape) if i == place else t for i, t in enumerate((x, w, b))]
        assert key_of(*zero, "gelu", False) != key_of(x, w, b, "gelu", False)


def test_a_key_counts_the_bytes_past_a_boundary() -> None:
    x, w, b = leaves()
    room = torch.empty(128)
    keys = {key_of(x, w, b, "gelu", False)}
    for place, tensor in enumerate((x, w, b)):
        for offset in (1, 2, 4):  # 4: on the next boundary
            moved = room[offset : offset + tensor.numel()].view(tensor.shape)
            keys.add(key_of(*[moved if i == place else t for i, t in enumerate((x, w, b))], "gelu", False))
    assert len(keys) == 7
