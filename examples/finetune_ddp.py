"""Fine-tune a fused sequence classifier on several processes, and go on where a run was interrupted.

    torchrun --standalone --nproc-per-node 2 --max-restarts 3 examples/finetune_ddp.py --out run

Start the same command again after an interruption, or let torchrun do it: after the death of a worker it starts all of
them anew, up to ``--max-restarts`` times. Either way training goes on from the last checkpoint, and ends with the same
weights as a run that nothing interrupted.

The task is made up, so that nothing has to be downloaded: to tell sentences about good weather from those about bad.
Replace ``examples_of_the_task`` for your own task; with ``--model`` the tokenizer comes from the model's folder.
"""

import argparse
import json
import os
import random
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

import bert_fused

GOOD = ("sun", "warmth", "spring", "rainbow", "breeze", "blossom")
BAD = ("storm", "flood", "frost", "hail", "drought", "fog")
FRAMES = ("today brings {}", "we expect {} in the north", "{} and more {}", "after the {} came a {}", "no end of {}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint and the trained model")
    parser.add_argument("--model", type=Path, help="folder of a BERT-class model with its tokenizer (default: tiny)")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8, help="sequences per process and step (default 8)")
    parser.add_argument("--examples", type=int, default=256, help="size of the made-up task (default 256)")
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate (default 3e-3)")
    parser.add_argument("--save-every", type=int, default=5, help="steps between checkpoints (default 5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="train under bf16 autocast")
    return parser.parse_args()


# ------------------------------------------------------------------------------------------------------------- the task


def examples_of_the_task(count: int, seed: int) -> list[tuple[str, int]]:
    """Sentences and their labels."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        label = draw.randrange(2)
        words = (GOOD, BAD)[label]
        found.append((draw.choice(FRAMES).format(draw.choice(words), draw.choice(words)), label))
    return found


def model_and_tokenizer(folder: Path | None) -> tuple[Any, Any]:
    if folder is not None:
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, local_files_only=True)
        return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)
    words = sorted({word for frame in FRAMES for word in frame.split()} | {*GOOD, *BAD})
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=1 + len(words), max_position_embeddings=16, **sizes)
    return BertForSequenceClassification(config), Words(words)


class Words:
    """A tokenizer for the made-up task: one number per word, 0 for padding."""

    def __init__(self, words: list[str]) -> None:
        self.number = {word: i + 1 for i, word in enumerate(words)}

    def __call__(self, texts: list[str], **_: object) -> dict[str, Tensor]:
        rows = [torch.tensor([self.number[word] for word in text.split()]) for text in texts]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}


# ---------------------------------------------------------------------------------------------------------- checkpoints


def gathered(value: Any) -> list[Any]:
    """The value of every process, in order of rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def save(path: Path, parts: dict[str, Any], done: int) -> None:
    """Write a checkpoint, whole or not at all: a process that dies here leaves the previous one in place."""
    # The states of the generators that dropout draws from, each process from its own.
    states = gathered([torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None])
    if dist.get_rank() == 0:
        unfinished = path.with_suffix(".unfinished")
        state = {name: part.state_dict() for name, part in parts.items()} | {"random": states, "done": done}
        with open(unfinished, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)


def resume(path: Path, parts: dict[str, Any], device: torch.device) -> int:
    """Load the checkpoint if there is one; return how many steps it has done."""
    saved = torch.load(path, map_location=device, weights_only=True) if path.exists() else {"done": 0}
    if "random" in saved:
        states = saved["random"]
        if len(states) != dist.get_world_size():
            raise SystemExit(f"{path} is of {len(states)} processes, not {dist.get_world_size()}: batches would differ")
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        on_cpu, on_gpu = states[dist.get_rank()]
        torch.set_rng_state(on_cpu.cpu())
        if on_gpu is not None:
            torch.cuda.set_rng_state(on_gpu.cpu())
    steps = gathered(saved["done"])
    if len(set(steps)) > 1:
        raise SystemExit(f"the processes see checkpoints of steps {steps}: --out must be one folder for all")
    return int(saved["done"])


# ------------------------------------------------------------------------------------------------------------- training


def join() -> torch.device:
    """Join the other processes; return this one's device."""
    # After a restart torchrun's store still holds the addresses of the dead workers, and new ones would connect to
    # those (pytorch/pytorch#167288).
    store, rank, world = next(rendezvous("env://"))
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world)
    return device


def main() -> None:
    options = arguments()
    device = join()
    rank = dist.get_rank()
    options.out.mkdir(parents=True, exist_ok=True)
    checkpoint = options.out / "checkpoint.pt"

    torch.manual_seed(options.seed)  # the same new weights everywhere
    plain, tokenizer = model_and_tokenizer(options.model)
    report = bert_fused.fuse(plain.to(device).train())
    model = DistributedDataParallel(plain, device_ids=[device] if device.type == "cuda" else None)
    torch.manual_seed(options.seed + 1 + rank)  # and other dropout on each rank

    def loss_of(chosen: list[tuple[str, int]], model: nn.Module) -> Tensor:
        batch = tokenizer([text for text, _ in chosen], padding=True, truncation=True, return_tensors="pt")
        inputs = {name: tensor.to(device) for name, tensor in batch.items()}
        loss: Tensor = model(**inputs, labels=torch.tensor([label for _, label in chosen], device=device)).loss
        return loss

    data = examples_of_the_task(options.examples, options.seed)
    sampler: DistributedSampler[Any] = DistributedSampler(data, shuffle=True, seed=options.seed, drop_last=True)
    # A generator of its own: else each epoch's iterator draws from the one that dropout draws from, resumed or not.
    own = torch.Generator()
    loader = DataLoader(data, options.batch, sampler=sampler, collate_fn=list, drop_last=True, generator=own)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=options.epochs * len(loader))

    parts = {"model": plain, "optimizer": optimizer, "scheduler": scheduler}
    done = resume(checkpoint, parts, device)
    if rank == 0:
        print(f"goes on after step {done}" if done else report, flush=True)
    for epoch in range(done // len(loader), options.epochs):
        sampler.set_epoch(epoch)
        for i, chosen in enumerate(loader):
            if epoch * len(loader) + i < done:
                continue  # trained on before the interruption
            with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
                loss = loss_of(chosen, model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            done += 1
            if rank == 0:
                print(f"step {done} loss {loss.item():.6f}", flush=True)
            if done % options.save_every == 0:
                save(checkpoint, parts, done)

    if rank == 0:
        plain.save_pretrained(options.out / "model")
        with torch.no_grad():
            result = {"steps": done, "loss": loss_of(data, plain.eval()).item()}
        (options.out / "result.json").write_text(json.dumps(result))
        print(json.dumps(result), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
