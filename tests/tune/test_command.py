"""``bert-fused tune`` and ``info``, rehearsed on the CPU with a stub that says how long each candidate takes."""

import contextlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from stub import CPU, LIBRARY, NAME, SMALL, Stub

from bert_fused.__main__ import main
from bert_fused.cli import info, tune
from bert_fused.kernels import lookup
from bert_fused.kernels.configs import Config, Entry, Measured
from bert_fused.kernels.lookup import forget_tables, get_config, load_user_table, parse_rows
from bert_fused.tune import search, shapes
from bert_fused.tune.search import EAGER, Shape

WINNER = Config("pointer", "float16", 32, 32, 32, num_warps=4, num_stages=1)
ARGUMENTS = ["tune", "--shapes", "24x64x32,8x64x64", "--dtypes", "float16"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("BERT_FUSED_TABLES", str(tmp_path / "tables"))
    monkeypatch.setenv("COMMIT", "abc123")
    forget_tables()
    yield tmp_path / "tables"
    forget_tables()


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    """A machine with a GPU: the interpreter's architecture, under a name, timed by the stub."""
    monkeypatch.setattr(tune, "find_gpu", lambda name: tune.Gpu(CPU, NAME, 0))
    monkeypatch.setattr(tune, "candidates", lambda *_: [SMALL, WINNER])
    monkeypatch.setattr(tune, "Trials", lambda device: contextlib.nullcontext())
    made = Stub({"pointer 32x32x32 4 warps 1 stages": 8.0, EAGER: 14.0, str(LIBRARY): 12.0})
    monkeypatch.setattr(tune, "graph_sampler", made)
    return made


def choice(M: int, N: int, K: int) -> Config:
    return get_config(M, N, K, "float16", 0, aligned=True, device=NAME)


def test_tune_writes_the_winners_into_the_users_table(
    stub: Stub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert choice(24, 64, 32) != WINNER
    assert main(ARGUMENTS) == 0
    assert choice(24, 64, 32) == choice(8, 64, 64) == WINNER
    out = capsys.readouterr().out
    assert re.search(
        r"^float16  24x64x32 +pointer 32x32x32 4 warps 1 stages +8\.00 us +cuBLAS \+ pass +12\.00 +eager +14\.00$",
        out,
        re.MULTILINE,
    )
    assert "2 of 2 shapes measured" in out
    path = folder / "sm_0-nvidia-stub-gpu.json"
    assert f"table: {path}" in out
    table = json.loads(path.read_text())
    assert re.fullmatch(
        rf"measured on {NAME}, torch \S+, Triton \S+, \d{{4}}-\d\d-\d\d, commit abc123", table["source"]
    )
    (entry, _) = sorted(load_user_table(0, NAME), key=lambda entry: -entry.m)
    assert entry.measured is not None
    assert (entry.measured.us, entry.measured.library_us, entry.measured.eager_us) == (8.0, 12.0, 14.0)


@pytest.mark.parametrize("known", [True, False])
def test_the_hopper_kernel_is_tried_with_a_known_triton_only(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    hopper = Config("hopper", "float16", 128, 128, 64, 8, 5, persistent=1, subtiles=2)
    tried: list[Config] = []

    def tune_shape(shape: Shape, proposed: Sequence[Config], *_: Any, **__: Any) -> None:
        tried.extend(proposed)
        raise search.NotMeasured("enough")

    monkeypatch.setattr(tune, "candidates", lambda *_: [hopper, WINNER])
    monkeypatch.setattr(tune, "tune_shape", tune_shape)
    monkeypatch.setattr(tune, "LAUNCHER_IS_KNOWN", known)
    shape = Shape(2048, 64, 64, "float16")
    assert len(list(tune.measure([shape], tune.Gpu(CPU, NAME, 90), search.Budget(math.inf), lambda *_: None))) == 1
    assert tried == ([hopper, WINNER] if known else [WINNER])


def test_tune_measures_shapes_without_an_entry_first(stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--shapes", "24x64x32", "--dtypes", "float16"]) == 0
    stub.times["pointer 32x32x32 4 warps 1 stages"] = 99
    capsys.readouterr()
    assert main(ARGUMENTS) == 0
    measured = re.findall(r"^float16  (\S+)", capsys.readouterr().out, re.MULTILINE)
    assert measured == ["8x64x64", "24x64x32"]
    assert choice(24, 64, 32) == LIBRARY
    assert len(load_user_table(0, NAME)) == 2


def test_tune_replaces_a_damaged_table(stub: Stub, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.mkdir()
    (folder / "sm_0-nvidia-stub-gpu.json").write_text("{")
    assert main(ARGUMENTS) == 0
    assert choice(24, 64, 32) == WINNER
    assert len(caplog.records) == 1


def test_tune_fails_if_nothing_was_measured(stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ARGUMENTS, "--budget", "-1"]) == 1
    assert "0 of 2 shapes measured" in capsys.readouterr().out


def fail_at_8_rows(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    honest = search.make_buffers

    def planted(shape: Shape, device: torch.device) -> Any:
        if shape.M == 8:
            raise error
        return honest(shape, device)

    monkeypatch.setattr(search, "make_buffers", planted)


@pytest.mark.parametrize(
    ("error", "reason"),
    [(KeyboardInterrupt(), "interrupted"), (torch.OutOfMemoryError("CUDA out of memory"), "out of memory")],
)
def test_tune_keeps_the_shapes_before_a_failure(
    error: BaseException, reason: str, stub: Stub, monkeypatch, capsys
) -> None:
    fail_at_8_rows(monkeypatch, error)
    assert main(ARGUMENTS) == 0
    assert f"not measured: {reason}" in capsys.readouterr().out
    assert [(entry.m, entry.config) for entry in load_user_table(0, NAME)] == [(24, WINNER)]


def test_tune_goes_on_after_a_shape_without_memory(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at_8_rows(monkeypatch, torch.OutOfMemoryError("CUDA out of memory"))
    assert main(["tune", "--shapes", "8x64x64,24x64x32", "--dtypes", "float16"]) == 0
    assert [entry.m for entry in load_user_table(0, NAME)] == [24]


@pytest.mark.parametrize(
    ("chosen", "reason"), [("file/tables", "Not a directory"), ("off", "BERT_FUSED_TABLES is off")]
)
def test_tune_refuses_a_folder_it_cannot_write_unless_it_exports(
    chosen: str, reason: str, stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("BERT_FUSED_TABLES", "off" if chosen == "off" else str(tmp_path / chosen))
    forget_tables()
    assert main(ARGUMENTS) == 2
    error = capsys.readouterr().err
    assert error.startswith("tune: cannot write ")
    assert reason in error
    assert len(error.splitlines()) == 1
    assert stub.samples == {}
    assert main([*ARGUMENTS, "--export", str(tmp_path / "exported.json")]) == 0
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert len(parse_rows(json.loads((tmp_path / "exported.json").read_text())["entries"])) == 2


def test_tune_says_once_that_the_disk_is_full(stub: Stub, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    honest = tune.remember

    def full(entries: Sequence[Entry], *arguments: Any) -> Path:
        if entries:
            raise OSError(28, "No space left on device")
        return honest(entries, *arguments)

    monkeypatch.setattr(tune, "remember", full)
    assert main(ARGUMENTS) == 1
    captured = capsys.readouterr()
    assert captured.err.count("No space left on device") == 1
    assert "table:" not in captured.out


def test_tune_exports_after_every_shape(stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at the end alone: the run may be killed before."""
    fail_at_8_rows(monkeypatch, SystemExit(9))
    with pytest.raises(SystemExit):
        main([*ARGUMENTS, "--export", str(tmp_path / "exported.json")])
    assert (tmp_path / "exported.json").read_text().count('"measured"') == 1


def test_an_export_holds_measured_and_shipped_entries(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file for kernels/tables: what was measured, and the shipped entries that it does not replace."""
    generic = {"dtypes": ["float16"], "m": 64, "kernel": "library"}
    exact = generic | {"m": 24, "n": 64, "k": 32}
    other = exact | {"m": 48}
    shipped = {"arch": 0, "source": "computed: in a test", "entries": [generic, exact, other]}
    monkeypatch.setattr(tune, "shipped_table", lambda arch: shipped)
    path = tmp_path / "sm_0.json"
    assert main([*ARGUMENTS, "--export", str(path)]) == 0
    table = json.loads(path.read_text())
    assert table["arch"] == 0
    assert re.fullmatch(
        rf"measured on {NAME}, .*commit abc123; entries without measured times: computed: in a test", table["source"]
    )
    entries = parse_rows(table["entries"])
    assert [(e.m, e.n, e.k, e.config.kernel, e.measured is not None) for e in entries] == [
        (24, 64, 32, "pointer", True),
        (48, 64, 32, "library", False),
        (8, 64, 64, "pointer", True),
        (64, None, None, "library", False),
    ]
    monkeypatch.setattr(lookup, "TABLES", tmp_path)
    forget_tables()
    assert get_config(24, 64, 32, "float16", 0, aligned=True) == WINNER
    assert main([*ARGUMENTS, "--budget", "-1", "--export", str(tmp_path / "again.json")]) == 0
    assert len(parse_rows(json.loads((tmp_path / "again.json").read_text())["entries"])) == 4


def test_tune_refuses_an_export_without_folder_or_entries(
    stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*ARGUMENTS, "--export", str(tmp_path / "none" / "table.json")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert stub.samples == {}
    assert main([*ARGUMENTS, "--budget", "-1", "--export", str(tmp_path / "table.json")]) == 2
    assert "nothing was measured that could be exported" in capsys.readouterr().err


NO_GPU = "tuning needs an NVIDIA GPU, and there is none that PyTorch can use"
INTERPRETED = "no kernel runs on this GPU: TRITON_INTERPRET is set"


@pytest.mark.parametrize(
    ("gpus", "device", "reason"),
    [
        (0, "cuda", NO_GPU),
        (0, "cuda:7", NO_GPU),
        (2, "cpu", NO_GPU),
        (2, "nonsense", NO_GPU),
        (2, "cuda", INTERPRETED),
        (2, "cuda:2", "there is no GPU cuda:2"),
    ],
)
def test_tune_refuses_a_gpu_it_cannot_use(gpus: int, device: str, reason: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert main(["tune", "--device", device]) == 2
    assert capsys.readouterr().err == f"tune: {reason}\n"


@pytest.mark.parametrize("text", ["", "3x4", "0x8x8", "8x8x8x8", "BERT-huge", "8x8x8,", "-1x8x8"])
def test_tune_names_a_bad_shape(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["tune", f"--shapes={text}"])
    assert stop.value.code == 2
    assert "is neither MxNxK nor one of MiniLM, BERT-base, BERT-large" in capsys.readouterr().err


def test_tune_names_a_bad_dtype_and_unaligned_rows(stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["tune", "--dtypes", "float16,int8"])
    assert "'int8' is not one of bfloat16, float16, tf32" in capsys.readouterr().err
    assert main(["tune", "--shapes", "8x64x36", "--dtypes", "float16"]) == 2
    assert "8x64x36: cuBLAS serves rows that are not on 16-byte boundaries" in capsys.readouterr().err


def test_all_shapes_cover_the_models_within_reach() -> None:
    assert shapes.parse_shapes("5x8x16,bert-BASE")[0] == (5, 8, 16)
    assert set(shapes.parse_shapes("bert-base")) == set(shapes.all_shapes(("BERT-base",)))
    everything = shapes.all_shapes()
    assert len(set(everything)) == len(everything) == 3 * 12
    rows = sorted({M for M, N, K in everything if (N, K) == (3072, 768)})
    assert rows[0] == 1
    assert all(b <= lookup.REACH * a or (a, b) == (1, 8) for a, b in itertools.pairwise(rows))


def test_info_says_why_a_configuration_is_chosen(
    stub: Stub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", "--arch", "90", "--shapes", "512x3072x768,300x3072x770"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^float16 +512 +3072 +768 +\S+ .*shipped table \(computed\)", out, re.MULTILINE)
    assert re.search(r"^float16 +300 +3072 +770 .*rows are not on 16-byte boundaries$", out, re.MULTILINE)
    assert re.search(r"^float32 +512 .*IEEE fp32 has no tensor cores$", out, re.MULTILINE)
    assert main(["info", "--arch", "120", "--shapes"]) == 0
    assert "no table for this architecture" in capsys.readouterr().out

    assert main(ARGUMENTS) == 0
    capsys.readouterr()
    info._print_choices(info._choices(0, NAME, (torch.float16,), [(24, 64, 32), (30, 64, 32), (2000, 64, 32)]))
    _, where, _, exact, near, far = capsys.readouterr().out.splitlines()
    assert str(lookup.table_path(0, NAME)) in where
    assert re.search(r"measured here on \d{4}-\d\d-\d\d: 8 us, cuBLAS \+ pass 12, eager 14$", exact)
    assert near.endswith("eager 14, nearest to M = 24")
    assert far.endswith("no table for this architecture")

    entry = Entry(24, 64, 32, WINNER, Measured(8.0, 12.0, 14.0, "2026-01-01", ""))
    assert info._reason(entry, 24, 0, "").startswith("measured for the shipped table on 2026-01-01: 8 us")
