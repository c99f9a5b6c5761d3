"""Which configuration serves which shape, and that the shipped tables are what they claim."""

import dataclasses
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bert_fused.kernels import linear_act as launcher
from bert_fused.kernels import lookup
from bert_fused.kernels.configs import SHARED_MEMORY, Config, Entry, Measured, default_config
from bert_fused.kernels.linear_act import _is_aligned, _precision, linear_act_fwd
from bert_fused.kernels.lookup import MAX_M, MAX_N, TABLES, get_config, load_table, shipped_configs
from bert_fused.tune.candidates import CHIPS, LATENCY, candidates, modelled_clocks
from bert_fused.tune.shapes import MODELS

ROOT = Path(__file__).parents[2]
TABLE_ARCHS = sorted(int(path.stem.removeprefix("sm_")) for path in TABLES.glob("sm_*.json"))
KERNEL_DTYPES = ("float16", "bfloat16", "tf32")


def config(name: int, dtype: str = "float16") -> Config:
    """Configurations that differ only so that a test can tell them apart."""
    return Config("pointer", dtype, 64, 64, 64, num_warps=4, num_stages=3, group_m=name)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    entries = (
        Entry(16, None, None, config(1)),
        Entry(256, None, None, config(2)),
        Entry(4096, None, None, config(3)),
        Entry(512, 3072, 768, config(4)),
        Entry(512, 3072, None, config(5)),
        Entry(64, None, None, config(6, "bfloat16")),
        Entry(64, None, None, Config("library", "tf32")),
    )
    lookup._entries_for.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(lookup, "load_table", lambda arch: entries if arch == 90 else ())
        yield
    lookup._entries_for.cache_clear()


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(
    ("M", "expected"), [(1, 1), (16, 1), (63, 1), (65, 2), (1023, 2), (1025, 3), (4096, 3), (2**30, 3), (0, 1)]
)
def test_lookup_takes_the_shipped_entry_nearest_in_log_rows(M: int, expected: int) -> None:
    """16 and 256 meet at 64, their geometric mean; 256 and 4096 at 1024."""
    assert get_config(M, 1024, 1024, "float16", 90, aligned=True) == config(expected)


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("M", [128, 256, 512, 2048])
def test_an_entry_for_the_shape_beats_nearer_rows(M: int) -> None:
    assert get_config(M, 3072, 768, "float16", 90, aligned=True) == config(4)
    assert get_config(M, 768, 3072, "float16", 90, aligned=True) != config(4)


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(("M", "expected"), [(0, 1), (1, 1), (127, 2), (2049, 3), (2**20, 3)])
def test_an_entry_for_the_shape_reaches_a_factor_of_four(M: int, expected: int) -> None:
    assert get_config(M, 3072, 768, "float16", 90, aligned=True) == config(expected)


@pytest.mark.usefixtures("table")
def test_entries_serve_their_own_dtype_only() -> None:
    assert get_config(4096, 1024, 1024, "bfloat16", 90, aligned=True) == config(6, "bfloat16")
    assert get_config(4096, 1024, 1024, "tf32", 90, aligned=True) == Config("library", "tf32")


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("arch", [80, 90])
def test_cublas_serves_unaligned_rows_and_ieee_fp32(arch: int) -> None:
    assert get_config(512, 3072, 768, "float16", arch, aligned=False) == Config("library", "float16")
    for aligned in (False, True):
        assert get_config(512, 3072, 768, "float32", arch, aligned=aligned) == Config("library", "float32")


@pytest.mark.parametrize("arch", [0, 80, 86, 90])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("M", [1, 4096])
def test_cublas_serves_products_with_k_of_0(M: int, dtype: str, arch: int) -> None:
    """No descriptor describes a matrix without columns, and the kernel assumes that there are some."""
    assert get_config(M, 3072, 0, dtype, arch, aligned=True) == Config("library", dtype)


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize(("N", "K"), [(768, 3072), (1024, 4096), (2048, 2048)])
def test_cublas_serves_a_long_k_without_measured_times(N: int, K: int, dtype: str, arch: int) -> None:
    for M in (1, 512, 8192, 131072):
        assert get_config(M, N, K, dtype, arch, aligned=True) == Config("library", dtype)
    assert get_config(512, N, 2040, dtype, arch, aligned=True) != Config("library", dtype)
    assert get_config(512, N, K, "float16", 0, aligned=True) != Config("library", "float16")


@pytest.mark.parametrize("measured", [None, Measured(10.0, 12.0, 15.0, "2026-11-24", "torch 2.13")])
def test_a_long_k_is_served_by_an_entry_with_measured_times(
    measured: Measured | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For its own N and K and within its reach, and not by one that was computed, or is for any N and K."""
    entries = (Entry(512, 768, 3072, config(1), measured), Entry(512, None, None, config(2)))
    monkeypatch.setattr(lookup, "load_table", lambda arch: entries if arch == 90 else ())
    lookup._entries_for.cache_clear()
    library = Config("library", "float16")
    found = [get_config(M, 768, 3072, "float16", 90, aligned=True) for M in (127, 128, 2048, 2049)]
    other = get_config(512, 1024, 3072, "float16", 90, aligned=True)
    lookup._entries_for.cache_clear()
    assert found == [library, *(2 * [config(1) if measured else library]), library]
    assert other == library


def worst_lookup(model: str, dtype: str, arch: int) -> tuple[float, str]:
    """Return how many times the model's best candidate's clocks a look-up costs at worst, and where.

    For a model's intermediate and pooler, at 1 to 131072 rows. No table names the kernel "hopper" unmeasured.
    """
    K, wide = MODELS[model]
    rows = [2**i * quarters // 4 for i in range(18) for quarters in (4, 5, 6, 7) if i >= 2 or quarters == 4]
    found = []
    for N, M in itertools.product((wide, K), (M for M in rows if M <= 131072)):
        chosen = get_config(M, N, K, dtype, arch, aligned=True)
        offered = (c for c in candidates(M, N, K, dtype, arch) if c.kernel not in ("library", "hopper"))
        best = min(modelled_clocks(config, M, N, K, arch) for config in offered)
        found.append((modelled_clocks(chosen, M, N, K, arch) / best, f"{M}x{N}: {chosen}"))
    return max(found)


@pytest.mark.parametrize("arch", TABLE_ARCHS)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("model", MODELS)
def test_no_lookup_is_behind_the_best_candidate_of_the_model_that_made_the_tables(
    model: str, dtype: str, arch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more than a tenth behind. They were made before the model was calibrated, from data sheets."""
    monkeypatch.setitem(CHIPS, arch, dataclasses.replace(CHIPS[arch], l2=64.0, sustained=1.0, start=LATENCY))
    monkeypatch.setattr("bert_fused.tune.candidates.MEMORY_SHARE", 1.0)
    assert worst_lookup(model, dtype, arch) < (1.1, "")


# At worst, how far look-ups are behind the best candidate of the calibrated model. An entry goes when the table does
# better; the tables wait for a GPU.
BEHIND = {(80, "16"): 1.24, (80, "tf32"): 1.28, (90, "16"): 1.46, (90, "tf32"): 1.47}


@pytest.mark.parametrize("arch", TABLE_ARCHS)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_how_far_lookups_are_behind_the_calibrated_model_is_known(dtype: str, arch: int) -> None:
    limit = BEHIND.get((arch, "16" if "16" in dtype else dtype), 1.1)
    worst = max(worst_lookup(model, dtype, arch) for model in MODELS)
    assert worst[0] < limit, worst
    assert limit == 1.1 or worst[0] > limit - 0.02, f"{worst}: no longer as far behind"


@pytest.mark.parametrize("arch", [0, 90])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_cublas_serves_sizes_past_32_bit_offsets(dtype: str, arch: int) -> None:
    library = Config("library", dtype)
    assert get_config(512, MAX_N + 1, 64, dtype, arch, aligned=True) == library
    assert get_config(MAX_M + 1, 64, 64, dtype, arch, aligned=True) == library
    assert get_config(512, MAX_N, 64, dtype, arch, aligned=True) != library
    assert get_config(MAX_M, 64, 64, dtype, arch, aligned=True) != library


def test_limits_keep_offsets_inside_32_bits() -> None:
    """The kernel's 32-bit offsets: rows of a tile times N, and the row after the last tile."""
    shipped = [config for arch in (0, *TABLE_ARCHS, 86) for config in shipped_configs(arch)]
    assert max(config.block_m for config in shipped) * MAX_N + max(config.block_n for config in shipped) < 2**31
    assert MAX_M + max(config.block_m for config in shipped) < 2**31


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("M", [0, 1, 256, 257, 4096])
def test_an_architecture_without_a_table_gets_the_default_configuration(M: int, dtype: str) -> None:
    assert load_table(86) == ()
    assert get_config(M, 3072, 768, dtype, 86, aligned=True) == default_config(M, dtype, 86)


def test_the_interpreter_takes_every_shape() -> None:
    """It needs no alignment and multiplies in IEEE fp32, so that tests reach the Triton kernel with every shape."""
    for dtype in ("float16", "bfloat16", "float32"):
        assert get_config(5, 37, 32, dtype, 0, aligned=False).kernel == "pointer"


@pytest.mark.parametrize("arch", TABLE_ARCHS)
def test_shipped_tables_are_complete_and_name_their_source(arch: int) -> None:
    raw = json.loads((TABLES / f"sm_{arch}.json").read_text())
    assert raw["arch"] == arch
    assert len(raw["source"]) > 20
    entries = load_table(arch)
    assert {entry.config.dtype for entry in entries} == set(KERNEL_DTYPES)
    assert {entry.config.kernel for entry in entries} <= {"pointer", "tma", "library"}
    assert len({(entry.m, entry.n, entry.k, entry.config.dtype) for entry in entries}) == len(entries)
    for entry in entries:
        assert entry.m > 0
        if entry.config.kernel == "library":
            continue
        blocks = (entry.config.block_m, entry.config.block_n, entry.config.block_k, entry.config.num_warps)
        assert all(block > 0 and block & (block - 1) == 0 for block in blocks)
        assert entry.config.num_stages >= 1
        assert entry.config.group_m >= 1


@pytest.mark.parametrize("arch", sorted({*TABLE_ARCHS, *SHARED_MEMORY}))
def test_operand_tiles_fit_shared_memory(arch: int) -> None:
    """Tiles in flight alone, as a quick check; test_compile.py asks the compiler."""
    for shipped in shipped_configs(arch):
        itemsize = 4 if shipped.dtype == "tf32" else 2
        tiles = (shipped.block_m + shipped.block_n) * shipped.block_k * itemsize
        # The pipeline of an sm_8x keeps num_stages - 1 tiles in flight, that of an sm_90 all.
        stages = shipped.num_stages - (arch < 90 or arch >= 120)
        assert tiles * stages <= SHARED_MEMORY[arch], shipped


@pytest.mark.parametrize("arch", [arch for arch in sorted({*TABLE_ARCHS, *SHARED_MEMORY}) if arch < 90])
def test_no_shipped_configuration_uses_tma_before_hopper(arch: int) -> None:
    assert all(shipped.kernel == "pointer" for shipped in shipped_configs(arch))


@pytest.mark.parametrize("arch", [0, *TABLE_ARCHS, 86, 100])
def test_shipped_configs_holds_every_tile_that_lookup_returns(arch: int) -> None:
    shipped = list(shipped_configs(arch))
    assert len(set(shipped)) == len(shipped)
    looked_up = {
        get_config(M, 3072, 768, dtype, arch, aligned=True)
        for M in (1, 16, 64, 256, 4096, 2**20)
        for dtype in KERNEL_DTYPES
    }
    assert {found for found in looked_up if found.kernel != "library"} <= set(shipped)


def test_configurations_are_frozen_and_readable() -> None:
    shipped = config(8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        shipped.block_m = 32  # type: ignore[misc]
    assert len({shipped, config(8), config(4)}) == 2
    assert str(shipped) == "pointer 64x64x64 4 warps 3 stages"
    assert str(Config("library", "float16")) == "cuBLAS + activation pass"


@pytest.fixture
def fp32_precision() -> Iterator[None]:
    """Restores torch's setting. It lives behind ``__getattr__``, where monkeypatch would not find it."""
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.usefixtures("fp32_precision")
def test_fp32_follows_torchs_setting() -> None:
    for setting, expected in (("ieee", "float32"), ("tf32", "tf32")):
        torch.backends.cuda.matmul.fp32_precision = setting
        assert _precision(torch.float32) == expected
        assert _precision(torch.bfloat16) == "bfloat16"
        assert _precision(torch.float16) == "float16"


def test_no_source_reads_torchs_older_fp32_settings() -> None:
    """Once ``fp32_precision`` was set to "tf32", torch's older getters raise."""
    old = re.compile(r"allow_tf32|float32_matmul_precision")
    files = [path for folder in ("kernels", "bert_fused", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 40
    assert not [path for path in files if old.search(path.read_text())]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_is_aligned_wants_contiguous_rows_on_16_byte_boundaries(dtype: torch.dtype) -> None:
    """Rows, of the output too, are contiguous and start on 16-byte boundaries, and do not overlap."""
    elements = 16 // dtype.itemsize
    memory = torch.zeros(64, 64, dtype=dtype)
    assert _is_aligned(memory, 64)
    assert _is_aligned(memory[:, :32], elements)
    assert _is_aligned(memory[1::2], 64)
    assert not _is_aligned(memory, elements // 2)
    assert not _is_aligned(memory[:, : elements // 2], 64)
    assert not _is_aligned(memory[:, 1:33], 64)
    assert not _is_aligned(memory.t(), 64)
    assert not _is_aligned(memory[:1].expand(8, 64), 64)
    assert not _is_aligned(torch.zeros(64 * 66, dtype=dtype).view(64, 66)[:, :64], 64)


@pytest.mark.parametrize(
    ("offsets", "N", "aligned"),
    [((0, 0), 64, True), ((1, 0), 64, False), ((0, 1), 64, False), ((8, 8), 64, True), ((0, 0), 60, False)],
    ids=["all", "x", "weight", "whole boundaries", "output"],
)
def test_lookup_is_told_aligned_only_if_rows_of_every_matrix_are(
    offsets: tuple[int, int], N: int, aligned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of x, the weight and the output: lookup is told that rows are aligned only if all are."""
    asked: list[bool] = []

    def watched(*args: Any, **kwargs: Any) -> Config:
        asked.append(kwargs["aligned"])
        return Config("library", "float16")

    monkeypatch.setattr(launcher, "get_config", watched)
    x, weight = (
        torch.ones(size + 16, dtype=torch.float16)[offset : offset + size].view(-1, 64)
        for size, offset in zip((4 * 64, N * 64), offsets, strict=True)
    )
    out, _ = linear_act_fwd(x, weight, None, activation="none", save_preact=False)
    assert asked == [aligned]
    assert torch.equal(out, torch.full_like(out, 64))
