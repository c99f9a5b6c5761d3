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

import torch
from torch import Tensor, nn

import bert_fused

from ..fallback import device_reason
from ..ops import path_name
from ..timing import Sampler, interleave, ratio, summarize, wall_sampler
from .common import DTYPES, CommandError, Json, add_json, blame_model, device_of, dtype_of, load, print_json, require
from .sample_inputs import docstrings, sample_for

HELP = "your model: what can be fused, whether it computes the same, and what is gained here"
EXAMPLES = """examples:
  %(prog)s path/to/model
  %(prog)s path/to/reranker --unpad --cls-only --dtype bfloat16
  %(prog)s path/to/model --json | jq .verified
"""

# Fused and unfused each round; the sum of their errors stays below this many times the unfused model's.
ROUNDING = 4
# Added to that limit, in units in the last place: among few outputs the largest error may be small by luck.
ULPS = 8
CHECKED_ROWS, CHECKED_TOKENS = 4, 64
ROUNDS, ENOUGH_ROUNDS = 30, 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL_DIR", help="folder with config.json and weights")
    parser.add_argument("--unpad", action="store_true", help="try fuse(unpad=True) as well: no work on padding")
    parser.add_argument(
        "--cls-only",
        action="store_true",
        help="try fuse(cls_only=True) as well: the last layer for position 0 only, if you read nothing else",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default float16 on a GPU, else float32")
    parser.add_argument("--device", help="as cuda:1; default a GPU if there is one, else cpu")
    parser.add_argument("--batch", type=int, default=8, help="rows in a timed batch (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="cut texts to this many tokens (default %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="time for this long (default %(default)g); 0 times nothing"
    )
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    for name, least in (("batch", 1), ("tokens", 1), ("seconds", 0)):
        if not getattr(arguments, name) >= least:
            raise CommandError(f"--{name} must be at least {least}, got {getattr(arguments, name)}")
    require("transformers", "safetensors", extra="hf")
    result = check(
        arguments.model,
        dtype=arguments.dtype,
        device=arguments.device,
        unpad=arguments.unpad,
        cls_only=arguments.cls_only,
        batch=arguments.batch,
        tokens=arguments.tokens,
        seconds=arguments.seconds,
    )
    if arguments.json:
        print_json(result)
    else:
        print_result(result)
        if len(result["variants"]) == 1:
            print("--unpad and --cls-only try more: no work on padding, and the last layer for position 0 only.")
    return 0 if result["verified"] else 1


def check(
    folder: Path,
    *,
    dtype: str | None = None,
    device: str | None = None,
    unpad: bool = False,
    cls_only: bool = False,
    batch: int = 8,
    tokens: int = 128,
    seconds: float = 20.0,
) -> Json:
    """Do what the command does, with its arguments, and return what it prints as JSON's types.

    Raises:
        CommandError: the model cannot be loaded, run or fused.
    """
    place = device_of(device)
    model, tokenizer, drawn = load(folder, place, dtype_of(dtype, place), head=True)
    texts = [text for _, text in docstrings(max(batch, CHECKED_ROWS))]
    with blame_model(model):
        few, few_are = sample_for(model, tokenizer, texts[:CHECKED_ROWS], min(tokens, CHECKED_TOKENS))
        timed, timed_are = sample_for(model, tokenizer, texts[:batch], tokens)
        _forward(model, timed)

    wishes: list[Json] = [{}]
    wishes += [{"unpad": True}] * unpad + [{"cls_only": True}] * cls_only
    wishes += [{"unpad": True, "cls_only": True}] * (unpad and cls_only)
    variants = compare(model, few, timed, wishes, seconds)
    return {
        "model": str(folder),
        "class": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "random_parameters": drawn,
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else str(place),
        "dtype": str(dtype_of(dtype, place)).removeprefix("torch."),
        "path": path_name(place, dtype_of(dtype, place)),
        "no_kernel_because": device_reason(place, dtype_of(dtype, place)),
        "verified_on": few_are,
        "timed_on": timed_are,
        "verified": all(variant["verified"] for variant in variants),
        "variants": variants,
    }


def compare(
    model: nn.Module, few: dict[str, Tensor], timed: dict[str, Tensor], wishes: list[Json], seconds: float
) -> list[Json]:
    """Compare the model with itself fused, for each set of options of ``fuse``: results on few rows, and times.

    Returns a variant for each, as ``print_variant`` prints it.

    Raises:
        CommandError: an output of the unfused model is not finite, so nothing can be compared.
    """
    variants = _verify(model, few, wishes)
    for variant, gain in zip(variants, _gains(model, timed, wishes, seconds), strict=True):
        variant["gain"] = gain
    return variants


def _verify(model: nn.Module, inputs: dict[str, Tensor], wishes: list[Json]) -> list[Json]:
    """Return fuse's report for each set of options, and each output's largest difference beside what rounding explains.

    Rounding explains how far an output of the unfused model may move if the same sums are rounded elsewhere.

    Raises:
        CommandError: an output of the unfused model is not finite, so nothing can be compared.
    """
    from ..hf.verify import compared, max_abs_error, outputs_of  # here, since --help and info need no transformers

    def explained(path: str, rounded: Tensor, exact: Tensor) -> float:
        here = rounded.to(exact.device)
        finite = here.isfinite() & exact.isfinite()
        if (~here.isfinite() & (exact != -math.inf)).any():  # -inf may come from a mask
            dtype = str(rounded.dtype).removeprefix("torch.")
            raise CommandError(f"the unfused model's own {path or 'output'} is not finite in {dtype}; see --dtype")
        exact = exact.masked_fill(~finite, 0.0)
        scale = float(exact.abs().max()) if exact.numel() else 0.0
        error = max_abs_error(here.masked_fill(~finite, 0.0), exact)
        return ROUNDING * error + ULPS * torch.finfo(rounded.dtype).eps * scale

    device = next(model.parameters()).device
    device = torch.device("cpu") if device.type == "mps" else device  # has no float64
    exact_inputs = {
        name: tensor.to(device, torch.float64 if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in inputs.items()
    }
    with blame_model(model):
        exact = outputs_of(copy.deepcopy(model).to(device).double(), (), exact_inputs)
        limits = {path: explained(path, tensor, exact[path]) for path, tensor in outputs_of(model, (), inputs).items()}

    variants = []
    for options in wishes:
        with bert_fused.fused(model, **options) as report:
            differences = {path: max_abs_error(*pair) for path, pair in compared(model, (), inputs).items()}
        variants.append(
            {
                "options": options,
                "fused": list(report.fused),
                "skipped": report.skipped,
                "paths": report.paths,
                "outputs": {
                    # JSON has no infinity.
                    path: {"difference": min(difference, sys.float_info.max), "explained": limits[path]}
                    for path, difference in differences.items()
                },
                "verified": all(difference <= limits[path] for path, difference in differences.items()),
            }
        )
    return variants


def _gains(model: nn.Module, inputs: dict[str, Tensor], wishes: list[Json], seconds: float) -> list[Json | None]:
    """Return, for each set of options, its time beside the unfused model's and their ratio; None if not timed."""
    if not seconds:
        return [None] * len(wishes)
    samplers = {"unfused": _sampler(model, inputs, None)}
    samplers |= {str(i): _sampler(model, inputs, options) for i, options in enumerate(wishes)}
    samples = interleave(samplers, rounds=ROUNDS, deadline=time.monotonic() + seconds)
    unfused = samples.pop("unfused")
    if not unfused:
        return [None] * len(wishes)
    gains: list[Json | None] = []
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


def _sampler(model: nn.Module, inputs: dict[str, Tensor], options: Json | None) -> Sampler:
    """Return a sampler of one call, for which the model is fused with these options; None: not fused."""
    synchronize: Callable[[], object] = torch.cuda.synchronize if next(model.parameters()).is_cuda else int
    sample = wall_sampler([functools.partial(_forward, model, inputs)], synchronize)

    def fused_sample() -> float:
        with contextlib.nullcontext() if options is None else bert_fused.fused(model, **options):
            return sample()

    return fused_sample


@torch.inference_mode()
def _forward(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    model(**inputs)


def print_result(result: Json) -> None:
    print(f"model     {result['model']}: {result['class']}, {result['parameters'] / 1e6:.1f} M parameters")
    print(f"device    {result['device']}, {result['dtype']}")
    if result["random_parameters"]:
        print(f"weights   {len(result['random_parameters'])} are not in the folder's files and were drawn at random")
    if result["no_kernel_because"] is not None:
        print(f"No kernel runs here ({result['no_kernel_because']}): the fused model takes {result['path']}.")
    said: list[str] = []
    for variant in result["variants"]:
        said += print_variant(variant, said)
    print(f"\nverified on {result['verified_on']}")
    print(f"timed on    {result['timed_on']}")
    if result["path"].startswith("PyTorch"):
        print("Without options fused and unfused are the same PyTorch here: their times differ by noise.")


def print_variant(variant: Json, said: list[str]) -> list[str]:
    """Print a variant but for lines of its report that were said before; return the report's lines."""
    options = "".join(f", {name}={value!r}" for name, value in variant["options"].items())
    print(f"\nfuse(model{options})")
    lines = [f"{name or '(model)'}  fused  {variant['paths'][name]}" for name in variant["fused"]]
    lines += [f"{name or '(model)'}  skipped  {reason}" for name, reason in variant["skipped"].items()]
    for line in lines:
        if line not in said:
            print(f"  {line}")
    print("  " + ("verified" if variant["verified"] else "WRONG: differs by more than rounding"))
    for path, output in variant["outputs"].items():
        print(
            f"    {path or 'output'}: largest difference {output['difference']:.2e}, "
            f"rounding explains {output['explained']:.2e}"
        )
    _print_gain(variant["gain"])
    return lines


def _print_gain(gain: Json | None) -> None:
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
