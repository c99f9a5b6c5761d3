"""Fifty training steps of a tiny BERT, fused and unfused, from the same weights on the same batches."""

import functools

import pytest
import torch
from reference64 import rms
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from bert_fused import fuse

STEPS = 50
SEEDS = range(2)
TINY = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
    "initializer_range": 0.2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


@functools.cache
def losses(seed: int, dtype: torch.dtype, fused: bool) -> Tensor:
    """The loss of each step, ``[STEPS]``. In bf16 under autocast, the weights in fp32."""
    torch.manual_seed(seed)
    model = BertForSequenceClassification(BertConfig(**TINY)).train()
    if fused:
        assert len(fuse(model).fused) == 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(seed)
    batches = torch.randint(1, TINY["vocab_size"], (5, 4, 8), generator=generator)
    found = []
    for step in range(STEPS):
        ids = batches[step % len(batches)]
        labels = (ids[:, 1] > TINY["vocab_size"] // 2).long()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return torch.tensor(found, dtype=torch.float64)


def test_fp32_training_has_eagers_losses(launches: list[str]) -> None:
    eager, ours = losses(0, torch.float32, False), losses(0, torch.float32, True)
    assert launches == STEPS * [*2 * ["linear_act_fwd"], *2 * ["act_bwd"]]
    assert eager[-10:].mean() < 0.6 * eager[:10].mean(), "nothing is learned that could go wrong"
    assert (ours - eager).abs().max() <= 1e-4


@pytest.mark.slow
def test_bf16_training_is_as_near_to_fp32_as_eagers(launches: list[str]) -> None:
    """Rounding leads each seed away from its fp32 run; the fused model goes no further than eager."""
    away = {}
    for fused in (False, True):
        away[fused] = [losses(s, torch.bfloat16, fused) - losses(s, torch.float32, False) for s in SEEDS]
    assert len(launches) == len(SEEDS) * STEPS * 4
    spread = max(float(curve.abs().max()) for curve in away[False])
    for seed in SEEDS:
        assert float(away[True][seed].abs().max()) <= 1.5 * spread, f"seed {seed}"
    assert rms(torch.cat(away[True])) <= 1.5 * rms(torch.cat(away[False]))
