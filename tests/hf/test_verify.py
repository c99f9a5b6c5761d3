"""verify on whole models: what it compares, and that it leaves no trace."""

import pytest
import torch
from models import inputs, make
from torch import nn

from bert_fused import fuse, verify
from bert_fused.hf import modules


class Holding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = make()


def test_verify_compares_and_leaves_no_trace() -> None:
    model = make().train()
    model.encoder.layer[1].eval()
    modes = [m.training for m in model.modules()]
    fuse(model.encoder)
    classes = [type(m) for m in model.modules()]
    state = torch.get_rng_state()
    result = verify(model, **inputs())
    assert result.outputs == 2
    assert 0 < result.max_abs_error < 2e-5
    assert 1 - 1e-6 < result.cosine <= 1 + 1e-9
    assert "2 outputs: max abs error" in str(result)
    assert [m.training for m in model.modules()] == modes
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_verify_keeps_the_random_state_of_a_model_that_draws() -> None:
    model = make()
    model.pooler.register_forward_hook(lambda m, i, o: o + torch.randn_like(o))
    state = torch.get_rng_state()
    verify(model, **inputs())
    assert torch.equal(torch.get_rng_state(), state)


def plant_error(monkeypatch: pytest.MonkeyPatch, error: float) -> None:
    honest = modules.linear_act
    monkeypatch.setattr(modules, "linear_act", lambda *a, **k: honest(*a, **k) + error)


@pytest.mark.parametrize("planted", [1e-3, float("nan"), float("inf")])
def test_verify_finds_a_difference(planted, monkeypatch) -> None:
    plant_error(monkeypatch, planted)
    result = verify(make(), **inputs())
    assert result.max_abs_error > 1e-4
    if planted != 1e-3:
        assert result.max_abs_error == float("inf")


def test_verify_gives_both_calls_the_same_start(monkeypatch) -> None:
    """Arguments that a model changes, random numbers it draws, and a buffer it returns every time."""

    class Stateful(Holding):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("result", torch.zeros(1, 3, 32))

        def forward(self, input_ids: torch.Tensor, seen: list[int]) -> torch.Tensor:
            out = self.inner(input_ids)[0] + len(seen) + torch.rand(())
            seen.append(1)
            input_ids.fill_(1)
            return self.result.copy_(out)

    model, ids, seen = Stateful(), torch.tensor([[2, 3, 4]]), []
    assert verify(model, ids, seen).max_abs_error < 2e-5
    assert seen == []
    assert ids.tolist() == [[2, 3, 4]]
    plant_error(monkeypatch, 1)
    assert verify(model, ids, seen).max_abs_error > 0.01


def test_verify_takes_equal_infinities_for_no_error() -> None:
    class Masked(Holding):
        def forward(self, **batch: torch.Tensor) -> torch.Tensor:
            out = self.inner(**batch)[0]
            out[:, 0] = float("-inf")
            return out

    result = verify(Masked(), **inputs())
    assert result.max_abs_error < 2e-5
    assert result.cosine > 1 - 1e-6


def test_verify_with_nothing_to_compare_raises() -> None:
    with pytest.raises(ValueError, match="no module is fused"):
        verify(nn.Linear(2, 3), torch.ones(1, 2))

    class Silent(Holding):
        def forward(self) -> int:
            return 3

    with pytest.raises(ValueError, match="no floating-point tensor"):
        verify(Silent())
