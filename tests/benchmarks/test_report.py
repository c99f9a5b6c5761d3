"""``python -m benchmarks report``: winners, losers and missing figures, on files made by hand."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import plots, report
from benchmarks.cases import Case
from benchmarks.measure import figures
from benchmarks.records import BadResults, Writer, environment

SMALL = Case("modules", "MiniLM", "float32", "gelu", 48, 96, 64)


def made_up(path: Path, times: dict[str, float], *, name: str = "made up", dirty: bool = False) -> Path:
    """Write records of one case in which each implementation takes about so many microseconds."""
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


def test_report_marks_losses_but_no_other_functions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_report_takes_the_later_run_of_a_case(tmp_path: Path) -> None:
    path = made_up(tmp_path / "r.jsonl", {"ours": 10.0, "eager": 15.0})
    later = [json.loads(line) | {"run": "2999-01-01T00:00:00Z"} for line in path.read_text().splitlines()]
    for record in later:
        record["gpu"]["median_us"] = 7.0
    with path.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in later[:1])
    (group,) = report.load([path])
    assert {name: record["gpu"]["median_us"] for name, record in group.items()} == {"ours": 7.0}


@pytest.mark.parametrize(("now", "verdict"), [(8.0, "faster"), (10.0, ""), (12.0, "**slower**")])
def test_compare_judges_by_eager_of_the_same_run(
    now: float, verdict: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = made_up(tmp_path / "old.jsonl", {"ours": 10.0, "eager": 15.0})
    # On a GPU that runs at half the speed, which must not matter.
    new = made_up(tmp_path / "new.jsonl", {"ours": 2 * now, "eager": 30.0})
    assert report.main(["--compare", str(old), str(new)]) == 0
    row = capsys.readouterr().out.splitlines()[2]
    assert row.split("|")[-2].strip() == verdict
    assert f"| 10.04 | {2 * now * 1.004:.2f} |" in row


def test_report_refuses_two_devices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(made_up(tmp_path / f"{name}.jsonl", {"ours": 1.0, "eager": 1.0}, name=name)) for name in ("A", "B")]
    assert report.main(files) == 2
    assert report.main(["--compare", *files]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "more than one device" in first
    assert "different devices" in second


@pytest.mark.parametrize("change", [{"commit": "f" * 40}, {"dirty": True}, {"versions": {"python": "4", "torch": "5"}}])
def test_run_and_report_refuse_mixed_origins(
    change: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (field,) = change
    first = made_up(tmp_path / "a.jsonl", {"ours": 1.0, "eager": 1.0})
    second = tmp_path / "b.jsonl"
    lines = first.read_text().splitlines()
    second.write_text("".join(json.dumps(json.loads(line) | change) + "\n" for line in lines))
    assert report.main([str(first), str(second)]) == 2
    assert f"more than one {field} in one report" in capsys.readouterr().err
    with pytest.raises(BadResults, match=f"another {field}"):
        Writer(first, json.loads(lines[0]) | change)


def test_report_gives_an_incomplete_case_no_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_report_refuses_empty_and_missing_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    assert report.main([str(empty)]) == 2
    assert report.main([str(tmp_path / "missing.jsonl")]) == 2
    first, second, *rest = capsys.readouterr().err.splitlines()
    assert "empty.jsonl: no figures" in first
    assert "No such file" in second
    assert not rest
