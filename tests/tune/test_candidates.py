"""What the tuner is offered, and that the cycle model ranks as its parts say."""

import dataclasses

import pytest

from bert_fused.kernels.configs import SHARED_MEMORY, Config, unlaunchable
from bert_fused.kernels.lookup import get_config
from bert_fused.tune.candidates import candidates, modelled_clocks, resident_blocks, shared_bytes

SHAPES = [(3072, 768), (4096, 1024), (1536, 384), (768, 768), (384, 384)]


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "tf32"])
def test_candidates_fit_and_hold_lookups_choice_and_the_library(dtype: str, arch: int) -> None:
    for N, K in SHAPES:
        for M in (1, 16, 17, 64, 300, 512, 2048, 65536):
            offered = candidates(M, N, K, dtype, arch)
            assert offered[0] == get_config(M, N, K, dtype, arch, aligned=True)
            assert Config("library", dtype) in offered
            assert len(offered) == len(set(offered))
            assert 4 <= len(offered) <= 40
            assert offered == candidates(M, N, K, dtype, arch)
            for config in offered:
                assert config.dtype == dtype
                if config.kernel != "library":
                    assert shared_bytes(config, arch) <= SHARED_MEMORY[arch], config
                assert unlaunchable(config, arch) is None, config


@pytest.mark.parametrize("arch", [87, 101, 103, 110, 121])
def test_no_candidate_is_refused_by_lookup_on_architectures_without_a_table(arch: int) -> None:
    """A table with one configuration that its GPU cannot launch is ignored as a whole."""
    for config in candidates(8192, 3072, 768, "bfloat16", arch):
        assert unlaunchable(config, arch) is None, config


def test_tiles_that_spill_are_not_offered_where_they_do() -> None:
    """Seen by compiling: sm_86 and sm_89 give a thread of 4 warps too few registers, and TF32 needs the most."""
    spills = Config("pointer", "float16", 64, 64, 64, 4, 4)
    for arch in (80, 86, 89):
        assert (spills in candidates(512, 3072, 768, "float16", arch)) == (arch == 80)
        assert dataclasses.replace(spills, num_warps=8) in candidates(512, 3072, 768, "float16", arch) or arch == 80
        for dtype in ("float16", "bfloat16"):
            assert Config("pointer", dtype, 128, 128, 64, 4, 3) not in candidates(512, 3072, 768, dtype, arch)
        assert Config("pointer", "float16", 64, 32, 128, 4, 4) not in candidates(512, 3072, 768, "float16", arch)
        assert Config("pointer", "float16", 64, 32, 128, 8, 4) in candidates(512, 3072, 768, "float16", arch)
        assert Config("pointer", "tf32", 128, 128, 32, 4, 3) not in candidates(512, 3072, 768, "tf32", arch)


def test_the_widest_tile_is_stored_in_two_slices_on_hopper_alone() -> None:
    """Seen by compiling: on sm_100 it spills with Triton 3.8 and 3.9."""
    for arch in (90, 100):
        offered = [c for c in candidates(65536, 4096, 1024, "float16", arch) if c.kernel == "tma"]
        wide = [c for c in offered if c.persistent and c.block_n == 256]
        assert {config.subtiles for config in wide} == ({1, 2} if arch == 90 else {1})


def test_cublas_is_the_only_candidate_where_no_kernel_serves() -> None:
    assert candidates(512, 3072, 768, "float32", 90) == [Config("library", "float32")]
    assert candidates(512, 3072, 0, "bfloat16", 90) == [Config("library", "bfloat16")]


def test_the_interpreter_is_offered_what_it_can_run() -> None:
    offered = candidates(512, 3072, 768, "float32", 0)
    assert offered[-1] == Config("library", "float32")
    assert max(config.block_m * config.block_n for config in offered) <= 1024


def test_persistent_blocks_are_offered_where_they_can_pay() -> None:
    def offered(M: int, N: int, K: int) -> list[Config]:
        return candidates(M, N, K, "bfloat16", 90)

    assert any(config.persistent for config in offered(8192, 3072, 768))
    assert not any(config.persistent for config in offered(512, 768, 768)), "one tile a block"
    for config in offered(8192, 3072, 768):
        assert not config.persistent or config.persistent <= resident_blocks(config, 90), config


def test_the_cycle_model_ranks_rows_epilogues_and_empty_tiles() -> None:
    """More rows, more time; an exposed epilogue costs; a mostly empty tile wastes."""
    tile = Config("tma", "bfloat16", 128, 128, 64, 4, 3)

    def clocks(config: Config, M: int, N: int = 3072, K: int = 768) -> float:
        return modelled_clocks(config, M, N, K, 90)

    assert clocks(tile, 2048) < clocks(tile, 4096) < clocks(tile, 8192)
    # 167 registers are compiled for the first, 148 for the second.
    assert resident_blocks(Config("pointer", "bfloat16", 128, 128, 64, 8, 3), 80) == 1
    assert resident_blocks(Config("pointer", "bfloat16", 64, 128, 64, 4, 4), 90) == 2
    one_block = dataclasses.replace(tile, num_stages=4, block_k=128)
    assert resident_blocks(tile, 90) == 2
    assert resident_blocks(one_block, 90) == 1
    assert clocks(tile, 8192) < clocks(one_block, 8192)
    narrow = Config("pointer", "bfloat16", 16, 32, 128, 4, 4)
    assert clocks(narrow, 8) < clocks(tile, 8)
