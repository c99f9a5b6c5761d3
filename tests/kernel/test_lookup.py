"""Tables in the user's cache directory: written whole, read with care, preferred by lookup."""

import errno
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from reference64 import assert_forward, make_inputs

from bert_fused import linear_act
from bert_fused.kernels import linear_act as launcher
from bert_fused.kernels import lookup
from bert_fused.kernels.configs import Config, Entry, Measured, unlaunchable
from bert_fused.kernels.lookup import entry_row, forget_tables, get_config, load_user_table, parse_rows, remember
from bert_fused.kernels.plan import plans

GPU = "NVIDIA Test GPU"
MEASURED = Measured(8.25, 12.5, 14.0, "2026-11-22", "torch 2, Triton 3")
TILE = Config("pointer", "float16", 32, 64, 64, num_warps=4, num_stages=4)


def entry(M: int, N: int = 3072, K: int = 768, config: Config = TILE) -> Entry:
    return Entry(M, N, K, config, MEASURED)


def chosen_for(
    M: int, N: int = 3072, K: int = 768, dtype: str = "float16", arch: int = 90, device: str = GPU
) -> Config:
    return get_config(M, N, K, dtype, arch, aligned=True, device=device)


def shipped(M: int, N: int = 3072, K: int = 768, dtype: str = "float16", arch: int = 90) -> Config:
    return chosen_for(M, N, K, dtype, arch, device="")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.delenv("BERT_FUSED_TABLES", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget_tables()
    yield tmp_path / "bert_fused"
    forget_tables()


def test_a_measured_entry_is_preferred_within_its_reach(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert chosen_for(512) == shipped(512) != TILE
    path = remember([entry(512)], 90, GPU, "a test")
    assert path == folder / "sm_90-nvidia-test-gpu.json"
    assert list(folder.iterdir()) == [path]
    for M in (128, 512, 700, 2048):
        assert chosen_for(M) == TILE
    for M in (0, 1, 127, 2049, 2**20):
        assert chosen_for(M) == shipped(M) != TILE
    assert chosen_for(512, N=768, K=3072) == shipped(512, N=768, K=3072)
    assert chosen_for(512, dtype="bfloat16") == shipped(512, dtype="bfloat16")
    for other in ("", "NVIDIA Other GPU"):
        assert chosen_for(512, device=other) == shipped(512)
    assert chosen_for(512, arch=80) == shipped(512, arch=80)
    assert not caplog.records


def test_a_measured_entry_goes_before_a_shipped_one_for_the_same_shape(monkeypatch, tmp_path: Path) -> None:
    rows = [entry_row(entry(M, config=Config("library", "float16"))) for M in (500, 4096)]
    (tmp_path / "sm_90.json").write_text(json.dumps({"arch": 90, "source": "a test", "entries": rows}))
    monkeypatch.setattr(lookup, "TABLES", tmp_path)
    remember([entry(512)], 90, GPU, "a test")
    assert shipped(500) == Config("library", "float16")
    assert chosen_for(500) == chosen_for(2048) == TILE
    assert chosen_for(4096) == Config("library", "float16")


def test_lookup_takes_the_measured_entry_nearest_in_log_rows() -> None:
    other = Config("library", "float16")
    remember([entry(64), entry(512, config=other)], 90, GPU, "a test")
    for M, expected in ((16, TILE), (181, TILE), (182, other), (2048, other)):
        assert chosen_for(M) == expected


def test_alignment_and_ieee_fp32_go_before_any_table() -> None:
    remember([entry(512)], 90, GPU, "a test")
    assert get_config(512, 3072, 768, "float16", 90, aligned=False, device=GPU).kernel == "library"
    assert chosen_for(512, dtype="float32").kernel == "library"


def test_a_call_is_served_by_the_table_of_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the public function down: the table of the tensor's GPU decides."""
    chosen = Config("library", "float32")
    remember([Entry(8, 40, 24, chosen, MEASURED)], 0, GPU, "a test")
    seen: list[Config] = []
    monkeypatch.setattr(launcher, "get_config", lambda *a, **k: seen.append(get_config(*a, **k)) or seen[-1])
    arguments = torch.ones(8, 24), torch.ones(40, 24)
    linear_act(*arguments)
    plans.clear()
    monkeypatch.setattr(launcher, "name_of", lambda device: GPU)
    linear_act(*arguments)
    assert [config.kernel for config in seen] == ["pointer", "library"]


def test_results_are_right_beside_a_damaged_table(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    """Through the public function: the shipped choice serves, and one warning says so."""
    path = remember([Entry(8, 40, 24, Config("library", "float32"), MEASURED)], 0, GPU, "a test")
    path.write_text(path.read_text()[:-20])
    forget_tables()
    monkeypatch.setattr(launcher, "name_of", lambda device: GPU)
    for seed in range(3):
        i = make_inputs("unit", 8, 40, 24, torch.float32, seed=seed)
        assert_forward(linear_act(i.x, i.weight, i.bias), i.x, i.weight, i.bias, "gelu")
    (message,) = caplog.messages
    assert message.startswith(f"ignoring {path} (")


def test_entries_are_read_back_as_they_were_written() -> None:
    tma = Config("tma", "bfloat16", 128, 128, 64, 4, 3, 4, persistent=2, subtiles=2)
    entries = [entry(8), entry(16, config=tma), entry(32, 64, 64, Config("library", "tf32"))]
    remember(entries, 90, GPU, "a test")
    assert set(load_user_table(90, GPU)) == set(entries)
    assert parse_rows(map(entry_row, entries)) == tuple(entries)
    table = json.loads(lookup.table_path(90, GPU).read_text())
    assert (table["source"], table["device"], table["arch"]) == ("a test", GPU, 90)
    assert [row.get("group_m") for row in table["entries"]] == [4, None, None]  # defaults are left out


def test_a_second_run_replaces_what_it_measured_and_keeps_the_rest() -> None:
    library = Config("library", "float16")
    remember([entry(8), entry(64)], 90, GPU, "first")
    assert chosen_for(8) == TILE
    remember([entry(8, config=library), entry(8, 64, 64)], 90, GPU, "second")
    assert chosen_for(8) == library
    assert chosen_for(64) == chosen_for(8, 64, 64) == TILE
    assert len(load_user_table(90, GPU)) == 3


def damaged_row(**change: Any) -> Callable[[dict[str, Any]], str]:
    def damage(table: dict[str, Any]) -> str:
        table["entries"][0] |= change
        return json.dumps(table)

    return damage


DAMAGES: dict[str, Callable[[dict[str, Any]], str]] = {
    "truncated": lambda table: json.dumps(table)[:-20],
    "a list": lambda table: "[]",
    "without entries": lambda table: json.dumps({k: v for k, v in table.items() if k != "entries"}),
    "entries of numbers": lambda table: json.dumps(table | {"entries": [1]}),
    "another version": lambda table: json.dumps(table | {"version": lookup.VERSION - 1}),
    "another architecture": lambda table: json.dumps(table | {"arch": 89}),
    "unknown kernel": damaged_row(kernel="cudnn"),
    "unknown field": damaged_row(block_q=16),
    "a string": damaged_row(block_m="64"),
    "no power of two": damaged_row(block_m=48),
    "too much shared memory": damaged_row(block_m=256, block_n=256, num_stages=8),
    "M zero": damaged_row(m=0),
    "N missing": damaged_row(n=None),
    "any N and K": damaged_row(n=None, k=None),
    "not measured": damaged_row(measured=None),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_table_is_ignored_with_one_warning(
    damage: Callable[[dict[str, Any]], str], caplog: pytest.LogCaptureFixture
) -> None:
    path = remember([entry(512), entry(64)], 90, GPU, "a test")
    path.write_text(damage(json.loads(path.read_text())))
    forget_tables()
    for M in (64, 512, 512, 700):
        assert chosen_for(M) == shipped(M)
    (record,) = caplog.records
    assert record.name.startswith("bert_fused")
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(f"ignoring {path} (")
    assert "`python -m bert_fused tune`" in record.getMessage()
    assert "\n" not in record.getMessage()
    remember([entry(8)], 90, GPU, "measured again")
    assert chosen_for(8) == TILE
    assert chosen_for(512) == shipped(512)


def test_a_table_of_another_gpu_is_ignored_and_the_gpu_named(caplog: pytest.LogCaptureFixture) -> None:
    path = remember([entry(512)], 90, "NVIDIA Other GPU", "a test")
    path.rename(lookup.table_path(90, GPU))
    assert chosen_for(512) == shipped(512)
    assert f"it was measured on NVIDIA Other GPU, sm_90, and this is {GPU}, sm_90" in caplog.text


def test_tma_needs_an_architecture_that_has_it(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    tma = Config("tma", "float16", 64, 64, 64, 4, 2)
    remember([entry(512, config=tma)], 90, GPU, "a test")
    assert chosen_for(512) == tma
    remember([entry(512, config=tma)], 80, GPU, "a test")
    assert chosen_for(512, arch=80) == shipped(512, arch=80)
    assert "sm_80 has no tensor memory accelerator" in caplog.text


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
def test_everything_shipped_is_launchable(arch: int) -> None:
    for config in lookup.shipped_configs(arch):
        assert unlaunchable(config, arch) is None


def test_a_table_that_cannot_be_read_is_ignored_with_its_error(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = lookup.table_path(90, GPU)
    path.mkdir(parents=True)
    assert chosen_for(512) == shipped(512)
    (message,) = caplog.messages
    assert "Is a directory" in message


@pytest.mark.parametrize("cache", ["missing", "a file", "no home", "relative"])
def test_a_missing_table_is_ignored_without_a_warning(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    if cache == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
        assert lookup.table_path(90, GPU) is None
    else:
        value = {"missing": tmp_path / "none", "a file": tmp_path / "file", "relative": "cache"}[cache]
        monkeypatch.setenv("XDG_CACHE_HOME", str(value))
    if cache == "relative":
        assert lookup.folder() == Path("~/.cache/bert_fused").expanduser()
        monkeypatch.setenv("HOME", str(tmp_path))
    assert chosen_for(512) == shipped(512)
    assert not caplog.records


def read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every folder, as on a read-only file system. Permissions would not keep root from writing."""
    honest = Path.open

    def refuse(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if mode != "r":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return honest(path, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)


def test_a_read_only_folder_is_read_and_refuses_to_be_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = remember([entry(512)], 90, GPU, "a test")
    before = path.read_text()
    read_only(monkeypatch)
    forget_tables()
    assert chosen_for(512) == TILE
    with pytest.raises(OSError, match="Read-only file system"):
        remember([entry(8)], 90, GPU, "a test")
    assert chosen_for(512) == TILE
    assert path.read_text() == before
    assert not caplog.records


def test_the_folder_can_be_chosen_and_tables_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BERT_FUSED_TABLES", str(tmp_path / "mine"))
    assert remember([entry(512)], 90, GPU, "a test").parent == tmp_path / "mine"
    assert chosen_for(512) == TILE
    monkeypatch.setenv("BERT_FUSED_TABLES", "off")
    forget_tables()
    assert chosen_for(512) == shipped(512)
    with pytest.raises(OSError, match="BERT_FUSED_TABLES is off"):
        remember([entry(512)], 90, GPU, "a test")


def test_a_write_that_fails_leaves_the_old_table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = remember([entry(512)], 90, GPU, "a test")
    before = path.read_text()

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        remember([entry(8)], 90, GPU, "a test")
    assert path.read_text() == before
    assert list(folder.iterdir()) == [path]
    assert chosen_for(512) == TILE


def test_lookup_reads_the_file_once(monkeypatch: pytest.MonkeyPatch) -> None:
    remember([entry(512)], 90, GPU, "a test")
    reads: list[Path] = []
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, *a, **k: reads.append(path) or read(path, *a, **k))
    for M in range(1, 300):
        chosen_for(M)
        chosen_for(M, N=64 * M, device="NVIDIA Other GPU")
    assert len([path for path in reads if path.parent.name == "bert_fused"]) == 2
