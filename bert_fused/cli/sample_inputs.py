"""Input for a model: the docstrings of Python's standard library, which are real text of very different length."""

import ast
import functools
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .common import CommandError, Tokenizer


def docstrings(limit: int) -> list[tuple[str, str]]:
    """Return ``limit`` public docstrings, spread evenly over the standard library, as (dotted name, text).

    Raises:
        CommandError: this Python has none.
    """
    pairs = _library()
    step = max(1.0, len(pairs) / limit)
    return [pairs[int(i * step)] for i in range(min(limit, len(pairs)))]


@functools.cache
def _library() -> list[tuple[str, str]]:
    """Return every public docstring once, as (dotted name, text); parsing takes a second."""
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
        raise CommandError(f"no docstrings under {root}: this Python comes without the sources of its library")
    return sorted((name, text) for text, name in found.items())


def _docstrings_of(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        text = ast.get_docstring(node)
        if text:
            yield name, text
        for child in node.body:
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and child.name[0] != "_":
                yield from _docstrings_of(child, f"{name}.{child.name}")


def tokenize(
    tokenizer: Tokenizer, texts: list[str], device: torch.device, max_tokens: int, *, before: str | None = None
) -> dict[str, Tensor]:
    """Return a batch as long as its longest text, with padding behind the others; every tensor is ``[B, S]``.

    before: a text that each row has first, as a cross-encoder takes a query.
    """
    columns = (texts,) if before is None else ([before] * len(texts), texts)
    batch = tokenizer(*columns, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
    return {name: tensor.to(device) for name, tensor in batch.items()}


def sample_for(
    model: nn.Module, tokenizer: Tokenizer | None, texts: list[str], max_tokens: int
) -> tuple[dict[str, Tensor], str]:
    """Return the arguments for a call of ``model``, one row for each text, and a description of them for people.

    The texts go through the tokenizer; without one the ids are random. Models of pictures get random pixels.

    Raises:
        CommandError: the model takes something else, or the tokenizer belongs to another model.
    """
    whole: Any = model.config
    config = whole.get_text_config()
    parameter = next(model.parameters())
    takes = getattr(model, "main_input_name", "input_ids")
    generator = torch.Generator().manual_seed(0)
    pixels: dict[str, Tensor] = {}
    if takes == "pixel_values" or hasattr(whole, "vision_config"):
        pixels["pixel_values"] = _random_pixels(whole, len(texts), generator).to(parameter)
    if takes == "pixel_values":
        return pixels, f"random pixels, {_times(pixels[takes].shape)}"
    if takes != "input_ids":
        raise CommandError(f"{type(model).__name__} takes {takes}, for which there is no sample")
    longest = min(max_tokens, getattr(config, "max_position_embeddings", max_tokens))
    if tokenizer is None:
        # RoBERTa counts positions from after its padding id, so that no token can have the first two.
        inputs = _random_ids(config, len(texts), max(1, longest - 2), generator)
        inputs = {name: tensor.to(parameter.device) for name, tensor in inputs.items()}
        what = "random ids, since the folder has no tokenizer"
    else:
        known = int(getattr(tokenizer, "model_max_length", longest))
        inputs = tokenize(tokenizer, texts, parameter.device, min(longest, known))
        what = "docstrings of Python's standard library"
    ids = inputs["input_ids"]
    if ids.shape[1] > longest:
        raise CommandError(f"the tokenizer gives no fewer than {ids.shape[1]} tokens, and {longest} are asked for")
    if int(ids.max()) >= config.vocab_size:
        raise CommandError(f"the tokenizer gives ids up to {int(ids.max())}, but the model knows {config.vocab_size}")
    mask = inputs.get("attention_mask")
    real = "" if mask is None else f", {float(mask.float().mean()):.0%} of the tokens real and the rest padding"
    return inputs | pixels, f"{what}, {_times(ids.shape)}{real}" + ", and random pixels" * bool(pixels)


def _random_pixels(config: Any, rows: int, generator: torch.Generator) -> Tensor:
    config = getattr(config, "vision_config", config)
    size = config.image_size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return torch.randn(rows, config.num_channels, height, width, generator=generator)


def _random_ids(config: Any, rows: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Return random ids and their mask: rows of different length, with padding behind all but the first."""
    pad = getattr(config, "pad_token_id", None) or 0
    ids = torch.randint(0, config.vocab_size, (rows, length), generator=generator)
    ids = torch.where(ids == pad, (ids + 1) % config.vocab_size, ids)
    lengths = torch.linspace(length, max(1, length // 4), rows).long()
    mask = (torch.arange(length) < lengths[:, None]).long()
    return {"input_ids": torch.where(mask.bool(), ids, pad), "attention_mask": mask}


def _times(shape: tuple[int, ...] | torch.Size) -> str:
    return " x ".join(map(str, shape))
