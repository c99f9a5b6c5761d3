"""``python -m benchmarks headline`` rehearsed on the CPU, and the statistics its figures rest on."""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import headline
from benchmarks.comparison import Case, Implementation, measure
from benchmarks.records import default_path
from bert_fused.kernels.configs import Config
from bert_fused.timing import Ratio, buffer_count, interleave, ratio, rotated, summarize, wall_sampler

ROOT = Path(__file__).resolve().parent.parent
CASE = Case("linear_act", "small", 48, 96, 64, "gelu")


def run(out: Path, *arguments: str) -> tuple[list[dict[str, Any]], str]:
    """A quick run on the CPU, without the interpreter this process has switched on: its records and what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"  # on a busy machine, threads that wait for each other cost seconds
    command = [sys.executable, "-m", "benchmarks", "headline", "--device", "cpu", "--quick", "--out", str(out)]
    command += arguments
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = out.read_text().splitlines() if out.exists() else []
    return [json.loads(line) for line in lines], done.stdout


def test_the_whole_chain_on_a_cpu(tmp_path: Path) -> None:
    records, printed = run(tmp_path / "deep" / "r.jsonl", "--commit", "0123456789abcdef-dirty")
    assert printed.startswith("CPU rehearsal, not a measurement of the kernels")
    for record in records:
        assert (record["schema"], record["commit"], record["dirty"]) == (1, "0123456789abcdef", True)
        assert {"run", "time", "device", "versions", "case", "implementation", "error"} <= set(record)
        assert record["error"] is None
        figures = record["wall"]
        assert figures["p20_us"] <= figures["median_us"] <= figures["p80_us"]
        assert len(figures["samples_us"]) > 0
    timed = [record for record in records if record["case"]["op"] in ("linear_act", "cls_pool")]
    assert {record["implementation"] for record in timed} == {"ours", "eager", "eager again", "F.linear"}
    assert {record["case"]["op"] for record in records} == {"matmul", "copy", "linear_act", "cls_pool"}
    for record in timed:
        assert record["gpu"] is None
        assert set(record["wall"]["ratio_to"]) == {"eager", "F.linear"}
        assert 0 <= record["max_abs_error"] < 0.1
        assert record["tflops"] > 0
        assert record["implementation"] in printed


def test_no_time_is_no_error(tmp_path: Path) -> None:
    records, printed = run(tmp_path / "r.jsonl", "--budget", "0")
    assert records == []
    assert "nothing was measured" in printed


def test_where_results_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = {"run": "2026-11-22T01:02:03Z", "commit": "0123456789abcdef"}
    shared |= {"device": {"type": "cuda", "name": "NVIDIA H100 80GB HBM3"}}
    name = Path("nvidia-h100-80gb-hbm3") / "2026-11-22-01234567.jsonl"
    monkeypatch.delenv("OUT", raising=False)
    assert default_path(shared) == ROOT / "benchmarks" / "results" / name
    monkeypatch.setenv("OUT", str(tmp_path))
    assert default_path(shared) == tmp_path / name


def test_runs_add_to_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r.jsonl"
    out.write_text('{"kept": true}\n')
    assert headline.main(["--device", "cpu", "--quick", "--budget", "0.0001", "--out", str(out)]) == 0
    assert json.loads(out.read_text().splitlines()[0]) == {"kept": True}
    assert "CPU rehearsal" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_cuda_where_there_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        headline.main(["--device", "cuda"])
    assert exit_info.value.code == 2
    assert "no CUDA device" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- wrong is refused


def tanh_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def without_bias(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight))


def unwritten(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    out = F.gelu(F.linear(x, weight, bias))
    out[-1, -1] = math.nan
    return out


def raising(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    raise RuntimeError("out of resources\nand more")


@pytest.mark.parametrize("wrong", [tanh_gelu, without_bias, unwritten, raising])
def test_a_wrong_implementation_gets_no_figure(wrong: Any) -> None:
    eager = Implementation("eager", lambda x, w, b: F.gelu(F.linear(x, w, b)))
    linear = Implementation("F.linear", F.linear, computes="none")
    rows = measure(CASE, [Implementation("wrong", wrong), eager, linear], device="cpu", rounds=3)
    assert [row["implementation"] for row in rows] == ["wrong", "eager", "F.linear"]
    assert rows[0]["wall"] is rows[0]["tflops"] is None
    assert ("RuntimeError: out of resources" if wrong is raising else "wrong result") in rows[0]["error"]
    assert rows[0]["error"].count("\n") == 0
    for row in rows[1:]:
        assert row["error"] is None
        assert row["wall"]["ratio_to"]["eager"]["median"] > 0


def test_a_deadline_leaves_what_there_is() -> None:
    eager = Implementation("eager", lambda x, w, b: F.gelu(F.linear(x, w, b)))
    assert measure(CASE, [eager], device="cpu", rounds=3, deadline=-math.inf) == []


# ---------------------------------------------------------------------------------------------------------- statistics


def drifting(rounds: int, *speeds: float, seed: int = 0) -> list[list[float]]:
    """Samples of implementations that take ``speeds`` microseconds on a clock that drifts by a third, with noise."""
    noise = random.Random(seed)
    clocks = [1 + 0.3 * math.sin(i / 5) for i in range(rounds)]
    return [[speed * clock * noise.gauss(1, 0.01) for clock in clocks] for speed in speeds]


def test_a_planted_slowdown_is_found_in_spite_of_drift() -> None:
    eager, again, slower = drifting(40, 10.0, 10.0, 11.0)
    same, slowdown = ratio(eager, again), ratio(eager, slower)
    assert same.low <= 1 <= same.high
    assert same.high - same.low < 0.02
    assert slowdown.low <= 1 / 1.1 <= slowdown.high < 0.95


def test_the_interval_of_equals_covers_one_about_as_often_as_it_says() -> None:
    ratios = [ratio(*drifting(30, 1.0, 1.0, seed=seed), resamples=400) for seed in range(100)]
    assert sum(r.low <= 1 <= r.high for r in ratios) >= 88


def test_summary_and_ratio_of_one_sample() -> None:
    assert vars(summarize([3.0])) == {"median": 3.0, "p20": 3.0, "p80": 3.0}
    assert ratio([6.0], [3.0]) == Ratio(2.0, 2.0, 2.0)


def test_quantiles() -> None:
    summary = summarize([5.0, 1.0, 2.0, 3.0, 4.0, 6.0])
    assert vars(summary) == pytest.approx({"median": 3.5, "p20": 2.0, "p80": 5.0})


def test_rounds_are_shuffled_and_complete() -> None:
    order: list[str] = []
    samplers = {name: lambda name=name: float(order.append(name) or len(order)) for name in "abc"}
    samples = interleave(samplers, rounds=20)
    assert {name: len(taken) for name, taken in samples.items()} == {"a": 20, "b": 20, "c": 20}
    rounds = [tuple(order[i : i + 3]) for i in range(3, len(order), 3)]  # the first round is the warm-up
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len(set(rounds)) > 1


def test_buffers_outgrow_the_cache_and_share_the_calls() -> None:
    assert buffer_count(2 * 2**20, 50 * 2**20) == 50
    assert buffer_count(2**30, 50 * 2**20) == 4
    seen: list[int] = []
    calls = rotated(seen.append, [(i,) for i in range(7)])
    assert wall_sampler(calls, lambda: None)() > 0
    assert len(calls) == 21
    assert [seen.count(i) for i in range(7)] == [3] * 7


def test_candidates_suit_the_rows_at_hand() -> None:
    wide, thin = Config("tma", "bfloat16", 128, 256, 64, 8, 3), Config("pointer", "bfloat16", 16, 64, 128, 4, 4)
    assert [headline.sensible(wide, M) for M in (32, 512, 8192)] == [False, False, True]
    assert [headline.sensible(thin, M) for M in (32, 512, 8192)] == [True, False, False]
    assert len(set(headline.EXTRA)) == len(headline.EXTRA)


def test_the_riskiest_guess_comes_first() -> None:
    cases = headline.cases("cuda", quick=False)
    assert (cases[0].M, cases[0].K, cases[0].N, cases[0].rivals) == (8192, 768, 3072, "riskiest")
    shapes = {(case.model, case.M) for case in cases if case.rivals == "configurations" and case.op == "linear_act"}
    assert shapes == {(model, M) for model in headline.MODELS for M in (32, 512, 2048, 8192, 32768)}
    assert [case.rivals for case in cases[-3:]] == ["compile"] * 3
