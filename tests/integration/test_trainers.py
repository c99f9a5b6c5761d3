"""Trainer, accelerate and PEFT train a fused model step by step as they train an unfused one.

test_distributed.py has two processes; test_guards_libraries.py and test_encoder_life.py have torch.nn.DataParallel's
replicas.
"""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from models import SIZES, inputs, make
from torch import Tensor, nn
from transformers import BertForSequenceClassification, Trainer, TrainingArguments

from bert_fused import fuse, unfuse

ROWS = 12


def model() -> nn.Module:
    return make(BertForSequenceClassification).train()


def examples() -> list[dict[str, Tensor]]:
    """Twelve sequences, each padded to one length, and a label that depends on the first token."""
    batch = inputs(rows=ROWS // 2)
    batch = {name: torch.cat([tensor, tensor.flip(0)]) for name, tensor in batch.items()}
    labels = (batch["input_ids"][:, 0] > SIZES["vocab_size"] // 2).long()
    return [{name: tensor[row] for name, tensor in (batch | {"labels": labels}).items()} for row in range(ROWS)]


class Recording(Trainer):
    """Keeps the loss of each step, which the log rounds."""

    losses: list[float]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.losses.append(loss.item())
        return loss


def losses_of_trainer(folder: Path, ours: bool, **options: object) -> list[float]:
    subject = model()
    if ours:
        assert len(fuse(subject).fused) == 3
    settings = TrainingArguments(
        str(folder),
        use_cpu=True,
        max_steps=6,
        per_device_train_batch_size=4,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    trainer = Recording(subject, settings, train_dataset=examples())
    trainer.losses = []
    trainer.train()
    assert len(trainer.losses) == 6
    return trainer.losses


# Rounding to bf16 leads both away from fp32, each its own way; test_convergence.py holds how far.
@pytest.mark.parametrize(
    ("options", "tolerance", "forwards"),
    [
        ({"optim": "sgd", "learning_rate": 0.1}, 1e-6, 3),
        ({"bf16": True, "gradient_checkpointing": True, "learning_rate": 1e-3}, 2e-3, 5),
    ],
    ids=["fp32", "bf16 checkpointed"],
)
def test_trainer_has_eagers_losses(
    options: dict[str, object], tolerance: float, forwards: int, launches: list[str], tmp_path: Path
) -> None:
    theirs = losses_of_trainer(tmp_path, False, **options)
    assert launches == []
    ours = losses_of_trainer(tmp_path, True, **options)
    assert (launches.count("linear_act_fwd"), launches.count("act_bwd")) == (6 * forwards, 6 * 3)
    assert max(theirs) - min(theirs) > 0.05, "nothing is learned that could go wrong"
    assert max(abs(mine - other) for mine, other in zip(ours, theirs, strict=True)) <= tolerance


@pytest.mark.parametrize("when", ["before", "after"])
def test_accelerator_has_eagers_losses(when: str, launches: list[str]) -> None:
    """``prepare`` puts an autocasting forward on the model itself; the optimizer steps every second batch."""
    found = []
    for ours in (False, True):
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
        subject = model()
        if ours and when == "before":
            fuse(subject)
        optimizer = torch.optim.SGD(subject.parameters(), lr=0.05)
        data = torch.utils.data.DataLoader(examples(), batch_size=3)
        subject, optimizer, data = accelerator.prepare(subject, optimizer, data)
        if ours and when == "after":
            assert len(fuse(subject).fused) == 3
        losses = []
        for batch in data:
            with accelerator.accumulate(subject):
                loss = subject(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        plain = accelerator.unwrap_model(subject, keep_fp32_wrapper=False)
        unfuse(plain)
        assert not any("Fused" in type(module).__name__ for module in plain.modules())
        found.append(losses)
    assert launches == 4 * [*3 * ["linear_act_fwd"], *3 * ["act_bwd"]]
    theirs, ours = found
    assert max(abs(mine - other) for mine, other in zip(ours, theirs, strict=True)) <= 2e-3


def lora(subject: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    settings = peft.LoraConfig(r=2, target_modules=r".*(intermediate\.dense|query)", init_lora_weights=False)
    return peft.get_peft_model(subject, settings)


def fused(subject: nn.Module) -> nn.Module:
    fuse(subject)
    return subject


@pytest.mark.parametrize("when", ["before", "after"])
def test_lora_is_trained_and_merged(when: str, launches: list[str]) -> None:
    """Intermediates with an adapter run PyTorch's code, the pooler its kernel; merged, all run kernels."""
    theirs = lora(model())
    ours = lora(fused(model())) if when == "before" else fused(lora(model()))
    optimizers = [torch.optim.SGD((p for p in m.parameters() if p.requires_grad), lr=0.05) for m in (theirs, ours)]
    for step in range(4):
        batch, labels = inputs(rows=4, length=5 + step), torch.tensor([0, 1, 1, 0])
        losses = []
        for subject, optimizer in zip((theirs, ours), optimizers, strict=True):
            optimizer.zero_grad()
            launches.clear()
            loss = subject(**batch, labels=labels).loss
            loss.backward()
            losses.append(loss.item())
            gradients = [(n, p.grad) for n, p in subject.named_parameters() if p.requires_grad]
            if subject is theirs:
                expected = dict(gradients)
        assert launches == ["linear_act_fwd", "act_bwd"]  # the pooler's: its weights are frozen, its input is not
        assert abs(losses[0] - losses[1]) <= 1e-5
        assert len(gradients) == len(expected) == 2 * 4
        for name, gradient in gradients:
            torch.testing.assert_close(
                gradient, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )
        for optimizer in optimizers:
            optimizer.step()
    results = []
    for subject in (theirs, ours):
        merged = subject.merge_and_unload().eval()
        if subject is ours and when == "after":
            assert len(fuse(merged).fused) == 3  # the intermediates were left alone under their adapters
        launches.clear()
        with torch.no_grad():
            results.append(merged(**inputs()).logits)
    assert launches == 3 * ["linear_act_fwd"]
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)
