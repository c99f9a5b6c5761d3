"""Time what a module call costs the host, ours and Hugging Face's eager module, on any Linux machine without a GPU.

Ours goes through Triton's real launcher over a driver that launches nothing (see ``stub_driver.py``), so that only
Python, torch and Triton are timed. Eager's module computes on the CPU from the same tensors: fp32 ones so small that
its arithmetic costs next to nothing, and without oneDNN, whose GELU takes 6 us to set up. On a GPU eager would also
choose a cuBLAS kernel and launch a second kernel; leaving these out favours it. TF32 is allowed, so that fp32 takes our
Triton kernel.

``grad`` is a forward call that builds the graph, on an input that requires a gradient, as every layer's does in
training; in ``frozen_grad`` only the parameters do. Nothing runs backward. The microseconds are this machine's; the
budgets limit the ratio of two samples taken in one round. Addresses and hashes differ between processes, and move a
ratio by some hundredths, so several processes take the samples, as pyperf's do.
"""

import argparse
import functools
import gc
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bert_fused.timing import interleave, ratio, summarize

from ..records import ROOT
from . import stub_driver

# Ours over eager's: docs/design/host.md.
BUDGETS = {"nograd": 0.75, "grad": 1.0}

MODES = ("nograd", "grad", "frozen_grad")

HIDDEN = 16
TOKENS = 4
TMA_TOKENS = 4096
CALLS = 30
ROUNDS = 300
PROCESSES = 3

Call = Callable[[], Any]
Samples = dict[str, list[float]]


def measure(rounds: int, planted_us: float) -> Samples:
    """Time all calls in this process, which needs ``stub_driver.environment``. ``planted_us`` slows ours down."""
    stub = stub_driver.install()

    import torch
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertIntermediate, BertPooler

    from bert_fused import FusedBertIntermediate, FusedBertPooler
    from bert_fused.hf import modules
    from bert_fused.kernels.linear_act import linear_act_fwd
    from bert_fused.kernels.lookup import get_config
    from bert_fused.kernels.plan import key_of, plans

    torch.set_num_threads(1)
    torch.backends.mkldnn.set_flags(False)
    torch.manual_seed(0)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    if planted_us:
        modules.linear_act = _slowed(modules.linear_act, planted_us)

    config = BertConfig(hidden_size=HIDDEN, intermediate_size=HIDDEN)
    x = torch.randn(1, TOKENS, HIDDEN)
    inputs = dict(zip(MODES, (x, x.clone().requires_grad_(), x), strict=True))
    eager, ours = BertIntermediate(config), FusedBertIntermediate(config)
    calls: dict[str, Call] = {}
    for mode, value in inputs.items():
        calls |= {
            f"ours_{mode}": functools.partial(ours, value),
            f"eager_{mode}": functools.partial(eager, value),
            f"pooler_ours_{mode}": functools.partial(FusedBertPooler(config), value),
            f"pooler_eager_{mode}": functools.partial(BertPooler(config), value),
        }
    forward = functools.partial(linear_act_fwd, activation="gelu", save_preact=False)
    rows, wide = x.view(-1, HIDDEN), torch.empty(TMA_TOKENS, 64, dtype=torch.float16)
    weight, bias = ours.dense.weight, ours.dense.bias
    with torch.no_grad():
        ours(x)
    kept = plans[key_of(x, weight, bias, "gelu", False)]
    calls["launcher"] = functools.partial(kept, x, weight, bias)
    calls["launcher_tma"] = functools.partial(forward, wide, wide[:64], None)
    config = get_config(TOKENS, HIDDEN, HIDDEN, "tf32", stub_driver.ARCH, aligned=True)
    calls["launcher_new"] = functools.partial(forward, rows, weight, bias, config=config)

    for name, call in calls.items():
        before = stub.stub_launches()
        call()
        launched = stub.stub_launches() - before
        assert launched == ("eager" not in name), f"{name} launched {launched} kernels"
    gc.collect()
    gc.freeze()  # so that no collection while timing visits the objects that imports created
    samplers = {}
    for name, call in calls.items():
        samplers[name] = functools.partial(_sample, call, torch.set_grad_enabled, name.endswith("_grad"))
    return {name: list(values) for name, values in interleave(samplers, rounds=rounds).items()}


def figures_of(processes: Sequence[Samples]) -> dict[str, Any]:
    """Return the medians of several processes' samples, and the ratios of ours to eager's with their intervals."""
    samples = {name: [value for one in processes for value in one[name]] for name in processes[0]}
    figures: dict[str, Any] = {f"{name}_us": summarize(values).median for name, values in samples.items()}
    for kind in ("", "pooler_"):
        for mode in MODES:
            # ``ratio`` is a speed-up; a budget is a share of eager's time.
            share = ratio(samples[f"{kind}ours_{mode}"], samples[f"{kind}eager_{mode}"])
            figures |= {f"{kind}{mode}_ratio": share.median, f"{kind}{mode}_ratio_interval": [share.low, share.high]}
    return figures


def _sample(call: Call, set_grad_enabled: Callable[[bool], Any], grad: bool) -> float:
    """Return a call's microseconds of processor time: on a busy machine wall time contains other processes' turns."""
    set_grad_enabled(grad)
    start = time.thread_time()
    for _ in range(CALLS):
        call()
    return 1e6 * (time.thread_time() - start) / CALLS


def _slowed(function: Callable[..., Any], microseconds: float) -> Callable[..., Any]:
    def slowed(*args: Any, **kwargs: Any) -> Any:
        end = time.thread_time() + 1e-6 * microseconds
        while time.thread_time() < end:
            pass
        return function(*args, **kwargs)

    return slowed


def broken_budgets(figures: dict[str, Any]) -> list[str]:
    """Return a sentence for each budget that the figures exceed."""
    return [
        f"with {mode}, a call costs {figures[f'{mode}_ratio']:.2f} of eager's, and the budget is {budget:.2f}"
        for mode, budget in BUDGETS.items()
        if not figures[f"{mode}_ratio"] <= budget
    ]


def print_table(figures: dict[str, Any]) -> None:
    print(f"{'us per call':<32}{'ours':>8}{'eager':>8}   ours / eager")
    for kind, label in (("", "BertIntermediate"), ("pooler_", "BertPooler")):
        for mode in MODES:
            low, high = figures[f"{kind}{mode}_ratio_interval"]
            ours, eager = figures[f"{kind}ours_{mode}_us"], figures[f"{kind}eager_{mode}_us"]
            share = f"{figures[f'{kind}{mode}_ratio']:.2f} [{low:.2f}, {high:.2f}]"
            share += f", budget {BUDGETS[mode]:.2f}" if not kind and mode in BUDGETS else ""
            print(f"{label + ', ' + mode:<32}{ours:>8.2f}{eager:>8.2f}   {share}")
    for name, label in (
        ("launcher", "launcher alone"),
        ("launcher_tma", "through descriptors"),
        ("launcher_new", "a call that is not kept"),
    ):
        print(f"{label:<32}{figures[f'{name}_us']:>8.2f}")
    print("a driver that does nothing, on this machine's CPU: only the ratios mean something elsewhere")


def main(argv: list[str]) -> int:
    """Return 0 within the budgets, 1 if one is exceeded, 2 if nothing can be measured here."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks host", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"samples of each (default {ROUNDS})")
    parser.add_argument(
        "--processes", type=int, default=PROCESSES, help=f"processes that take them (default {PROCESSES})"
    )
    parser.add_argument("--plant", type=float, default=0.0, metavar="US", help="slow ours down, to see the gate fail")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        try:
            stub_driver.build(Path(folder))
        except stub_driver.StubError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        rounds = math.ceil(arguments.rounds / arguments.processes)
        command = [sys.executable, "-m", "benchmarks.static.host", str(rounds), str(arguments.plant)]
        environment = stub_driver.environment(Path(folder))
        processes = []
        for _ in range(arguments.processes):
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
            if done.returncode != 0:
                print(done.stderr, "error: a process that was to measure failed; see above", file=sys.stderr)
                return 2
            processes.append(json.loads(done.stdout))
    figures = figures_of(processes)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    print_table(figures)
    broken = broken_budgets(figures)
    for sentence in broken:
        print(f"budget broken: {sentence}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]), float(sys.argv[2]))))
