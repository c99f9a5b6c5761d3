"""BERT's shapes, and how the command line names them."""

import argparse
import re

Sizes = tuple[int, int, int]  # M, N, K

# BertIntermediate's K and N; the pooler's N is its K.
MODELS = {"MiniLM": (384, 1536), "BERT-base": (768, 3072), "BERT-large": (1024, 4096)}

# Rows in order of rank, in which a budget is spent. From 8 rows on, neighbours in size are a factor of 4 apart:
# kernels/lookup.py lets a measured entry serve that far.
_INTERMEDIATE_ROWS = (512, 8192, 2048, 32, 128, 32768, 8, 1)
_POOLER_ROWS = (32, 8, 1, 128)


def all_shapes(models: tuple[str, ...] = tuple(MODELS)) -> list[Sizes]:
    """Return the shapes of some models' intermediates and poolers in order of rank.

    For each number of rows the models take turns.
    """
    pairs = [MODELS[model] for model in models]
    intermediates = [(M, N, K) for M in _INTERMEDIATE_ROWS for K, N in pairs]
    poolers = [(M, K, K) for M in _POOLER_ROWS for K, _ in pairs]
    common = 4 * len(pairs)
    return [*intermediates[:common], *poolers, *intermediates[common:]]


def parse_shapes(text: str) -> list[Sizes]:
    """Parse ``MxNxK`` or a model's name, or several separated by commas, for argparse."""
    by_name = {name.lower(): name for name in MODELS}
    found: list[Sizes] = []
    for item in text.split(","):
        sizes = re.fullmatch(r"(\d+)x(\d+)x(\d+)", item.strip())
        name = by_name.get(item.strip().lower())
        if name is not None:
            found += all_shapes((name,))
        elif sizes is not None and all(int(size) for size in sizes.groups()):
            M, N, K = map(int, sizes.groups())
            found.append((M, N, K))
        else:
            raise argparse.ArgumentTypeError(f"{item!r} is neither MxNxK nor one of {', '.join(MODELS)}")
    return list(dict.fromkeys(found))


def aligned(N: int, K: int, dtype: str) -> bool:
    """Return whether contiguous matrices with rows of N and of K elements have all rows on 16-byte boundaries."""
    elements = 16 // (2 if "16" in dtype else 4)
    return N % elements == K % elements == 0
