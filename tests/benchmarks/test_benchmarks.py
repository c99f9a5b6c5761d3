"""The chain of the benchmarks on a CPU: run, validate, report; files that cannot be used; who gets no figure."""

import collections
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from benchmarks import ceilings, comparison, linear, models, plots, records, report, run
from benchmarks.cases import CUT_OFF, SUITES, Case, cases
from benchmarks.comparison import Implementation, each, figures, measure
from benchmarks.records import BadResults, Writer, default_path, environment, parse, read
from bert_fused.timing import wall_sampler
from bert_fused.tune import accuracy
from bert_fused.tune.search import fp32_products
from bert_fused.unpad import encoder

ROOT = Path(__file__).parents[2]
SMALL = Case("modules", "MiniLM", "float32", "gelu", 48, 96, 64)


@pytest.fixture(autouse=True)
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested here is the chain; interpreted kernels would take minutes to time."""
    monkeypatch.setenv("BERT_FUSED_DISABLE", "1")


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """``python -m benchmarks`` as users run it: without the interpreter that this process has switched on."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables["OMP_NUM_THREADS"] = "1"  # on a busy machine, threads that wait for each other cost seconds
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, env=variables, capture_output=True, text=True
    )


# --------------------------------------------------------------------------------------------------------- the chain


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "deep" / "r.jsonl"
    done = command("run", "--quick", "--device", "cpu", "--rounds", "3", "--out", str(out), "--commit", "0123abc-dirty")
    assert done.returncode == 0, done.stderr
    assert "6 of 6 cases" in done.stderr
    return out


def test_every_record_validates(results: Path) -> None:
    records = read(results)
    assert {record["case"]["suite"] for record in records} == set(SUITES)
    for record in records:
        assert (record["commit"], record["dirty"], record["device"]["type"]) == ("0123abc", True, "cpu")
        assert (record["error"], record["gpu"], record["complete"]) == (None, None, True)
        assert len(record["wall"]["samples_us"]) == 3
        assert record["wall"]["p20_us"] <= record["wall"]["median_us"] <= record["wall"]["p80_us"]
        assert record["roofline_us"] > 0
        assert record["accuracy"]
    names = {record["implementation"] for record in records}
    unpadded = {"ours unpadded", "ours unpadded, position 0 only"}
    assert names == {"ours", "eager", "eager again", "F.linear"} | unpadded
    ragged = [record for record in records if record["case"]["ragged"]]
    assert all(0 < record["fill"] < 1 for record in ragged)
    assert {record["fill"] for record in records if not record["case"]["ragged"]} == {1.0}


def test_the_report(results: Path, tmp_path: Path) -> None:
    done = command("report", str(results), "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("# CPU rehearsal on")
    assert "not a measurement of the kernels" in text.splitlines()[0]
    assert "commit 0123abc, with local changes" in text
    for record in read(results):
        if record["implementation"] == "ours":
            assert f"| {record['wall']['median_us']:.2f} |" in text
    pictures = re.findall(r"!\[.*\]\((.*)\)", text)
    assert sorted(pictures) == sorted(path.name for path in tmp_path.glob("*.svg"))
    assert {"speedup.svg", "roofline.svg", "rivals-modules.svg", "rivals-models.svg"} <= set(pictures)
    for picture in pictures:
        assert xml.etree.ElementTree.parse(tmp_path / picture).getroot().tag.endswith("svg")


def test_a_second_run_goes_on_where_the_first_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r.jsonl"
    arguments = ["--quick", "--device", "cpu", "--rounds", "1", "--suite", "modules", "--out", str(out)]
    assert run.main([*arguments, "--budget", "0"]) == 0
    assert out.read_text() == ""
    assert "0 of 2 cases" in capsys.readouterr().err
    assert run.main(arguments) == 0
    first = out.read_text()
    # As if it had been stopped after the first case.
    lines = first.splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["rank"] == 1]
    out.write_text("".join(kept))
    assert run.main(arguments) == 0
    records = [record for _, record in parse(out)]
    assert [record["rank"] for record in records] == [1] * len(kept) + [2] * (len(lines) - len(kept))
    # As if time had run out in the middle of the second.
    records[-1]["complete"] = False
    out.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert run.main(arguments) == 0
    again = [record for _, record in parse(out)][len(records) :]
    assert {record["rank"] for record in again} == {2}
    before = out.read_text()
    assert run.main(arguments) == 0
    assert out.read_text() == before


def test_results_of_another_commit_are_not_added_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r.jsonl"
    arguments = ["--quick", "--device", "cpu", "--rounds", "1", "--suite", "pooler", "--out", str(out)]
    assert run.main([*arguments, "--commit", "aaaa"]) == 0
    assert run.main([*arguments, "--commit", "bbbb"]) == 2
    assert "r.jsonl, line 1: holds results of another commit, 'aaaa'; this run's is 'bbbb'" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
@pytest.mark.parametrize("arguments", [["--device", "cuda"], ["--device", "cpu", "--rounds", "0"], ["--suite", "frog"]])
def test_bad_arguments_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        run.main(arguments)
    assert exit_info.value.code == 2
    assert re.search(r"no CUDA device|at least 1|invalid choice", capsys.readouterr().err)


def test_where_results_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = {"run": "2026-11-22T01:02:03Z", "commit": "0123456789abcdef"}
    shared |= {"device": {"type": "cuda", "name": "NVIDIA H100 80GB HBM3"}}
    name = Path("nvidia-h100-80gb-hbm3") / "2026-11-22-01234567.jsonl"
    monkeypatch.delenv("OUT", raising=False)
    assert default_path(shared) == ROOT / "benchmarks" / "results" / name
    monkeypatch.setenv("OUT", str(tmp_path))
    assert default_path(shared) == tmp_path / name


def test_pytest_benchmarks(tmp_path: Path) -> None:
    out = tmp_path / "b.json"
    # pytest-benchmark times nothing in a worker of xdist.
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and "XDIST" not in k}
    arguments = ["-m", "pytest", "benchmarks", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "pooler"]
    done = subprocess.run(
        [sys.executable, *arguments, f"--benchmark-json={out}"],
        cwd=ROOT,
        env=variables | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    kept = json.loads(out.read_text())
    assert kept["machine_info"]["bert_fused"]["versions"]["torch"] == torch.__version__
    assert len(kept["benchmarks"]) == 2
    assert len({benchmark["group"] for benchmark in kept["benchmarks"]}) == 1
    assert all(benchmark["extra_info"]["accuracy"] for benchmark in kept["benchmarks"])


# ------------------------------------------------------------------------------------------------ files that are broken


def cut_off(text: str) -> str:
    return text[:-20]


def garbled(text: str) -> str:
    lines = text.splitlines(keepends=True)
    lines[1] = "\x00 frog\n"
    return "".join(lines)


def older(text: str) -> str:
    return text.replace('"schema": 1', '"schema": 0', 1)


def a_list(text: str) -> str:
    return "[]\n" + text


def without_case(text: str) -> str:
    return text.replace('"case"', '"kase"', 1)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (cut_off, r"line {last}: not JSON, or cut off"),
        (garbled, r"line 2: not JSON, or cut off"),
        (older, r"line 1: not a record of schema version 1"),
        (a_list, r"line 1: not a record of schema version 1"),
        (without_case, r"line 1: a record without case"),
    ],
)
@pytest.mark.parametrize("who", ["run", "report"])
def test_a_damaged_file(
    damage: Callable[[str], str],
    complaint: str,
    who: str,
    results: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "r.jsonl"
    text = results.read_text()
    path.write_text(damage(text))
    command = {"run": ["--device", "cpu", "--out", str(path)], "report": [str(path), "--out", str(tmp_path / "d")]}[who]
    assert (run if who == "run" else report).main(command) == 2
    error = capsys.readouterr().err
    assert re.search(complaint.format(last=len(text.splitlines())), error), error
    assert error.count("\n") == 1
    assert str(path) in error


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("dirty", "perhaps", "dirty: 'perhaps' is not of type"),
        ("roofline_us", -1, "roofline_us: -1 is less than or equal to the minimum of 0"),
        ("surprise", 1, "'surprise' was unexpected"),
        ("time", "yesterday", "time: 'yesterday' does not match"),
        ("error", "it failed", "wall: .* is not of type 'null'"),
        ("wall", {"method": "guess"}, "wall"),
    ],
)
def test_a_record_that_breaks_the_schema(
    field: str, value: Any, complaint: str, results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = results.read_text().splitlines()
    lines[2] = json.dumps(json.loads(lines[2]) | {field: value})
    path = tmp_path / "r.jsonl"
    path.write_text("\n".join(lines) + "\n")
    assert report.main([str(path)]) == 2
    assert re.search(f"line 3: .*{complaint}", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("case", [], "not a case"),
        ("case", None, "not a case"),
        ("case", {"a": [1]}, "not a case"),
        ("run", 5, "not a run's time"),
        ("fill", math.nan, "NaN is not a number"),
    ],
)
@pytest.mark.parametrize("who", ["run", "report"])
def test_a_record_of_other_types(
    who: str, field: str, value: Any, complaint: str, results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads(results.read_text().splitlines()[0]) | {field: value}
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(record) + "\n")
    command = {"run": ["--device", "cpu", "--out", str(path)], "report": [str(path)]}[who]
    assert (run if who == "run" else report).main(command) == 2
    assert re.search(f"line 1: .*{complaint}", capsys.readouterr().err)


def test_json_too_deep_to_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text("[" * 200000)
    assert report.main([str(path)]) == 2
    assert "line 1: not JSON, or cut off" in capsys.readouterr().err


def test_places_that_cannot_be_written(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--device", "cpu", "--quick", "--out", "/proc/nowhere/r.jsonl"]) == 2
    assert run.main(["--device", "cpu", "--quick", "--out", str(tmp_path)]) == 2
    (tmp_path / "README.md").mkdir()
    assert report.main([str(results), "--out", str(tmp_path)]) == 2
    assert report.main([str(results), "--out", str(results)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 4


@pytest.mark.parametrize("change", [{"commit": "f" * 40}, {"dirty": True}, {"versions": {"python": "4", "torch": "5"}}])
def test_origins_are_not_mixed(change: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (field,) = change
    first = made_up(tmp_path / "a.jsonl", {"ours": 1.0, "eager": 1.0})
    second = tmp_path / "b.jsonl"
    lines = first.read_text().splitlines()
    second.write_text("".join(json.dumps(json.loads(line) | change) + "\n" for line in lines))
    assert report.main([str(first), str(second)]) == 2
    assert f"more than one {field} in one report" in capsys.readouterr().err
    shared = environment("cpu", "a" * 40)
    Writer(tmp_path / "c.jsonl", shared).write(SMALL, 1, [{"complete": True}])
    with pytest.raises(BadResults, match=f"another {field}"):
        Writer(tmp_path / "c.jsonl", shared | change)


def test_an_incomplete_case_has_no_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = made_up(tmp_path / "r.jsonl", {"ours": 10.0, "eager": 5.0})
    other = dataclasses.asdict(dataclasses.replace(SMALL, M=49))
    cut_short = [json.loads(line) | {"case": other, "complete": False} for line in path.read_text().splitlines()]
    # A later run of the first case that was cut short does not replace what is complete.
    cut_short += [r | {"case": dataclasses.asdict(SMALL), "run": "2999-01-01T00:00:00Z"} for r in cut_short]
    with path.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in cut_short)
    assert report.main([str(path)]) == 0
    text = capsys.readouterr().out
    assert "| MiniLM 64→96 M=48 | 10.04 |" in text
    assert "| MiniLM 64→96 M=49 | - | - | - | - | - | - |" in text
    assert "No figure for ours, MiniLM 64→96 M=49: time ran out before all rounds" in text
    path.write_text("".join(json.dumps(record) + "\n" for record in cut_short))
    assert report.main([str(path)]) == 2
    assert "no figures" in capsys.readouterr().err


def test_files_with_nothing_to_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    assert report.main([str(empty)]) == 2
    assert report.main([str(tmp_path / "missing.jsonl")]) == 2
    first, second, *rest = capsys.readouterr().err.splitlines()
    assert "empty.jsonl: no figures" in first
    assert "No such file" in second
    assert not rest


# ------------------------------------------------------------------------------------------------------ reports


def made_up(path: Path, times: dict[str, float], *, name: str = "made up", dirty: bool = False) -> Path:
    """Records of one case in which each implementation takes so many microseconds, to a hair."""
    shared = environment("cpu", "0" * 40 + ("-dirty" if dirty else ""))
    shared["device"] = {"type": "cuda", "name": name, "arch": 90, "multiprocessors": 1, "driver": None}
    samples = {rival: [microseconds * (1 + 1e-3 * i) for i in range(9)] for rival, microseconds in times.items()}
    rows = []
    for rival, taken in samples.items():
        timed = figures(taken, "graph", {"eager": samples["eager"]})
        row = {"implementation": rival, "config": "", "computes": "none" if rival == "F.linear" else None}
        row |= {"error": None, "accuracy": {}, "compile_seconds": 0.0, "peak_bytes": 0, "gpu": timed}
        row |= {"wall": timed | {"method": "wall"}, "complete": True, "tflops": 1.0, "fill": 1.0, "roofline_us": 1.0}
        rows.append(row | {"ceilings": {"matmul_tflops": 1.0, "copy_tb_per_s": 1.0}, "gpu_state": None})
    Writer(path, shared).write(SMALL, 1, rows)
    return path


def test_winners_losers_and_other_functions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    times = {"ours": 10.0, "eager": 15.0, "torch.compile": 8.0, "F.linear": 9.0, "eager in a CUDA graph": 12.0}
    path = made_up(
        tmp_path / "r$.jsonl", times | {"ours in a CUDA graph": 8.0, "eager again": 15.3}, name="$GPU$ 1_x^2"
    )
    assert report.main([str(path)]) == 0
    (row,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("| MiniLM"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    heads = ["MiniLM 64→96 M=48", "10.04", "10.02..10.06", "15.06"]
    assert cells[:4] == heads
    # Eager, torch.compile (which wins), F.linear (no loss: it does less), graph against graph, eager's wall clock.
    assert cells[4].startswith("1.500 [")
    assert cells[5].startswith("**0.800 [")
    assert cells[6].startswith("0.900 [")
    assert cells[7].startswith("1.500 [")
    assert cells[8].startswith("1.500 [")
    assert cells[9] == "10%"
    assert len(cells) == 10
    # In the pictures red is the loss, and nothing else is.
    assert report.main([str(path), "--out", str(tmp_path / "d")]) == 0
    assert (tmp_path / "d" / "rivals-modules.svg").read_text().count("fill: " + plots.LOST) == 1
    assert plots.LOST not in (tmp_path / "d" / "speedup.svg").read_text()
    made_up(tmp_path / "slower.jsonl", {"ours": 10.0, "eager": 9.0})
    assert report.main([str(tmp_path / "slower.jsonl"), "--out", str(tmp_path / "e")]) == 0
    assert plots.LOST in (tmp_path / "e" / "speedup.svg").read_text()


def test_the_later_run_of_a_case_counts(tmp_path: Path) -> None:
    path = made_up(tmp_path / "r.jsonl", {"ours": 10.0, "eager": 15.0})
    later = [json.loads(line) | {"run": "2999-01-01T00:00:00Z"} for line in path.read_text().splitlines()]
    for record in later:
        record["gpu"]["median_us"] = 7.0
    with path.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in later[:1])
    (group,) = report.load([path])
    assert {name: record["gpu"]["median_us"] for name, record in group.items()} == {"ours": 7.0}


@pytest.mark.parametrize(("now", "verdict"), [(8.0, "faster"), (10.0, ""), (12.0, "**slower**")])
def test_compare(now: float, verdict: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = made_up(tmp_path / "old.jsonl", {"ours": 10.0, "eager": 15.0})
    # On a GPU that runs at half the speed, which must not matter.
    new = made_up(tmp_path / "new.jsonl", {"ours": 2 * now, "eager": 30.0})
    assert report.main(["--compare", str(old), str(new)]) == 0
    row = capsys.readouterr().out.splitlines()[2]
    assert row.split("|")[-2].strip() == verdict
    assert f"| 10.04 | {2 * now * 1.004:.2f} |" in row


def test_devices_are_not_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(made_up(tmp_path / f"{name}.jsonl", {"ours": 1.0, "eager": 1.0}, name=name)) for name in ("A", "B")]
    assert report.main(files) == 2
    assert report.main(["--compare", *files]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "more than one device" in first
    assert "different devices" in second


# --------------------------------------------------------------------------------------------------- wrong is refused


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


def refused(problem: Any, wrong: Implementation) -> str:
    """Why the wrong one got no figure; the right ones beside it must have got theirs."""
    problem = dataclasses.replace(problem, implementations=[wrong, *problem.implementations])
    first, *rest = measure(problem, device="cpu", rounds=2)
    assert first["implementation"] == wrong.name
    assert first["wall"] is first["gpu"] is first["tflops"] is None
    assert first["error"].count("\n") == 0
    for row in rest:
        assert row["error"] is None
        assert row["wall"]["ratio_to"]["eager"]["median"] > 0
    return str(first["error"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("wrong", [tanh_gelu, without_bias, unwritten, raising])
def test_a_wrong_module_gets_no_figure(wrong: Any, dtype: str) -> None:
    problem = linear.problem(dataclasses.replace(SMALL, dtype=dtype), "cpu")
    error = refused(problem, Implementation("wrong", each(wrong)))
    assert ("RuntimeError: out of resources" if wrong is raising else "wrong result") in error


@pytest.mark.parametrize("wrong", [tanh_gelu, without_bias])
def test_a_wrong_gradient_gets_no_figure(wrong: Any) -> None:
    """Its output is right: only the gradients are those of another function."""
    right = linear.with_backward(lambda *inputs: F.gelu(F.linear(*inputs)))
    other = linear.with_backward(wrong)

    def call(*inputs: Tensor) -> tuple[Tensor | None, ...]:
        gradients = other(*inputs)[1:] if wrong is tanh_gelu else (*right(*inputs)[1:3], torch.zeros(SMALL.N))
        return right(*inputs)[0], *gradients

    problem = linear.problem(dataclasses.replace(SMALL, suite="training"), "cpu")
    assert "wrong result: RMS error of d_" in refused(problem, Implementation("wrong", each(call)))


def tanh_model(model: nn.Module) -> Any:
    model = models.fused_copy(model)
    for module in model.modules():
        if hasattr(module, "intermediate_act_fn"):
            module.intermediate_act_fn = ACT2FN["gelu_pytorch_tanh"]
    return models.eager(model)


def shifted_model(model: nn.Module) -> Any:
    run = models.eager(model)
    return lambda *inputs: tuple(1.01 * output for output in run(*inputs))


@pytest.mark.parametrize("wrong", [tanh_model, shifted_model])
def test_a_wrong_model_gets_no_figure(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.LAYERS_AND_HEADS, "tiny", (1, 2))
    monkeypatch.setitem(models.BUILDERS, wrong.__name__, wrong)
    case = Case("models", "tiny", "bfloat16", "gelu", 32, 128, 64, 2, 16, ragged=True)
    with torch.no_grad():
        problem = models.problem(case, "cpu")
        rows = {row["implementation"]: row for row in measure(problem, device="cpu", rounds=1)}
    assert "wrong result" in rows[wrong.__name__]["error"]
    assert rows[wrong.__name__]["wall"] is None
    assert rows["ours"]["error"] is rows["eager"]["error"] is None


def test_an_unwritten_element_and_an_error_above_eagers_are_wrong() -> None:
    x, weight, bias = torch.randn(48, 64).half(), torch.randn(96, 64).half(), torch.randn(96).half()

    def mostly_written(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out = torch.empty(len(x), len(weight), dtype=x.dtype)
        out[:-1] = F.gelu(F.linear(x, weight, bias))[:-1]
        return out

    def rounded_once_more(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(F.linear(x, weight, bias)).bfloat16().half()

    assert accuracy.check(lambda *inputs: F.gelu(F.linear(*inputs)), "gelu", x, weight, bias)["rms_error"] > 0
    for wrong in (mostly_written, rounded_once_more):
        with pytest.raises(ValueError, match="wrong result"):
            accuracy.check(wrong, "gelu", x, weight, bias)
    # The sweep of the next two is right: only the error on the data gives them away.
    scale = torch.where(torch.arange(48) == 7, 1.01, 1.0)[:, None].half()
    exact = F.gelu(F.linear(x.double(), weight.double(), bias.double()))
    eagers = float((F.gelu(F.linear(x, weight, bias)) - exact).abs().max())
    off = exact.clone()
    off.view(-1)[exact.abs().argmin()] += 1.5 * eagers
    for wrong in (
        lambda x, w, b: F.gelu(F.linear(x, w, b)) * (scale if b.any() else 1),
        lambda x, w, b: off.half() if b.any() else F.gelu(F.linear(x, w, b)),
    ):
        with pytest.raises(ValueError, match="wrong result: max error"):
            accuracy.check(wrong, "gelu", x, weight, bias)


def test_only_a_sweep_tells_tanh_gelu_in_bfloat16() -> None:
    """At BERT's sizes and scale its difference from erf is less than a rounding."""
    problem = linear.problem(dataclasses.replace(SMALL, dtype="bfloat16", K=1024), "cpu")
    assert "not gelu, " in refused(problem, Implementation("tanh", each(tanh_gelu)))


def test_what_a_problem_says_of_itself() -> None:
    module = linear.problem(dataclasses.replace(SMALL, dtype="bfloat16"), "cpu")
    assert module.flops == 2 * 48 * 96 * 64
    assert module.bytes == 2 * (48 * 64 + 96 * 64 + 48 * 96)
    training = linear.problem(dataclasses.replace(SMALL, suite="training"), "cpu")
    assert (training.flops, training.bytes) == (3 * module.flops, 3 * 2 * module.bytes)
    for inputs in (module.sets, training.sets):
        assert len({tensor.data_ptr() for tensors in inputs for tensor in tensors}) == sum(map(len, inputs))
        assert all(tensors[0].float().std() > 0.5 for tensors in inputs)
        assert len(inputs) >= 4


def test_a_model_counts_tokens_that_are_real(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.LAYERS_AND_HEADS, "tiny", (1, 2))
    case = Case("models", "tiny", "float32", "gelu", 32, 128, 64, 2, 16, ragged=True)
    problem = models.problem(case, "cpu")
    weights = 4 * (64 * 64 + 64) + 2 * 64 * 128 + 128 + 64 + 2 * 2 * 64
    real = sum(int(mask.sum()) for _, mask in problem.sets) / len(problem.sets)
    assert problem.flops == 2 * real * weights
    assert problem.fill == real / 32 < 1
    # What stands at padding is nobody's business, what stands at a token is.
    ids, mask = problem.sets[0]
    hidden, pooled = models.eager(models.make_model(case, "cpu"))(ids, mask)
    exact = (hidden.double(), pooled.double())
    noisy = (hidden + 1e-3 * (mask == 0)[..., None], pooled)
    assert models._compare(noisy, mask, exact, (hidden, pooled))["hidden_rms"] == 0
    with pytest.raises(ValueError, match="hidden"):
        models._compare((hidden + 1e-3 * mask[..., None], pooled), mask, exact, (hidden, pooled))


def test_a_classifier_is_compared_by_its_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.LAYERS_AND_HEADS, "tiny", (2, 2))
    monkeypatch.setitem(models.CLASSIFIERS, "shifted", lambda model: lambda *i: (1.01 * models.Logits(model)(*i)[0],))
    case = Case("models", "tiny", "float32", "gelu", 32, 128, 64, 2, 16, ragged=True, head=True)
    with torch.no_grad():
        problem = models.problem(case, "cpu")
        rows = {row["implementation"]: row for row in measure(problem, device="cpu", rounds=1)}
    assert list(rows) == list(models.CLASSIFIERS)
    assert "wrong result: RMS error of the logits" in rows.pop("shifted")["error"]
    assert {row["error"] for row in rows.values()} == {None}
    short = rows["ours unpadded, position 0 only"]["accuracy"]
    assert 0 < short["logits_rms"] < 1e-6


def test_a_mask_that_keeps_all() -> None:
    case = Case("models", "tiny", "float32", "gelu", 32, 128, 64, 2, 16, ragged=True, median=CUT_OFF)
    (_, mask), *_ = models.make_inputs(case, "cpu")
    assert mask is not None
    assert mask.all()


def test_without_padding_no_mask_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even while a CUDA graph is captured, when transformers 5.17 makes one."""
    monkeypatch.setitem(models.LAYERS_AND_HEADS, "tiny", (1, 2))
    case = Case("models", "tiny", "float32", "gelu", 32, 128, 64, 2, 16)
    model = models.make_model(case, "cpu")
    (ids, mask), *_ = models.make_inputs(case, "cpu")
    assert mask is None
    masks: list[Any] = []
    attention = F.scaled_dot_product_attention

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        masks.append(kwargs.get("attn_mask"))
        return attention(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    direct = model(ids)
    masks.clear()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    # Newer versions make none: what makes it in 5.17 must not be called.
    monkeypatch.setattr(type(model), "forward", None)
    hidden, pooled = models.eager(model)(ids, None)
    assert masks == [None]
    assert torch.equal(hidden, direct.last_hidden_state)
    assert torch.equal(pooled, direct.pooler_output)


def test_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "_microseconds", lambda device, call: 2.0)
    ceilings.matmul_tflops.cache_clear()
    ceilings.copy_tb_per_s.cache_clear()
    tflops, tb_per_s = ceilings.matmul_tflops("cpu", "float32"), ceilings.copy_tb_per_s("cpu")
    assert tflops == pytest.approx(2 * 256**3 / 2e-6 / 1e12)
    assert tb_per_s == pytest.approx(2 * 2**24 / 2e-6 / 1e12)
    assert ceilings.roofline_us("cpu", "float32", 1e12, 1.0) == pytest.approx(1e6 / tflops)
    assert ceilings.roofline_us("cpu", "float32", 1.0, 1e12) == pytest.approx(1e6 / tb_per_s)
    ceilings.matmul_tflops.cache_clear()
    ceilings.copy_tb_per_s.cache_clear()


@pytest.mark.parametrize(("dtype", "setting"), [("tf32", "tf32"), ("float32", "ieee"), ("bfloat16", "ieee")])
def test_how_fp32_is_multiplied(dtype: str, setting: str) -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    with fp32_products(dtype):
        assert torch.backends.cuda.matmul.fp32_precision == setting
    assert torch.backends.cuda.matmul.fp32_precision == before


def test_a_case_that_fails_is_recorded_and_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = linear.problem

    def failing(case: Case, device: str) -> Any:
        if case.M == 8:
            raise RuntimeError("out of memory\nand more")
        return honest(case, device)

    monkeypatch.setattr(linear, "problem", failing)
    out = tmp_path / "r.jsonl"
    arguments = ["--quick", "--device", "cpu", "--rounds", "1", "--suite", "modules", "--out", str(out)]
    assert run.main(arguments) == 1
    errors = [record["error"] for record in read(out)]
    assert errors == ["RuntimeError: out of memory"] + [None] * 4
    assert run.main(arguments) == 0
    assert len(read(out)) == 5
    assert "ours (RuntimeError: out of memory)" in capsys.readouterr().err


def test_a_case_is_not_begun_that_would_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def slow(case: Case, *_: Any) -> list[dict[str, Any]]:
        now[0] += 40
        return [run._failure(ValueError("none"))]

    monkeypatch.setattr(run, "_measure", slow)
    monkeypatch.setattr(run.time, "monotonic", lambda: now[0])
    arguments = ["--device", "cpu", "--suite", "modules", "--budget", "100", "--out", str(tmp_path / "r.jsonl")]
    run.main(arguments)
    assert now[0] == 80


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_eight_minutes_reach_training_and_ragged_batches(
    share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock on which each case takes as long as ``run`` would guess beforehand, or half as long."""
    script = (ROOT / "benchmarks" / "gpu.sh").read_text()
    (arguments,) = re.findall(r"-m benchmarks (run --device cuda --budget \d+)", script)
    budget = float(arguments.split()[-1])
    now, taken = [0.0], []

    def measured(case: Case, *_: Any) -> list[dict[str, Any]]:
        now[0] += share * run.first_guess(case, "cuda")
        taken.append(case)
        return [run._failure(ValueError("none"))]

    monkeypatch.setattr(run, "_measure", measured)
    monkeypatch.setattr(run, "_is_alive", lambda device: True)
    monkeypatch.setattr(run, "environment", lambda *_: environment("cpu", "0" * 40))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(run.time, "monotonic", lambda: now[0])
    run.main([*arguments.split()[1:], "--out", str(tmp_path / "r.jsonl")])
    assert now[0] <= budget
    assert taken[:21] == cases(SUITES, "cuda", quick=False)[:21]
    rest = taken[21:]
    assert [case for case in rest if case.suite == "training"]
    assert [case for case in rest if case.ragged]
    assert {case.rivals for case in taken} == {"standard"}
    if share < 1:
        ragged = {(case.batch, case.sequence) for case in rest if case.ragged and not case.head}
        assert ragged == {(32, 128), (256, 128), (32, 512)}
        assert [case for case in rest if case.ragged and case.head]


def test_a_dirty_tree_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMMIT", raising=False)
    for described, expected in (("abc-dirty", ("abc", True)), ("abc", ("abc", False)), (None, ("unknown", None))):
        monkeypatch.setattr(records, "_output", lambda *command, described=described: described)
        shared = environment("cpu", None)
        assert (shared["commit"], shared["dirty"]) == expected


def test_a_deadline_leaves_what_there_is() -> None:
    rows = measure(linear.problem(SMALL, "cpu"), device="cpu", rounds=3, deadline=-math.inf)
    assert {row["error"] for row in rows} == {"out of time"}
    assert not any(row["complete"] for row in rows)


# ---------------------------------------------------------------------------------------------------------- the cases


def test_the_headline_comes_first() -> None:
    ranked = cases(SUITES, "cuda", quick=False)
    assert len(set(ranked)) == len(ranked)
    head = ranked[:21]
    modules = {(case.model, case.M) for case in head if case.suite == "modules"}
    names = ("MiniLM", "BERT-base", "BERT-large")
    assert modules == {(model, M) for model in names for M in (32, 512, 2048, 8192, 32768)}
    assert sorted(case.model for case in head if case.suite == "pooler") == sorted(names)
    assert sorted(case.model for case in head if case.suite == "models") == sorted(names)
    assert {(case.dtype, case.rivals) for case in head} == {("bfloat16", "standard")}
    assert [case.rivals for case in ranked].count("max-autotune") == 6
    assert {case.rivals for case in ranked[-6:]} == {"max-autotune"}


def test_every_case_of_the_plan_is_there() -> None:
    ranked = cases(SUITES, "cuda", quick=False)
    rows = {1, 8, 32, 77, 128, 512, 1000, 2048, 4096, 5003, 8192, 16384, 32768}
    for suite in ("modules", "training"):
        found = {
            (c.K, c.N, c.M, c.dtype, c.activation) for c in ranked if c.suite == suite and c.model != "tritonbench"
        }
        assert len(found) == 3 * len(rows) * 4 * 3
        assert {M for *_, M, _, _ in found} == rows
    poolers = {(c.batch, c.sequence) for c in ranked if c.suite == "pooler" and c.dtype == "bfloat16"}
    assert poolers == {(2**i, sequence) for i in range(11) for sequence in (128, 512)}
    encoders = {(c.model, c.batch, c.sequence, c.ragged) for c in ranked if c.suite == "models"}
    assert {(128 * 32, 32, 128, True)} <= {(c.M, c.batch, c.sequence, c.ragged) for c in ranked if c.suite == "models"}
    shapes = {(1, 128, False), (8, 128, False), (32, 128, False), (32, 512, False), (256, 128, False)}
    shapes |= {(32, 128, True), (256, 128, True), (32, 512, True)}
    assert encoders == {(model, *shape) for model in ("MiniLM", "BERT-base", "BERT-large") for shape in shapes}
    for head in (False, True):
        ragged = {(c.model, c.batch, c.sequence) for c in ranked if c.ragged and c.head == head}
        assert ragged == {(model, *shape[:2]) for model, *_ in encoders for shape in shapes if shape[2]}
    assert {(c.K, c.N) for c in ranked if c.model == "tritonbench"} == {(2**i, 2 ** (i + 2)) for i in range(10, 14)}


@pytest.fixture
def played_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The branch of a GPU: the CPU's clock plays its events, and its memory counters are made up."""
    monkeypatch.setattr(comparison, "event_sampler", lambda calls: wall_sampler(calls, lambda: None))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 350)


@pytest.mark.usefixtures("played_gpu")
@pytest.mark.parametrize("head", [False, True], ids=["model", "classifier"])
def test_who_leaves_padding_out_does_so_while_timed(head: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder runs dense while a CUDA graph is captured, so a graph would time the wrong path."""
    monkeypatch.setitem(models.LAYERS_AND_HEADS, "tiny", (2, 2))
    timed, packings = [""], collections.Counter[str]()
    honest = encoder.packing_of

    def counted(*arguments: Any, **options: Any) -> Any:
        packing = honest(*arguments, **options)
        packings[timed[0]] += packing is not None
        return packing

    def pretended(calls: Any) -> Any:
        """What a replay would do: whatever the calls do while they are captured."""

        def sample() -> float:
            with monkeypatch.context() as capturing:
                capturing.setattr(encoder, "reading_reason", lambda tensor: "a CUDA graph is being captured")
                return wall_sampler(calls, lambda: None)()

        return sample

    def watched(samplers: dict[str, Any], **options: Any) -> dict[str, list[float]]:
        taken = {}
        for name, sampler in samplers.items():
            timed[0] = name
            taken[name] = [sampler() for _ in range(options["rounds"])]
        return taken

    monkeypatch.setattr(encoder, "packing_of", counted)
    monkeypatch.setattr(comparison, "graph_sampler", pretended)
    monkeypatch.setattr(comparison, "interleave", watched)
    case = Case("models", "tiny", "float32", "gelu", 64, 128, 64, 4, 16, ragged=True, head=head)
    with torch.no_grad():
        rows = measure(models.problem(case, "cpu"), device="cuda", rounds=3)
    # Each of three rounds on each of two clocks.
    del packings[""]
    assert {name: count for name, count in packings.items() if count} == dict.fromkeys(models.PACKED, 6)
    methods = {row["implementation"]: row["gpu"]["method"] for row in rows}
    assert {name for name, method in methods.items() if method == "events"} == set(models.PACKED)


@pytest.mark.usefixtures("played_gpu")
def test_what_cannot_be_captured_is_timed_with_events(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_capture(calls: Any) -> Any:
        if len(calls) == 20 and getattr(calls[0], "func", None) is None:
            raise RuntimeError("operation not permitted when stream is capturing")
        return wall_sampler(calls, lambda: None)

    monkeypatch.setattr(comparison, "graph_sampler", no_capture)
    cpu = linear.problem(SMALL, "cpu")
    eager = next(rival for rival in cpu.implementations if rival.name == "eager")
    synchronising = Implementation("synchronising", lambda sets: [lambda c=c: c() for c in eager.calls(sets)])
    own_graphs = dataclasses.replace(eager, name="graphs of its own", graphs=True)
    problem = dataclasses.replace(cpu, implementations=[eager, synchronising, own_graphs], min_calls=20)
    with torch.no_grad():
        rows = measure(problem, device="cuda", rounds=2)
    assert [row["gpu"]["method"] for row in rows] == ["graph", "events", "events"]
    assert [row["wall"]["method"] for row in rows] == ["wall"] * 3
    assert [row["peak_bytes"] for row in rows] == [250, 250, None]
    assert all(row["complete"] and row["error"] is None for row in rows)
