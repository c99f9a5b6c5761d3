"""One of two gloo processes that train a tiny BERT on the CPU under DDP and FSDP2; test_distributed.py starts both.

Arguments: rank, the file where the two meet, the file for the results of rank 0. Each way of training starts from the
weights, and takes the batches, of an unfused model that one process trains; each rank takes half of every batch.
"""

import json
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import blocks, inputs, make
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import BertForSequenceClassification

from bert_fused import fuse, unfuse, verify
from bert_fused.kernels.plan import Launch

STEPS = 2
launches: list[str] = []


def count_launches() -> None:
    call = Launch.__call__

    def record(self: Launch, *tensors: torch.Tensor | None) -> None:
        launches.append(self.kernel.fn.__name__.removesuffix("_kernel"))
        call(self, *tensors)

    Launch.__call__ = record  # type: ignore[method-assign]


def new() -> nn.Module:
    return make(BertForSequenceClassification).train()


def train(model: nn.Module, rows: slice) -> dict[str, Any]:
    """The loss of each step over all ranks, the sum of every parameter afterwards, and the kernels of the last step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for step in range(STEPS):
        batch = inputs(rows=4, length=6 + step)
        batch = {name: tensor[rows] for name, tensor in batch.items()}
        launches.clear()
        loss = model(**batch, labels=torch.tensor([0, 1, 1, 0])[rows]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        if rows != slice(None):
            dist.all_reduce(total)
            total /= dist.get_world_size()
        losses.append(total.item())
    return {"losses": losses, "weights": [whole(p).double().sum().item() for p in model.parameters()], **kernels()}


def kernels() -> dict[str, Any]:
    return {"forward": launches.count("linear_act_fwd"), "backward": launches.count("act_bwd")}


def whole(parameter: torch.Tensor) -> torch.Tensor:
    full = getattr(parameter, "full_tensor", None)
    return (full() if full is not None else parameter).detach()


def shard(model: nn.Module, units: Callable[[nn.Module], list[nn.Module]]) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for unit in [*units(model), model]:
        fully_shard(unit, mesh=mesh)
    return model


def layers(model: nn.Module) -> list[nn.Module]:
    return list(model.bert.encoder.layer)


def linears(model: nn.Module) -> list[nn.Module]:
    return [block.dense for block in blocks(model)]


def fused(model: nn.Module, **options: bool) -> nn.Module:
    report = fuse(model, **options)
    assert len(report.fused) >= 3, report
    assert not report.skipped, report
    return model


def checkpointed(model: nn.Module) -> nn.Module:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def unfused_again(model: nn.Module) -> nn.Module:
    unfuse(model)
    assert isinstance(model, FSDPModule)
    return model


def verified(model: nn.Module) -> nn.Module:
    result = verify(model, **inputs())
    assert 0 < result.max_abs_error < 2e-5, result
    # FSDP2 leaves its root gathered after a call without gradients: an optimizer made now would be given that copy.
    model.reshard()
    return model


def refused(model: nn.Module) -> nn.Module:
    """Modules that are units of their own: FSDP2 has changed their class, so fuse is refused."""
    kinds = [type(block) for block in blocks(model)]
    report = fuse(model)
    assert len(report.skipped) == 3, report
    assert all("fuse before fully_shard" in reason for reason in report.skipped.values()), report
    unfuse(model)
    assert [type(block) for block in blocks(model)] == kinds
    return model


def stuck(model: nn.Module) -> nn.Module:
    """Fused modules that are units of their own: unfuse is refused."""
    kinds = [type(module) for module in model.modules()]
    for undo in (unfuse, lambda m: verify(m, **inputs())):
        with pytest.raises(RuntimeError, match="unfuse before fully_shard"):
            undo(model)
    fused(model)
    assert [type(module) for module in model.modules()] == kinds
    model.reshard()
    return model


def encoder_kept(model: nn.Module) -> nn.Module:
    """An encoder that is a unit runs dense: FSDP2 has changed its class."""
    kind = type(model.bert.encoder)
    assert "bert.encoder" in fuse(model, unpad=True).skipped
    assert "bert.encoder" not in fuse(model).fused
    assert type(model.bert.encoder) is kind
    return model


WAYS: dict[str, Callable[[], nn.Module]] = {
    "ddp, fused before": lambda: DistributedDataParallel(fused(new())),
    "ddp, fused after": lambda: fused(DistributedDataParallel(new())),
    "ddp, unpad": lambda: DistributedDataParallel(fused(new(), unpad=True)),
    "fsdp, fused before": lambda: verified(shard(fused(new()), layers)),
    "fsdp, fused after": lambda: verified(fused(shard(new(), layers))),
    "fsdp, checkpointed": lambda: shard(checkpointed(fused(new())), layers),
    "fsdp, unpad": lambda: shard(fused(new(), unpad=True), layers),
    "fsdp, unfused again": lambda: unfused_again(shard(fused(new()), layers)),
    "fsdp of blocks, fused before": lambda: stuck(shard(fused(new()), blocks)),
    "fsdp of blocks, fused after": lambda: refused(shard(new(), blocks)),
    "fsdp of the encoder": lambda: encoder_kept(shard(fused(new(), unpad=True), lambda m: [m.bert.encoder])),
    "fsdp of linears": lambda: shard(fused(new()), linears),
}


def main() -> None:
    rank, meeting, found = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    # Neither waits for long where the other has died.
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2, timeout=timedelta(seconds=150)
    )
    count_launches()
    results = {"one process": train(new(), slice(None))}
    for name, way in WAYS.items():
        results[name] = train(way(), slice(2 * rank, 2 * rank + 2))
    if rank == 0:
        found.write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
