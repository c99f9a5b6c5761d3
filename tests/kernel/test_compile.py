"""The compiled kernels, without a GPU: their resources, instructions and the width of their offsets.

This process interprets kernels, so other processes, without ``TRITON_INTERPRET``, compile them.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.static.machine_code import hides_bias
from benchmarks.static.sass import (
    MODEL_SHAPES,
    RESIDENT_BLOCKS,
    broken_budgets,
    intended_blocks,
    linear_times,
    offered_configs,
    pass_times,
    shapes_served,
)
from bert_fused.kernels.configs import Config
from bert_fused.kernels.gated import gated_configs
from bert_fused.kernels.lookup import get_config, shipped_configs
from bert_fused.tune.candidates import resident_blocks

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def run_python(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)


# ------------------------------------------------------------------------------------------------------ configurations

# ``python -m benchmarks sass`` with something replaced.
SASS = """
import sys
from benchmarks.static import sass
from bert_fused.kernels.configs import Config
{}
sys.exit(sass.main(sys.argv[1:]))
"""
# Leaves out what takes long: offered configurations, other activations than GELU, and most of the disassembling.
SHORT = """
sass.offered_configs = lambda arch: {}
sass.activations_to_check = lambda dtype: ("gelu",)
linear_row = sass.linear_row
def short_row(config, arch, *variant, code):
    return linear_row(config, arch, *variant, code=code and (arch, str(config)) == sass.EPILOGUE_BUDGET_CONFIG)
sass.linear_row = short_row
gated_configs, gated_rows = sass.gated_configs, sass.gated_rows
sass.gated_configs = lambda arch: [config for config in gated_configs(arch) if config.dtype == "bfloat16"]
sass.gated_rows = lambda config, arch: [next(gated_rows(config, arch))]
"""


def within_budget(arch: int, planted: str, folder: Path) -> list[dict[str, Any]]:
    """The rows of an architecture, none of which breaks a budget: spills, shared memory, matrix instructions, ..."""
    report = folder / "report.json"
    done = run_python(SASS.format(planted), "--arch", str(arch), "--json", str(report))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows: list[dict[str, Any]] = json.loads(report.read_text())
    for row in rows:
        assert (row["arch"], row["broken"]) == (arch, []), row
        assert row["registers"] > 0, row
        assert row["ctas_per_sm"] >= 1, row
        assert row["modelled_us"] > row["roofline_us"] > 0, row
        assert row["row_variants"] == 3, row
    for kernel in ("act_fwd", "act_bwd"):
        assert {row["dtype"] for row in rows if row["kernel"] == kernel} == {"float16", "bfloat16", "float32"}
    of_gated = {(row["dtype"], row["config"]) for row in rows if row.get("gated")}
    assert of_gated == named(c for c in gated_configs(arch) if planted != SHORT or c.dtype == "bfloat16")
    return [row for row in rows if row["kernel"] == "linear_act_fwd" and not row.get("gated")]


def named(configs: Iterable[Config]) -> set[tuple[str, str]]:
    return {(config.dtype, str(config)) for config in configs}


def check_shipped(rows: list[dict[str, Any]], arch: int) -> None:
    """Each configuration that lookup can return has its rows; those disassembled hide the wait for the bias."""
    kinds: dict[tuple[str, str], set[tuple[int, bool]]] = {}
    for row in rows:
        kinds.setdefault((row["dtype"], row["config"]), set()).add((row["rows"], row["save_preact"]))
        if not row["save_preact"] and "order" in row:
            assert row["products"] > 0, row
            assert row["epilogue_per_element"] > 0, row
            assert hides_bias(row["order"]), row
    assert kinds.keys() == named(shipped_configs(arch))
    assert {config for of, config in RESIDENT_BLOCKS if of == arch} <= {row["config"] for row in rows}
    assert all(found >= {(17, True), (16, False)} for found in kinds.values())
    of_one_row = {
        get_config(1, *shape, dtype, arch, aligned=True)
        for shape in MODEL_SHAPES
        for dtype in ("float16", "bfloat16", "tf32")
    } | {c for c in shipped_configs(arch) if any(M == 1 for M, _, _ in shapes_served(c, arch))}
    assert {key for key, found in kinds.items() if (1, True) in found} == named(of_one_row)


# One test an architecture: workers share them, and each is compiled once.
@pytest.mark.parametrize("arch", [80, 89, 90])
def test_shipped_configurations_are_within_their_budgets_for_gelu(arch: int, tmp_path: Path) -> None:
    check_shipped(within_budget(arch, SHORT, tmp_path), arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
def test_configurations_shipped_or_offered_are_within_their_budgets(arch: int, tmp_path: Path) -> None:
    """The tuner times the offered ones. Shipped ones are compiled for every activation to check."""
    rows = within_budget(arch, "", tmp_path)
    shipped, offered = ([row for row in rows if bool(row.get("offered")) == kind] for kind in (False, True))
    check_shipped(shipped, arch)
    assert all("order" in row for row in shipped if not row["save_preact"])
    assert {row["activation"] for row in shipped} == {"gelu", "tanh", "gelu_tanh"}
    assert {(row["dtype"], row["config"]) for row in rows} == named((*shipped_configs(arch), *offered_configs(arch)))
    assert any("persistent" in row["config"] for row in offered) == (90 <= arch < 120)


def test_a_broken_budget_fails_the_command() -> None:
    """A tile too large for its registers, planted in the table."""
    planted = """
tile = Config("pointer", "float16", 128, 256, 64, num_warps=4, num_stages=3)
sass.shipped_configs = lambda arch: [tile]
sass.shapes_served = lambda config, arch: [(4096, 3072, 768)]
"""
    done = run_python(SASS.format(SHORT + planted), "--arch", "80")
    assert done.returncode == 1, done.stderr
    assert re.search(
        r"budget broken: linear_act_fwd 80 float16 pointer 128x256x64 .* gelu: [1-9]\d\d+ bytes spilled", done.stderr
    )


def test_an_unknown_architecture_is_refused() -> None:
    done = run_python(SASS.format(""), "--arch", "90,frog")
    assert done.returncode == 2
    assert "expected some of 80, 86, 89, 90, 100, 103, 120, got '90,frog'" in done.stderr


GOOD_ROW = {"kernel": "linear_act_fwd", "arch": 90, "dtype": "bfloat16", "config": "tma 128x128x64 4 warps 3 stages"}
GOOD_ROW |= {"activation": "gelu", "save_preact": False, "spills": 0, "shared_bytes": 98328, "products": 8}
GOOD_ROW |= {"ctas_per_sm": 2, "intended_ctas": 2, "epilogue_per_element": 11.6, "matrix": "wgmma", "row_variants": 3}
GOOD_ROW |= {"right_matrix": "wgmma", "approximate_tanh": False, "serialized": False, "waits": 1, "ptxas": []}
GOOD_ROW |= {"order": "load bias, load tile, multiply, use bias"}
BACKWARD = {"kernel": "act_bwd", "config": "", "epilogue_per_element": None, "matrix": ""}
LATE_TILE = "load bias, use bias, load tile, multiply"
C7515 = "(C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"spills": 4}, "4 bytes spilled"),
        ({"shared_bytes": 232449}, "232449 bytes of shared memory"),
        ({"shared_estimate": 98400}, None),
        ({"shared_estimate": 98327}, "98328 bytes of shared memory, candidates.py estimates 98327"),
        ({"shared_estimate": 99353}, "98328 bytes of shared memory, candidates.py estimates 99353"),
        ({"serialized": True, "waits": 8}, "matrix instructions are serialized: 8 waits for 8 in the loop"),
        ({"serialized": True, "ptxas": [C7515]}, "serialized: 1 waits for 8 in the loop (C7515) Potential Performance"),
        ({"order": "load tile, load bias, multiply, use bias"}, None),
        ({"order": LATE_TILE}, f"a thread waits for the bias: {LATE_TILE}"),
        ({"order": "load tile, multiply, load bias, use bias"}, "a thread waits for the bias"),
        ({"order": "load tile, multiply"}, "a thread waits for the bias: load tile, multiply"),
        ({"ctas_per_sm": 1}, "1 blocks per SM instead of 2"),
        ({"matrix": "mma, wgmma"}, "tiles are multiplied by mma, wgmma instead of wgmma"),
        ({"matrix": ""}, "tiles are multiplied by nothing instead of wgmma"),
        ({"row_variants": 4}, "4 variants over the number of rows instead of 3"),
        ({"approximate_tanh": True}, "tanh.approx"),
        ({"error": "PassManager: failed"}, "does not compile: PassManager: failed"),
        ({"epilogue_per_element": 11.7}, "11.7 instructions per element, budget 11.6"),
        ({"epilogue_per_element": 12.4, "save_preact": True}, None),
        ({"epilogue_per_element": 12.6, "dtype": "float16"}, "12.6 instructions per element, budget 12.5"),
        (BACKWARD | {"derivative_per_element": 16.0}, None),
        (BACKWARD | {"derivative_per_element": 16.1}, "16.1 instructions per element, budget 16.0"),
    ],
    ids=lambda value: "-".join(value) or "good" if isinstance(value, dict) else None,
)
def test_a_broken_budget_is_named(change: dict[str, Any], reason: str | None) -> None:
    broken = broken_budgets(GOOD_ROW | change)
    assert len(broken) == (reason is not None)
    assert all(reason in found for found in broken if reason is not None)


def test_modelled_times_are_those_by_hand() -> None:
    """The times by data sheet of BERT-base at M = 8192 on an H100, and of a pass over memory."""
    tile = Config("tma", "bfloat16", 128, 128, 64, num_warps=4, num_stages=3)
    times = linear_times(tile, (8192, 3072, 768), 90)
    assert times["shape"] == "8192x3072x768"
    assert times["roofline_us"] == round(2 * 8192 * 3072 * 768 / (132 * 4096 * 1.755e3), 1)
    assert times["roofline_us"] < times["modelled_us"] < 2 * times["roofline_us"]
    half_rate = linear_times(Config("pointer", "tf32", 128, 128, 32, 8, 3), (8192, 3072, 768), 90)
    assert half_rate["roofline_us"] == pytest.approx(2 * times["roofline_us"], abs=0.1)
    few_rows = linear_times(tile, (1, 3072, 768), 90)
    assert few_rows["roofline_us"] == round(2 * (768 + 3072 * 768 + 3072) / (132 * 14.4 * 1.755e3), 1)
    one_pass = pass_times(2, "float32", 90)
    assert one_pass["roofline_us"] == round(2 * 4 * 8192 * 3072 / (132 * 14.4 * 1.755e3), 1)
    assert one_pass["modelled_us"] > one_pass["roofline_us"]


def test_intended_blocks_are_the_models_and_at_most_those_of_the_grid() -> None:
    tile = Config("pointer", "bfloat16", 64, 64, 64, num_warps=4, num_stages=4)
    assert intended_blocks(tile, 90, [(8192, 3072, 768)]) == resident_blocks(tile, 90) == 3
    assert intended_blocks(tile, 90, [(8, 3072, 768), (256, 3072, 768)]) == 2, "192 blocks for 132 SMs"
    assert intended_blocks(tile, 90, [(8, 3072, 768)]) == 1
    pinned = Config("tma", "bfloat16", 128, 128, 64, num_warps=4, num_stages=3)
    assert intended_blocks(pinned, 90, [(8, 3072, 768)]) == 2


# --------------------------------------------------------------------------------------------- what is in the code

_TILE = "64, 64, 64, 4, 3"
_GELU = "compile_linear(Config({}), 90, activation='gelu')"
KERNELS = {
    "fp16 gelu": f"compile_linear(Config('pointer', 'float16', {_TILE}), 90, activation='gelu')",
    "bf16 gelu": f"compile_linear(Config('pointer', 'bfloat16', {_TILE}), 90, activation='gelu')",
    "fp16 tanh gelu": f"compile_linear(Config('pointer', 'float16', {_TILE}), 90, activation='gelu_tanh')",
    "bf16 tanh": f"compile_linear(Config('pointer', 'bfloat16', {_TILE}), 90, activation='tanh')",
    "relu pass": "compile_pass('float16', 90, activation='relu')",
    "wide tma": _GELU.format("'tma', 'bfloat16', 128, 256, 64, 8, 3"),
    "forward": "compile_linear(Config('pointer', 'bfloat16', 64, 32, 64, 4, 3), 80, activation='gelu')",
    "pass": "compile_pass('bfloat16', 80, activation='gelu')",
    "backward": "compile_grad('bfloat16', 80, activation='gelu')",
}
DISASSEMBLED = {
    "tma": _GELU.format("'tma', 'bfloat16', 128, 128, 64, 4, 3"),
    "persistent": _GELU.format("'tma', 'bfloat16', 128, 128, 64, 4, 3, persistent=2, subtiles=2"),
    "pointer": _GELU.format("'pointer', 'bfloat16', 64, 128, 64, 4, 4"),
}


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, str]]:
    """The kernels' code by stage, and the order of loads of those disassembled."""
    expressions = ", ".join(f"{name!r}: {call}" for name, call in (KERNELS | DISASSEMBLED).items())
    done = run_python(f"""
import json
from bert_fused.kernels.configs import Config
from benchmarks.static.compile import compile_grad, compile_linear, compile_pass
from benchmarks.static.machine_code import inspect
rows = {{}}
for name, kernel in {{{expressions}}}.items():
    rows[name] = {{stage: kernel.asm[stage] for stage in ("ttir", "ptx")}}
    if name in {[*DISASSEMBLED]}:
        rows[name]["order"] = inspect(kernel, kernel.metadata.target.arch)["order"]
print(json.dumps(rows))
""")
    assert done.returncode == 0, done.stderr[-2000:]
    rows: dict[str, dict[str, str]] = json.loads(done.stdout)
    return rows


def test_compiled_16_bit_activations_use_no_approximate_tanh_and_keep_nan(compiled: dict[str, dict[str, str]]) -> None:
    """No hardware tanh, which is good to 11 bits only, and maxima that keep a NaN."""
    for name in ("fp16 gelu", "bf16 gelu", "fp16 tanh gelu", "bf16 tanh"):
        assert "ex2.approx" in compiled[name]["ptx"]
        assert "tanh.approx" not in compiled[name]["ptx"]
    # The interpreter's minimum and maximum always keep a NaN, so only machine code shows whether the GPU's do.
    for name in ("fp16 gelu", "bf16 gelu", "relu pass"):
        assert "max.NaN.f32" in compiled[name]["ptx"]
        assert not re.search(r"max\.f32", compiled[name]["ptx"])
    for name in ("fp16 gelu", "bf16 gelu", "bf16 tanh"):
        assert "min.NaN.f32" in compiled[name]["ptx"]
        assert not re.search(r"min\.f32", compiled[name]["ptx"])


@pytest.mark.parametrize("name", DISASSEMBLED)
def test_the_first_tile_is_loaded_before_the_bias_is_waited_for(compiled: dict[str, dict[str, str]], name: str) -> None:
    """Else every tile would begin with one latency of memory. On both ways to memory, and in the loop over tiles."""
    assert hides_bias(compiled[name]["order"]), compiled[name]["order"]


def test_the_loop_over_k_is_assumed_to_run(compiled: dict[str, dict[str, str]]) -> None:
    """Triton 3.6 serializes wgmma where the loop may run no step; 3.7 shows that in its own code alone."""
    before_the_loop = compiled["wide tma"]["ttir"].partition("scf.for")[0]
    assert re.search(r"cmpi sgt, %K, %c0_i32|cmpi sgt, %K\w*, %\w+", before_the_loop)
    assert "llvm.intr.assume" in before_the_loop


def test_row_offsets_have_64_bits(compiled: dict[str, dict[str, str]]) -> None:
    """Tensors pass 2^31 elements: only offsets inside a tile, guarded by MAX_N, may be 32-bit."""
    forward, one_pass, backward = (
        re.findall(r"arith\.muli .* : (\S+)", compiled[name]["ttir"]) for name in ("forward", "pass", "backward")
    )
    assert forward.count("tensor<64x1xi64>") == 1, "row of x times its stride"
    assert forward.count("tensor<1x32xi64>") == 1, "row of W times its stride"
    assert forward.count("i64") == 1, "first row of the output tile times N"
    assert [t for t in forward if t.endswith("xi32>")] == ["tensor<64x1xi32>"], "row inside the output tile times N"
    assert one_pass == ["i64"]
    assert backward.count("tensor<16x1xi64>") == 2, "rows of d_out and of the contiguous tensors"
    assert not [t for t in backward if t.endswith("xi32>")]
