"""``python -m benchmarks run``: the chain to a report on a CPU, budgets, going on, and files that cannot be used."""

import json
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

from benchmarks import __main__ as command
from benchmarks import linear, records, report, run
from benchmarks.cases import GATED, SUITES, Case, cases
from benchmarks.records import default_path, environment, parse
from bert_fused.tune.shapes import MODELS

CASE = Case("modules", "MiniLM", "float32", "gelu", 48, 96, 64)
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """These test the chain; interpreted kernels would take minutes to time."""
    monkeypatch.setenv("BERT_FUSED_DISABLE", "1")


def quick(out: Path, *arguments: str) -> list[str]:
    """Arguments for ``run``."""
    return ["--quick", "--device", "cpu", "--rounds", "1", "--out", str(out), *arguments]


def test_run_and_report_cover_every_suite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "r.jsonl"
    arguments = ["run", *quick(out, "--rounds", "3", "--commit", "0123abc-dirty")]
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    assert command.main() == 0
    assert "6 of 6 cases" in capsys.readouterr().err
    found = [record for _, record in parse(out)]
    assert {record["case"]["suite"] for record in found} == set(SUITES)
    for record in found:
        assert (record["commit"], record["dirty"], record["device"]["type"]) == ("0123abc", True, "cpu")
        assert (record["error"], record["gpu"], record["complete"]) == (None, None, True)
        assert len(record["wall"]["samples_us"]) == 3
        assert record["wall"]["p20_us"] <= record["wall"]["median_us"] <= record["wall"]["p80_us"]
        assert record["roofline_us"] > 0
        assert record["accuracy"]
        assert (record["fill"] < 1) == record["case"]["ragged"]
    names = {"ours", "eager", "eager again", "F.linear", "ours unpadded", "ours unpadded, position 0 only"}
    assert {record["implementation"] for record in found} == names

    assert report.main([str(out), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "README.md").read_text()
    assert re.match("# .*, one thread: a CPU, so no kernel of ours", text)
    assert "commit 0123abc, with local changes" in text
    for record in found:
        if record["implementation"] == "ours":
            assert f"| {record['wall']['median_us']:.2f} |" in text
    pictures = re.findall(r"!\[.*\]\((.*)\)", text)
    assert sorted(pictures) == sorted(path.name for path in tmp_path.glob("*.svg"))
    assert {"speedup.svg", "unpadded.svg", "rivals-modules.svg", "rivals-models.svg"} <= set(pictures)
    for picture in pictures:
        assert xml.etree.ElementTree.parse(tmp_path / picture).getroot().tag.endswith("svg")

    # The places and the files that neither command can use.
    assert report.main([str(out), "--out", str(out)]) == 2
    assert run.main(quick(tmp_path)) == 2
    assert run.main(quick(Path("/proc/nowhere/r.jsonl"))) == 2
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_run_goes_on_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r.jsonl"
    arguments = quick(out, "--suite", "modules")
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


def test_run_refuses_a_file_of_another_commit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r.jsonl"
    assert run.main(quick(out, "--suite", "pooler", "--commit", "aaaa")) == 0
    assert run.main(quick(out, "--suite", "pooler", "--commit", "bbbb")) == 2
    assert "r.jsonl, line 1: holds results of another commit, 'aaaa'; this run's is 'bbbb'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda text: text[:-9], "line 2: not JSON, or cut off"),
        (lambda text: "\x00 frog\n" + text, "line 1: not JSON, or cut off"),
        (lambda text: text.replace('"schema": 1', '"schema": 0', 1), "line 1: not a record of schema version 1"),
        (lambda text: "[]\n" + text, "line 1: not a record of schema version 1"),
        (lambda text: text.replace('"case"', '"kase"', 1), "line 1: a record without case"),
    ],
)
@pytest.mark.parametrize("who", [run, report])
def test_a_damaged_file_is_refused(
    who: Any, damage: Callable[[str], str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = (
        dict.fromkeys(records.FIELDS) | {"schema": 1} | environment("cpu", "aaaa") | {"case": vars(CASE), "run": "1"}
    )
    path = tmp_path / "r.jsonl"
    path.write_text(damage(2 * (json.dumps(record) + "\n")))
    assert who.main(["--device", "cpu", "--out", str(path)] if who is run else [str(path)]) == 2
    error = capsys.readouterr().err
    assert f"{path}, {complaint}" in error
    assert error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
@pytest.mark.parametrize("arguments", [["--device", "cuda"], ["--device", "cpu", "--rounds", "0"], ["--suite", "frog"]])
def test_run_refuses_bad_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        run.main(arguments)
    assert exit_info.value.code == 2
    assert re.search(r"no CUDA device|at least 1|invalid choice", capsys.readouterr().err)


def test_results_go_beside_the_source_or_under_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = {"run": "2026-11-22T01:02:03Z", "commit": "0123456789abcdef"}
    shared |= {"device": {"type": "cuda", "name": "NVIDIA H100 80GB HBM3"}}
    name = Path("nvidia-h100-80gb-hbm3") / "2026-11-22-01234567.jsonl"
    monkeypatch.delenv("OUT", raising=False)
    assert default_path(shared) == ROOT / "benchmarks" / "results" / name
    monkeypatch.setenv("OUT", str(tmp_path))
    assert default_path(shared) == tmp_path / name


@pytest.mark.slow
def test_pytest_benchmark_keeps_figures_and_environment(tmp_path: Path) -> None:
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
    arguments = quick(out, "--suite", "modules")
    assert run.main(arguments) == 1
    errors = [record["error"] for _, record in parse(out)]
    assert errors == ["RuntimeError: out of memory"] + [None] * 4
    assert run.main(arguments) == 0
    assert len(parse(out)) == 5
    assert "ours (RuntimeError: out of memory)" in capsys.readouterr().err


def test_run_does_not_begin_a_case_that_would_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def slow(case: Case, *_: Any) -> list[dict[str, Any]]:
        now[0] += 40
        return [run._failure(ValueError("none"))]

    monkeypatch.setattr(run, "_measure", slow)
    monkeypatch.setattr(run.time, "monotonic", lambda: now[0])
    arguments = ["--device", "cpu", "--suite", "modules", "--rivals", "compilers", "--budget", "100"]
    run.main([*arguments, "--out", str(tmp_path / "r.jsonl")])
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


def test_environment_tells_a_dirty_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMMIT", raising=False)
    for described, expected in (("abc-dirty", ("abc", True)), ("abc", ("abc", False)), (None, ("unknown", None))):
        monkeypatch.setattr(records, "_output", lambda *command, described=described: described)
        shared = environment("cpu", None)
        assert (shared["commit"], shared["dirty"]) == expected


def test_the_headline_cases_come_first() -> None:
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


def test_cases_cover_every_shape_dtype_and_activation() -> None:
    ranked = cases(SUITES, "cuda", quick=False)
    rows = {1, 8, 32, 77, 128, 512, 1000, 2048, 4096, 5003, 8192, 16384, 32768}
    for suite in ("modules", "training"):
        found = {(c.K, c.N, c.M, c.dtype, c.activation) for c in ranked if c.suite == suite and c.model in MODELS}
        assert len(found) == 3 * len(rows) * 4 * 3
        assert {M for *_, M, _, _ in found} == rows
        gated = {(c.K, c.N, c.M) for c in ranked if c.suite == suite and c.activation == "gelu(a)*b"}
        assert gated == {(*shape, M) for shape in ((768, 2 * 1152), (1024, 2 * 2624)) for M in (32, 512, 2048, 8192)}
    poolers = {(c.batch, c.sequence) for c in ranked if c.suite == "pooler" and c.dtype == "bfloat16"}
    assert poolers == {(2**i, sequence) for i in range(11) for sequence in (128, 512)}
    encoders = {(c.model, c.batch, c.sequence, c.ragged) for c in ranked if c.suite == "models" and c.model in MODELS}
    assert {(128 * 32, 32, 128, True)} <= {(c.M, c.batch, c.sequence, c.ragged) for c in ranked if c.suite == "models"}
    shapes = {(1, 128, False), (8, 128, False), (32, 128, False), (32, 512, False), (256, 128, False)}
    gated = {(c.model, c.batch, c.sequence) for c in ranked if c.suite == "models" and c.model not in MODELS}
    assert gated == {(model, *shape[:2]) for model in GATED for shape in shapes if shape[0] < 256}
    shapes |= {(32, 128, True), (256, 128, True), (32, 512, True)}
    assert encoders == {(model, *shape) for model in ("MiniLM", "BERT-base", "BERT-large") for shape in shapes}
    for head in (False, True):
        ragged = {(c.model, c.batch, c.sequence) for c in ranked if c.ragged and c.head == head}
        assert ragged == {(model, *shape[:2]) for model, *_ in encoders for shape in shapes if shape[2]}
    assert {(c.K, c.N) for c in ranked if c.model == "tritonbench"} == {(2**i, 2 ** (i + 2)) for i in range(10, 14)}
