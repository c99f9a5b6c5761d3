"""Can this model be fused, does it compute the same, and what is gained on this machine?

The folder's model is loaded as its configuration says, with its head, and nothing is written. Three answers:

  report    which modules are fused, which are left alone, and why
  verified  fused and unfused on the same input: each output's largest difference, beside the rounding error of the
            unfused model itself, which is found by computing in float64. A difference of more than four times that
            error counts as wrong
  gain      times of both in turns, median, and how many times as fast with a 95 % interval

Input is text from Python's standard library through the folder's tokenizer, or random ids if it has none.
Exits with 0 if results agree, with 1 if they do not, with 2 if the model cannot be loaded, run or fused.
"""

import argparse
import contextlib
import copy
import functools
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bert_fused

from ..fallback import device_reason
from ..timing import Sampler, interleave, ratio, summarize, wall_sampler
from .common import (
    DTYPES,
    CommandError,
    add_json,
    device_of,
    its_fault,
    load_model,
    load_tokenizer,
    print_json,
    reasons,
    require,
)
from .sample_inputs import docstrings, sample_for

HELP = "your model: what can be fused, whether it computes the same, and what is gained here"
EXAMPLES = """examples:
  %(prog)s path/to/model
  %(prog)s path/to/reranker --unpad --cls-only --dtype bfloat16
  %(prog)s path/to/model --json | jq .verified
"""

# Fused and unfused each round; the sum of their errors stays below this many times the unfused model's.
ROUNDING = 4
# For outputs so few that their largest error is small by luck: this many units in the last place.
ULPS = 8
CHECKED_ROWS, CHECKED_TOKENS = 4, 64
ROUNDS, ENOUGH_ROUNDS = 30, 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL_DIR", help="folder with config.json and weights")
    parser.add_argument("--unpad", action="store_true", help="try fuse(unpad=True) as well: no work on padding")
    parser.add_argument(
        "--cls-only",
        action="store_true",
        help="try fuse(cls_only=True) as well: the last layer for position 0 only, for who reads nothing else",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default float16 on a GPU, else float32")
    parser.add_argument("--device", help="as cuda:1; default a GPU if there is one, else cpu")
    parser.add_argument("--batch", type=int, default=8, help="rows in a timed batch (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="cut texts to so many tokens (default %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="time for so long (default %(default)g); 0 times nothing"
    )
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    for name, least in (("batch", 1), ("tokens", 1), ("seconds", 0)):
        if not getattr(arguments, name) >= least:
            raise CommandError(f"--{name} must be at least {least}, got {getattr(arguments, name)}")
    require("transformers", "safetensors", extra="hf")
    result = check(arguments)
    if arguments.json:
        print_json(result)
    else:
        _print(result)
    return 0 if result["verified"] else 1


def check(arguments: argparse.Namespace) -> dict[str, Any]:
    """What is printed, as JSON's types.

    Raises:
        CommandError: the model cannot be loaded, run or fused.
    """
    device = device_of(arguments.device)
    dtype = getattr(torch, arguments.dtype or ("float16" if device.type == "cuda" else "float32"))
    model, drawn = load_model(arguments.model, device, dtype, head=True)
    with bert_fused.fused(model) as report:
        if not report.fused:
            raise CommandError(f"nothing in {arguments.model} can be fused: {reasons(report.skipped)}")
    tokenizer = load_tokenizer(arguments.model)
    texts = [text for _, text in docstrings(max(arguments.batch, CHECKED_ROWS))]
    with its_fault(model):
        few, few_are = sample_for(model, tokenizer, texts[:CHECKED_ROWS], min(arguments.tokens, CHECKED_TOKENS))
        batch, batch_is = sample_for(model, tokenizer, texts[: arguments.batch], arguments.tokens)
        rounding = rounding_errors(model, few)
        _forward(model, batch)

    variants = []
    for options in _wishes(arguments):
        with bert_fused.fused(model, **options) as report:
            outputs = _differences(model, few, rounding)
        variants.append(
            {
                "options": options,
                "fused": list(report.fused),
                "skipped": report.skipped,
                "paths": report.paths,
                "outputs": outputs,
                "verified": all(output["difference"] <= output["explained"] for output in outputs.values()),
            }
        )
    for variant, gain in zip(variants, _gains(model, batch, variants, arguments.seconds), strict=True):
        variant["gain"] = gain
    return {
        "model": str(arguments.model),
        "class": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "random_parameters": drawn,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "no_kernel_because": device_reason(device, dtype),
        "verified_on": few_are,
        "timed_on": batch_is,
        "verified": all(variant["verified"] for variant in variants),
        "variants": variants,
    }


def _wishes(arguments: argparse.Namespace) -> list[dict[str, bool]]:
    wishes: list[dict[str, bool]] = [{}]
    if arguments.unpad:
        wishes.append({"unpad": True})
    if arguments.cls_only:
        wishes.append({"cls_only": True})
    return [*wishes, {"unpad": True, "cls_only": True}] if len(wishes) == 3 else wishes


def rounding_errors(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, float]:
    """How far each output of the model, as it is, may move if the same sums are rounded elsewhere.

    Raises:
        CommandError: there is nothing to compare: its own results are not finite.
    """
    from ..hf.verify import max_abs_error, outputs_of  # here, since --help needs no transformers

    device = next(model.parameters()).device
    device = torch.device("cpu") if device.type == "mps" else device  # has no float64
    exact_inputs = {
        name: tensor.to(device, torch.float64 if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in inputs.items()
    }
    exact = outputs_of(copy.deepcopy(model).to(device).double(), (), exact_inputs)
    errors = {}
    for path, rounded in outputs_of(model, (), inputs).items():
        here = rounded.to(device)
        finite = here.isfinite() & exact[path].isfinite()
        if (~here.isfinite() & (exact[path] != -math.inf)).any():  # a mask may be of infinities, nothing else
            dtype = str(rounded.dtype).removeprefix("torch.")
            raise CommandError(f"the unfused model's own {path or 'output'} is not finite in {dtype}; see --dtype")
        values = exact[path].masked_fill(~finite, 0.0)
        scale = float(values.abs().max()) if values.numel() else 0.0
        error = max_abs_error(here.masked_fill(~finite, 0.0), values)
        errors[path] = ROUNDING * error + ULPS * torch.finfo(rounded.dtype).eps * scale
    return errors


def _differences(
    model: nn.Module, inputs: dict[str, Tensor], explained: dict[str, float]
) -> dict[str, dict[str, float]]:
    from ..hf.verify import compared, max_abs_error

    # JSON has no infinity.
    return {
        path: {"difference": min(max_abs_error(mine, other), sys.float_info.max), "explained": explained[path]}
        for path, (mine, other) in compared(model, (), inputs).items()
    }


def _gains(
    model: nn.Module, inputs: dict[str, Tensor], variants: list[dict[str, Any]], seconds: float
) -> list[dict[str, Any] | None]:
    """Of each variant, median times beside the unfused model's, and how many times as fast; None if not timed."""
    if not seconds:
        return [None] * len(variants)
    samplers = {"unfused": _sampler(model, inputs, None)}
    for i, variant in enumerate(variants):
        samplers[str(i)] = _sampler(model, inputs, variant["options"])
    samples = interleave(samplers, rounds=ROUNDS, deadline=time.monotonic() + seconds)
    unfused = samples.pop("unfused")
    if not unfused:
        return [None] * len(variants)
    gains: list[dict[str, Any] | None] = []
    for taken in samples.values():
        times = ratio(unfused, taken)
        gains.append(
            {
                "unfused_ms": summarize(unfused).median / 1e3,
                "fused_ms": summarize(taken).median / 1e3,
                "times_as_fast": times.median,
                "interval": [times.low, times.high],
                "rounds": len(taken),
            }
        )
    return gains


def _sampler(model: nn.Module, inputs: dict[str, Tensor], options: dict[str, bool] | None) -> Sampler:
    """One call, fused for as long as it takes; None: not fused."""
    synchronize: Callable[[], Any] = torch.cuda.synchronize if next(model.parameters()).is_cuda else int
    sample = wall_sampler([functools.partial(_forward, model, inputs)], synchronize)

    def fused_sample() -> float:
        with contextlib.nullcontext() if options is None else bert_fused.fused(model, **options):
            return sample()

    return fused_sample


@torch.inference_mode()
def _forward(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    model(**inputs)


def _print(result: dict[str, Any]) -> None:
    print(f"model     {result['model']}: {result['class']}, {result['parameters'] / 1e6:.1f} M parameters")
    print(f"device    {result['device']}, {result['dtype']}")
    if result["random_parameters"]:
        print(f"weights   {len(result['random_parameters'])} are not in the folder's files and were drawn at random")
    if result["no_kernel_because"] is not None:
        print(f"No kernel runs here ({result['no_kernel_because']}): the fused model takes its PyTorch path.")
    said: list[str] = []
    for variant in result["variants"]:
        options = "".join(f", {name}=True" for name in variant["options"])
        print(f"\nfuse(model{options})")
        lines = [f"{name or '(model)'}  fused  {variant['paths'][name]}" for name in variant["fused"]]
        lines += [f"{name or '(model)'}  skipped  {reason}" for name, reason in variant["skipped"].items()]
        for line in lines:
            if line not in said:
                print(f"  {line}")
        said += lines
        print("  " + ("verified" if variant["verified"] else "WRONG: differs by more than rounding"))
        for path, output in variant["outputs"].items():
            print(
                f"    {path or 'output'}: largest difference {output['difference']:.2e}, "
                f"rounding explains {output['explained']:.2e}"
            )
        _print_gain(variant["gain"])
    print(f"\nverified on {result['verified_on']}")
    print(f"timed on    {result['timed_on']}")
    if result["no_kernel_because"] is not None:
        print("Without options fused and unfused are the same PyTorch here: their times differ by noise.")
    if len(result["variants"]) == 1:
        print("--unpad and --cls-only try what else fuse can do: no work on padding, or on what nobody reads.")


def _print_gain(gain: dict[str, Any] | None) -> None:
    if gain is None:
        print("  not timed: no round fits into --seconds")
        return
    low, high = gain["interval"]
    print(
        f"  {gain['fused_ms']:.1f} ms, unfused {gain['unfused_ms']:.1f} ms: {gain['times_as_fast']:.2f} times as fast "
        f"[{low:.2f}, {high:.2f}], {gain['rounds']} rounds"
    )
    if gain["rounds"] < ENOUGH_ROUNDS:
        print("  too few rounds to tell: give it more --seconds, or a smaller --batch")
