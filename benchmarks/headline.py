"""Ours against eager PyTorch, bare F.linear, every candidate configuration and torch.compile, on BERT's shapes.

Cases run in order of rank, the riskiest guess first, and each result is written as soon as it is there: a run that is
cut off keeps what it had. An implementation gets a figure only after its results were checked against fp64.
"""

import argparse
import dataclasses
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import bert_fused
from benchmarks.comparison import Case, Implementation, measure, measure_ceilings
from benchmarks.records import Writer, default_path, environment, gpu_state, print_tables
from bert_fused import reference
from bert_fused.accuracy import rows_of
from bert_fused.dispatch import device_reason
from bert_fused.kernels.configs import Config, get_config, shipped_configs

MODELS = {"MiniLM": (384, 1536), "base": (768, 3072), "large": (1024, 4096)}

TWO_CTA = Config("tma", "bfloat16", 128, 128, 64, num_warps=4, num_stages=3)
EXTRA = (
    Config("library", "bfloat16"),
    Config("tma", "bfloat16", 128, 256, 64, num_warps=8, num_stages=3),
    Config("tma", "bfloat16", 128, 256, 64, num_warps=8, num_stages=4),
    Config("tma", "bfloat16", 256, 128, 64, num_warps=8, num_stages=3),
    Config("tma", "bfloat16", 64, 128, 64, num_warps=4, num_stages=3),
    Config("tma", "bfloat16", 128, 64, 64, num_warps=4, num_stages=3),
    Config("pointer", "bfloat16", 128, 128, 64, num_warps=8, num_stages=3),
    Config("pointer", "bfloat16", 64, 64, 64, num_warps=4, num_stages=4),
    Config("pointer", "bfloat16", 16, 64, 128, num_warps=4, num_stages=4),
    Config("pointer", "bfloat16", 32, 64, 128, num_warps=4, num_stages=4),
)


def cases(device: str, quick: bool) -> list[Case]:
    """In order of rank."""
    if device == "cpu":
        K, N = (64, 128) if quick else MODELS["MiniLM"]
        pooler = Case("cls_pool", "small", 4, K, K, "tanh")
        return [Case("linear_act", "small", M, N, K, "gelu") for M in (8, 64)] + [pooler]

    def dense(M: int, model: str, rivals: str = "configurations") -> Case:
        K, N = MODELS[model]
        return Case("linear_act", model, M, N, K, "gelu", rivals)

    poolers = [Case("cls_pool", model, 32, MODELS[model][0], MODELS[model][0], "tanh") for model in MODELS]
    riskiest = dense(8192, "base", "riskiest")
    if quick:
        return [riskiest, dense(512, "base"), poolers[1]]
    first = [dense(M, model) for M in (8192, 512) for model in ("base", "MiniLM", "large")]
    rest = [dense(M, model) for M in (2048, 32, 32768) for model in ("base", "MiniLM", "large")]
    return [riskiest, *first, *poolers, *rest, *(dense(8192, model, "compile") for model in MODELS)]


def sensible(config: Config, M: int) -> bool:
    """Whether a tile may suit M rows: no more than a few idle rows in it, and not too small for the tensor cores."""
    if config.kernel == "library":
        return True
    tile = config.block_m * config.block_n
    if M <= 64:
        return config.block_m <= 64
    return config.block_m >= 64 and (tile >= 64 * 128 if M >= 2048 else tile <= 128 * 128)


def implementations(case: Case, device: str) -> list[Implementation]:
    """The rivals of a case, its riskiest first. "eager again" is eager's copy: their ratio is the noise floor."""

    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reference.linear_act(rows_of(x), weight, bias, case.activation)

    def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(rows_of(x), weight, bias)

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        public = bert_fused.cls_pool if case.op == "cls_pool" else bert_fused.linear_act
        return public(x, weight, bias, case.activation)

    def candidate(config: Config) -> Implementation:
        from bert_fused.kernels.linear_act import linear_act_fwd

        def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            rows = rows_of(x)
            return linear_act_fwd(rows, weight, bias, activation=case.activation, save_preact=False, config=config)[0]

        return Implementation("candidate", call, str(config))

    baselines = [Implementation("eager", eager), Implementation("F.linear", linear, computes="none")]
    baselines += [Implementation("eager again", eager)]
    reason = device_reason(torch.device(device), getattr(torch, case.dtype))
    if reason is not None:
        return [Implementation("ours", ours, f"PyTorch path ({reason})"), *baselines]
    from bert_fused.kernels.runtime import arch_of

    arch = arch_of(torch.device(device))
    chosen = get_config(case.M, case.N, case.K, case.dtype, arch, aligned=True)
    library = Implementation("ours", ours, str(chosen))
    if case.rivals == "riskiest":
        return [candidate(TWO_CTA), *baselines]
    if case.rivals == "compile":
        compiled = torch.compile(eager, dynamic=False)
        return [library, *baselines, Implementation("torch.compile", compiled)]
    known = dict.fromkeys([c for c in shipped_configs(arch) if c.dtype == case.dtype] + list(EXTRA))
    usable = [c for c in known if sensible(c, case.M) and (arch >= 90 or c.kernel != "tma")]
    return [library, *baselines, *map(candidate, usable)]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks headline", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget", type=float, default=300.0, metavar="SECONDS", help="stop after this long")
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="records are appended to this file")
    parser.add_argument("--commit", help="what is measured, where there is no git; may end in -dirty")
    parser.add_argument("--quick", action="store_true", help="few shapes, few rounds")
    arguments = parser.parse_args(argv)
    device: str = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; --device cpu rehearses the run")
    start = time.monotonic()
    deadline = start + arguments.budget
    rounds = (10 if arguments.quick else 40) if device == "cuda" else (5 if arguments.quick else 30)
    shared = environment(device, arguments.commit)
    writer = Writer(arguments.out or default_path(shared), shared)
    failed = False
    if arguments.budget > 0:
        for row in measure_ceilings(device):
            writer.write(row)
    todo = cases(device, arguments.quick)
    for rank, case in enumerate(todo, 1):
        left = deadline - time.monotonic()
        if left <= 0:
            print(f"out of time before case {rank} of {len(todo)}", file=sys.stderr)
            break
        print(f"[{rank}/{len(todo)}] {case}, {left:.0f} s left", file=sys.stderr, flush=True)
        try:
            rows = measure(case, implementations(case, device), device=device, rounds=rounds, deadline=deadline)
        except Exception as error:
            # A GPU that can do no more fails every later case as well; what was measured is already written.
            print(f"  failed: {type(error).__name__}: {error}", file=sys.stderr)
            failed = True
            continue
        state = gpu_state() if device == "cuda" else None
        for row in rows:
            failed |= row["implementation"] == "ours" and row["error"] is not None
            writer.write({"rank": rank, "case": dataclasses.asdict(case), "gpu_state": state} | row)
            figures = row["gpu"] or row["wall"]
            result = f"{figures['median_us']:9.1f} us" if figures else f"no figure: {row['error']}"
            print(f"  {row['implementation']:<14}{result}  {row['config']}", file=sys.stderr, flush=True)
    print_tables(shared, writer.records)
    print(f"{len(writer.records)} records in {writer.path}, {time.monotonic() - start:.0f} s")
    return 1 if failed else 0
