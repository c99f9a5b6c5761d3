"""Tables in the user's cache directory: written whole, read with care, merged under a lock, preferred by lookup."""

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from reference64 import assert_forward, make_inputs

from bert_fused import linear_act
from bert_fused.kernels import linear_act as launcher
from bert_fused.kernels import user_tables
from bert_fused.kernels.configs import Config, Entry, Measured, unlaunchable
from bert_fused.kernels.lookup import entry_row, forget_tables, get_config, load_user_table, parse_rows, remember

ROOT = Path(__file__).parents[2]
GPU = "NVIDIA Test GPU"
MEASURED = Measured(8.25, 12.5, 14.0, "2026-11-22", "torch 2, Triton 3")
TILE = Config("pointer", "float16", 32, 64, 64, num_warps=4, num_stages=4)


def entry(M: int, N: int = 3072, K: int = 768, config: Config = TILE) -> Entry:
    return Entry(M, N, K, config, MEASURED)


def lookup(M: int, N: int = 3072, K: int = 768, dtype: str = "float16", arch: int = 90, device: str = GPU) -> Config:
    return get_config(M, N, K, dtype, arch, aligned=True, device=device)


def shipped(M: int, N: int = 3072, K: int = 768, dtype: str = "float16", arch: int = 90) -> Config:
    return get_config(M, N, K, dtype, arch, aligned=True)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.delenv("BERT_FUSED_TABLES", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(user_tables, "_warned", {})
    forget_tables()
    yield tmp_path / "bert_fused"
    forget_tables()


def written(folder: Path) -> Path:
    """The one table in the folder."""
    (path,) = folder.glob("*.json")
    return path


def test_a_measured_entry_is_preferred_within_its_reach(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert lookup(512) == shipped(512) != TILE
    path = remember([entry(512)], 90, GPU, "a test")
    assert path == written(folder) == folder / "sm_90-nvidia-test-gpu.json"
    for M in (128, 512, 700, 2048):
        assert lookup(M) == TILE
    for M in (0, 1, 127, 2049, 2**20):
        assert lookup(M) == shipped(M) != TILE
    assert lookup(512, N=768, K=3072) == shipped(512, N=768, K=3072)
    assert lookup(512, dtype="bfloat16") == shipped(512, dtype="bfloat16")
    for other in ("", "NVIDIA Other GPU"):
        assert lookup(512, device=other) == shipped(512)
    assert lookup(512, arch=80) == shipped(512, arch=80)
    assert not caplog.records


def test_what_is_measured_here_goes_before_what_is_shipped_for_the_same_shape(monkeypatch, tmp_path: Path) -> None:
    rows = [entry_row(entry(M, config=Config("library", "float16"))) for M in (500, 4096)]
    (tmp_path / "sm_90.json").write_text(json.dumps({"arch": 90, "source": "a test", "entries": rows}))
    monkeypatch.setattr(lookup, "TABLES", tmp_path)
    remember([entry(512)], 90, GPU, "a test")
    assert shipped(500) == Config("library", "float16")
    assert lookup(500) == lookup(2048) == TILE
    assert lookup(4096) == Config("library", "float16")


def test_nearest_measured_rows_in_logarithm() -> None:
    other = Config("library", "float16")
    remember([entry(64), entry(512, config=other)], 90, GPU, "a test")
    for M, expected in ((16, TILE), (181, TILE), (182, other), (2048, other)):
        assert lookup(M) == expected


def test_alignment_and_ieee_fp32_go_before_any_table() -> None:
    remember([entry(512)], 90, GPU, "a test")
    assert get_config(512, 3072, 768, "float16", 90, aligned=False, device=GPU).kernel == "library"
    assert lookup(512, dtype="float32").kernel == "library"


def test_the_launcher_asks_for_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the public function down: the table of the tensor's GPU decides."""
    chosen = Config("library", "float32")
    remember([Entry(8, 40, 24, chosen, MEASURED)], 0, GPU, "a test")
    seen: list[Config] = []
    monkeypatch.setattr(launcher, "get_config", lambda *a, **k: seen.append(get_config(*a, **k)) or seen[-1])
    arguments = torch.ones(8, 24), torch.ones(40, 24)
    linear_act(*arguments)
    monkeypatch.setattr(launcher, "name_of", lambda device: GPU)
    linear_act(*arguments)
    assert [config.kernel for config in seen] == ["pointer", "library"]


FAULTS: dict[str, Callable[[Path, str], Any]] = {
    "truncated": lambda path, text: path.write_text(text[:-20]),
    "foreign": lambda path, text: path.write_text('{"kernel": "somebody else\'s"}'),
    "of another GPU": lambda path, text: path.write_text(text.replace(GPU, "NVIDIA Other GPU")),
    "binary": lambda path, text: path.write_bytes(bytes(range(256))),
    "a folder": lambda path, text: (path.unlink(), path.mkdir()),
    "forbidden": lambda path, text: path.chmod(0),
    "missing": lambda path, text: path.unlink(),
    "in a missing folder": lambda path, text: shutil.rmtree(path.parent),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_results_are_right_whatever_became_of_the_table(
    fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Through the public function: the shipped choice serves, and one warning says so if there is something wrong."""
    path = remember([Entry(8, 40, 24, Config("library", "float32"), MEASURED)], 0, GPU, "a test")
    FAULTS[fault](path, path.read_text())
    if fault == "forbidden":  # nothing is, to root
        honest = Path.read_text
        monkeypatch.setattr(Path, "read_text", lambda p, *a, **k: honest(p, *a, **k) if p != path else forbid(p))
    forget_tables()
    seen: list[Config] = []
    monkeypatch.setattr(launcher, "get_config", lambda *a, **k: seen.append(get_config(*a, **k)) or seen[-1])
    monkeypatch.setattr(launcher, "name_of", lambda device: GPU)
    for seed in range(3):
        i = make_inputs("unit", 8, 40, 24, torch.float32, seed=seed)
        assert_forward(linear_act(i.x, i.weight, i.bias), i.x, i.weight, i.bias, "gelu")
    assert [config.kernel for config in seen] == ["pointer"] * 3
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == (0 if "missing" in fault else 1)
    assert all(message.startswith(f"ignoring {path}: ") for message in warnings)


def forbid(path: Path) -> Any:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def test_rows_survive_the_file() -> None:
    tma = Config("tma", "bfloat16", 128, 128, 64, 4, 3, 4, persistent=2, subtiles=2)
    entries = [entry(8), entry(16, config=tma), entry(32, 64, 64, Config("library", "tf32"))]
    remember(entries, 90, GPU, "a test")
    assert set(load_user_table(90, GPU)) == set(entries)
    assert parse_rows(map(entry_row, entries)) == tuple(entries)
    table = json.loads(user_tables.table_path(90, GPU).read_text())
    assert (table["source"], table["device"], table["arch"]) == ("a test", GPU, 90)
    assert [row.get("group_m") for row in table["entries"]] == [4, None, None]  # defaults are left out


def test_a_second_run_replaces_what_it_measured_and_keeps_the_rest() -> None:
    library = Config("library", "float16")
    remember([entry(8), entry(64)], 90, GPU, "first")
    assert lookup(8) == TILE
    remember([entry(8, config=library), entry(8, 64, 64)], 90, GPU, "second")
    assert lookup(8) == library
    assert lookup(64) == lookup(8, 64, 64) == TILE
    assert len(load_user_table(90, GPU)) == 3


def damaged_row(**change: Any) -> Callable[[dict[str, Any]], str]:
    def damage(table: dict[str, Any]) -> str:
        table["entries"][0] |= change
        return json.dumps(table)

    return damage


DAMAGES: dict[str, Callable[[dict[str, Any]], str]] = {
    "empty": lambda table: "",
    "truncated": lambda table: json.dumps(table)[:-20],
    "not json": lambda table: "\0\1",
    "a list": lambda table: "[]",
    "null": lambda table: "null",
    "without entries": lambda table: json.dumps({k: v for k, v in table.items() if k != "entries"}),
    "entries of numbers": lambda table: json.dumps(table | {"entries": [1]}),
    "entries a string": lambda table: json.dumps(table | {"entries": "none"}),
    "entries an object": lambda table: json.dumps(table | {"entries": {}}),
    "older": lambda table: json.dumps(table | {"version": user_tables.VERSION - 1}),
    "newer": lambda table: json.dumps(table | {"version": user_tables.VERSION + 1}),
    "another GPU": lambda table: json.dumps(table | {"device": "NVIDIA Other GPU"}),
    "another architecture": lambda table: json.dumps(table | {"arch": 89}),
    "unknown kernel": damaged_row(kernel="cudnn"),
    "unknown dtype": damaged_row(dtypes=["int8"]),
    "unknown field": damaged_row(block_q=16),
    "a float": damaged_row(num_warps=4.0),
    "a string": damaged_row(block_m="64"),
    "a bool": damaged_row(num_stages=True),
    "no power of two": damaged_row(block_m=48),
    "no tile": damaged_row(block_m=0),
    "negative stages": damaged_row(num_stages=-1),
    "too much shared memory": damaged_row(block_m=256, block_n=256, num_stages=8),
    "a huge tile": damaged_row(block_m=4096, block_n=16, block_k=16, num_stages=1),
    "a narrow tile": damaged_row(block_k=8),
    "many warps": damaged_row(num_warps=64),
    "a field of an older version": damaged_row(split_k=2),
    "many blocks per SM": damaged_row(kernel="tma", block_m=64, persistent=2**20),
    "M zero": damaged_row(m=0),
    "M a string": damaged_row(m="512"),
    "N missing": damaged_row(n=None),
    "any N and K": damaged_row(n=None, k=None),
    "not measured": damaged_row(measured=None),
    "measured in words": damaged_row(measured={"us": "fast"}),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_table_that_cannot_be_used_is_ignored_with_one_warning(
    damage: Callable[[dict[str, Any]], str], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = remember([entry(512), entry(64)], 90, GPU, "a test")
    path.write_text(damage(json.loads(path.read_text())))
    forget_tables()
    for M in (64, 512, 512, 700):
        assert lookup(M) == shipped(M)
    forget_tables()
    assert lookup(64) == shipped(64)
    (record,) = caplog.records
    assert record.name.startswith("bert_fused")
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(f"ignoring {path}: it ")
    assert "`python -m bert_fused tune`" in record.getMessage()
    assert "\n" not in record.getMessage()
    remember([entry(8)], 90, GPU, "measured again")
    assert lookup(8) == TILE
    assert lookup(512) == shipped(512)


def test_another_gpus_numbers_are_named(caplog: pytest.LogCaptureFixture) -> None:
    path = remember([entry(512)], 90, "NVIDIA Other GPU", "a test")
    path.rename(user_tables.table_path(90, GPU))
    assert lookup(512) == shipped(512)
    assert f"it was measured on NVIDIA Other GPU, sm_90, and this is {GPU}, sm_90" in caplog.text


def test_tma_needs_an_architecture_that_has_it(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    tma = Config("tma", "float16", 64, 64, 64, 4, 2)
    remember([entry(512, config=tma)], 90, GPU, "a test")
    assert lookup(512) == tma
    remember([entry(512, config=tma)], 80, GPU, "a test")
    assert lookup(512, arch=80) == shipped(512, arch=80)
    assert "sm_80 has no tensor memory accelerator" in caplog.text


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
def test_everything_shipped_is_launchable(arch: int) -> None:
    for config in lookup.shipped_configs(arch):
        assert unlaunchable(config, arch) is None


def test_a_table_that_cannot_be_read(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = user_tables.table_path(90, GPU)
    path.mkdir(parents=True)
    assert lookup(512) == shipped(512)
    assert caplog.messages == [
        f"ignoring {path}: Is a directory; `python -m bert_fused tune` measures a new one",
    ]


@pytest.mark.parametrize("cache", ["missing", "a file", "no home", "relative"])
def test_nothing_to_read_is_nothing_to_warn_of(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    if cache == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
        assert user_tables.table_path(90, GPU) is None
    else:
        value = {"missing": tmp_path / "none", "a file": tmp_path / "file", "relative": "cache"}[cache]
        monkeypatch.setenv("XDG_CACHE_HOME", str(value))
    if cache == "relative":
        assert user_tables.folder() == Path("~/.cache/bert_fused").expanduser()
        monkeypatch.setenv("HOME", str(tmp_path))
    assert lookup(512) == shipped(512)
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
    assert lookup(512) == TILE
    with pytest.raises(OSError, match="Read-only file system"):
        remember([entry(8)], 90, GPU, "a test")
    assert lookup(512) == TILE
    assert path.read_text() == before
    assert not caplog.records


def test_the_folder_can_be_chosen_and_tables_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BERT_FUSED_TABLES", str(tmp_path / "mine"))
    assert remember([entry(512)], 90, GPU, "a test").parent == tmp_path / "mine"
    assert lookup(512) == TILE
    monkeypatch.setenv("BERT_FUSED_TABLES", "off")
    forget_tables()
    assert lookup(512) == shipped(512)
    with pytest.raises(OSError, match="BERT_FUSED_TABLES is off"):
        remember([entry(512)], 90, GPU, "a test")


def test_a_write_that_fails_leaves_the_old_table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = remember([entry(512)], 90, GPU, "a test")
    before = path.read_text()

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    for owner, name in ((os, "fsync"), (os, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            with pytest.raises(OSError, match="No space left"):
                remember([entry(8)], 90, GPU, "a test")
        assert path.read_text() == before
        assert {p.suffix for p in folder.iterdir()} == {".json", ".lock"}
    assert lookup(512) == TILE


def test_lookup_reads_the_file_once(monkeypatch: pytest.MonkeyPatch) -> None:
    remember([entry(512)], 90, GPU, "a test")
    reads: list[Path] = []
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, *a, **k: reads.append(path) or read(path, *a, **k))
    for M in range(1, 300):
        lookup(M)
        lookup(M, N=64 * M, device="NVIDIA Other GPU")
    assert len([path for path in reads if path.parent.name == "bert_fused"]) == 2


def test_threads_see_one_warning_and_one_choice(caplog: pytest.LogCaptureFixture, monkeypatch) -> None:
    path = remember([entry(512)], 90, GPU, "a test")
    path.write_text("{")
    forget_tables()
    rows = user_tables._rows

    def slow(*arguments: Any) -> Any:
        time.sleep(0.05)
        return rows(*arguments)

    monkeypatch.setattr(user_tables, "_rows", slow)
    found: list[Config] = []
    threads = [threading.Thread(target=lambda: found.append(lookup(512))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [shipped(512)] * 8
    assert len(caplog.records) == 1


KILLED = """
import os, signal
from bert_fused.kernels.configs import Config, Entry, Measured
from bert_fused.kernels.lookup import remember

os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
remember([Entry(8, 64, 64, Config("library", "float16"), Measured(1.0, 1.0, 1.0, "", ""))], 90, "G", "a test")
"""


def test_a_writer_that_was_killed_leaves_the_old_table_and_no_lock(folder: Path, caplog) -> None:
    table = Entry(512, 64, 64, TILE, MEASURED)
    path = remember([table], 90, "G", "a test")
    before = path.read_text()
    killed = subprocess.run([sys.executable, "-c", KILLED], cwd=ROOT, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert len([p for p in folder.iterdir() if p.name.startswith(".")]) == 1, "it was killed while it wrote"
    assert path.read_text() == before
    forget_tables()
    assert load_user_table(90, "G") == (table,)
    started = time.monotonic()
    remember([Entry(64, 64, 64, TILE, MEASURED)], 90, "G", "a test")
    assert time.monotonic() - started < 5
    assert sorted(e.m for e in load_user_table(90, "G")) == [64, 512]
    assert not caplog.records


WRITER = """
import sys, time
from pathlib import Path
from bert_fused.kernels.configs import Config, Entry, Measured
from bert_fused.kernels.lookup import remember

first, ready, start = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
ready.touch()
while not start.exists():
    time.sleep(0.001)
for m in range(first, first + 40):
    remember([Entry(m, 64, 64, Config("library", "float16"), Measured(1.0, 1.0, 1.0, "", ""))], 90, "G", "a test")
"""


def test_two_processes_lose_nothing(folder: Path, tmp_path: Path) -> None:
    start = tmp_path / "start"
    ready = [tmp_path / "ready1", tmp_path / "ready1001"]
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(first), str(path), str(start)], cwd=ROOT)
        for first, path in zip((1, 1001), ready, strict=True)
    ]
    try:
        while not all(path.exists() for path in ready):
            assert all(writer.poll() is None for writer in writers)
            time.sleep(0.01)
        start.touch()
        while any(writer.poll() is None for writer in writers):
            if folder.exists():
                for path in folder.glob("*.json"):
                    json.loads(path.read_text())
    finally:
        codes = [writer.wait() for writer in writers]
    assert codes == [0, 0]
    assert sorted(e.m for e in load_user_table(90, "G")) == [*range(1, 41), *range(1001, 1041)]
