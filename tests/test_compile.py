"""What the compiler makes of the kernels, without a GPU: resources, instructions and the width of offsets.

Kernels in this process are interpreted, so compiling is left to others, without ``TRITON_INTERPRET``.
"""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bert_fused.kernels.configs import SHARED_MEMORY, shipped_configs

ROOT = Path(__file__).parent.parent

# Blocks an SM holds at a time, where the speed of a configuration rests on it.
RESIDENT_BLOCKS = {(90, "tma 128x128x64 4 warps 3 stages"): 2}


def run_compiler(*arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout


def compile_kernels(*calls: str) -> list[dict[str, Any]]:
    """``asm`` and ``inspect`` of expressions over benchmarks.sass, in a process of their own."""
    script = f"""
import json
from bert_fused.kernels.configs import Config
from benchmarks.sass import compile_grad, compile_linear, compile_pass, inspect
rows = []
for compiled in ({", ".join(calls)},):
    asm = {{stage: compiled.asm[stage] for stage in ("ttir", "ptx")}}
    arch, warps = compiled.metadata.target.arch, compiled.metadata.num_warps
    rows.append(asm | inspect(compiled, arch, warps, 1))
print(json.dumps(rows))
"""
    rows: list[dict[str, Any]] = json.loads(run_compiler("-c", script))
    return rows


# One test an architecture: workers share them, and each is compiled once.
@pytest.mark.parametrize("arch", [80, 89, 90, 100])
def test_shipped_configurations(arch: int, tmp_path: Path) -> None:
    """None spills, all fit, and the product is done by matrix instructions."""
    report = tmp_path / "report.json"
    run_compiler("-m", "benchmarks", "sass", "--arch", str(arch), "--json", str(report))
    rows = json.loads(report.read_text())

    linear = [row for row in rows if row["kernel"] == "linear_act_fwd"]
    assert {(row["dtype"], row["config"]) for row in linear} == {(c.dtype, str(c)) for c in shipped_configs(arch)}
    for kernel in ("act_fwd", "act_bwd"):
        assert {row["dtype"] for row in rows if row["kernel"] == kernel} == {"float16", "bfloat16", "float32"}

    for row in rows:
        assert row["arch"] == arch, row
        assert row["registers"] > 0, row
        assert row["spills"] == 0, row
        assert row["shared_bytes"] <= SHARED_MEMORY[arch], row
        assert row["ctas_per_sm"] >= 1, row
    for row in linear:
        assert row["mma_instructions"] > 0, row
        assert row["ctas_per_sm"] >= RESIDENT_BLOCKS.get((arch, row["config"]), 1), row
    shipped = {(arch, row["config"]) for row in linear}
    assert all(key in shipped for key in RESIDENT_BLOCKS if key[0] == arch)


def test_a_tile_too_large_is_seen_to_spill() -> None:
    """Else "no spills" above would prove nothing."""
    (row,) = compile_kernels(
        "compile_linear(Config('pointer', 'float16', 128, 256, 64, 4, 3), 80, activation='tanh')",
    )
    assert row["spills"] > 100


def test_sixteen_bit_activations_are_exact_ones() -> None:
    """No hardware tanh, which is good to 11 bits only, and maxima that keep a NaN."""
    tile = "64, 64, 64, 4, 3"
    kernels = compile_kernels(
        f"compile_linear(Config('pointer', 'float16', {tile}), 90, activation='gelu')",
        f"compile_linear(Config('pointer', 'bfloat16', {tile}), 90, activation='gelu')",
        f"compile_linear(Config('pointer', 'float16', {tile}), 90, activation='gelu_tanh')",
        f"compile_linear(Config('pointer', 'bfloat16', {tile}), 90, activation='tanh')",
        "compile_pass('float16', 90, activation='relu')",
    )
    gelus, tanhs, relu = kernels[:2], kernels[2:4], kernels[4]
    for row in gelus + tanhs:
        assert "ex2.approx" in row["ptx"]
        assert "tanh.approx" not in row["ptx"]
    # The interpreter's minimum and maximum keep a NaN whatever they are told: only here would it show.
    for row in [*gelus, relu]:
        assert "max.NaN.f32" in row["ptx"]
        assert not re.search(r"max\.f32", row["ptx"])
    for row in [*gelus, kernels[3]]:
        assert "min.NaN.f32" in row["ptx"]
        assert not re.search(r"min\.f32", row["ptx"])


CANDIDATES_SCRIPT = """
import json
import sys
from benchmarks.sass import compile_linear, inspect
from bert_fused.kernels.candidates import candidates, shared_bytes
arch = int(sys.argv[1])
shapes = [(M, N, K) for N, K in ((3072, 768), (4096, 1024), (768, 768)) for M in (1, 64, 256, 1024, 8192)]
offered = dict.fromkeys(c for shape in shapes for c in candidates(*shape, "bfloat16", arch) if c.kernel != "library")
rows = []
for config in offered:
    compiled = compile_linear(config, arch, activation="gelu")
    tile = config.block_m * config.block_n
    stats = inspect(compiled, arch, compiled.metadata.num_warps, tile, config.block_m)
    row = {"config": str(config), "persistent": config.persistent, "estimate": shared_bytes(config, arch)}
    rows.append(row | stats)
print(json.dumps(rows))
"""


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_candidates_compile_without_spills(arch: int) -> None:
    """Whatever the tuner is offered, split, persistent and warp-specialized kernels included."""
    rows = json.loads(run_compiler("-c", CANDIDATES_SCRIPT, str(arch)).splitlines()[-1])
    assert len(rows) > 20
    assert any("K in 2" in row["config"] for row in rows)
    assert any(row["persistent"] for row in rows) == (arch >= 90)
    for row in rows:
        assert row["spills"] == 0, row
        assert row["mma_instructions"] > 0, row
        assert row["estimate"] - 1024 <= row["shared_bytes"] <= row["estimate"], row
        assert row["ctas_per_sm"] >= max(row["persistent"], 1), row


@pytest.mark.parametrize("arch", [80, 90])
def test_partial_sums_are_published_before_they_are_counted(arch: int) -> None:
    """The order that the kernel's memory argument rests on: store, barrier, counting at GPU scope, barrier, load."""
    call = f"compile_linear(Config('pointer', 'bfloat16', 16, 32, 128, 4, 4, split_k=2), {arch}, activation='gelu')"
    (kernel,) = compile_kernels(call)
    order = r"st\.global\.cg|ld\.global\.cg|bar\.sync|atom\.global\.gpu\.acq_rel\.add"
    found = [step for step, _ in itertools.groupby(re.findall(order, kernel["ptx"]))]
    counted = found.index("atom.global.gpu.acq_rel.add")
    assert found[counted - 2 : counted + 2] == [
        "st.global.cg",
        "bar.sync",
        "atom.global.gpu.acq_rel.add",
        "bar.sync",
    ]
    assert found.count("atom.global.gpu.acq_rel.add") == 1
    assert "st.global.cg" not in found[counted:]
    assert found.count("st.global.cg") == found.count("ld.global.cg") == 1
    assert "ld.global.cg" in found[counted:]


def multiplications(ttir: str) -> list[str]:
    """The result types of all integer multiplications."""
    return re.findall(r"arith\.muli .* : (\S+)", ttir)


def test_row_offsets_have_64_bits() -> None:
    """Tensors pass 2^31 elements: only offsets inside a tile, guarded by MAX_N, may be 32-bit."""
    forward, one_pass, backward = compile_kernels(
        "compile_linear(Config('pointer', 'bfloat16', 64, 32, 64, 4, 3), 80, activation='gelu')",
        "compile_pass('bfloat16', 80, activation='gelu')",
        "compile_grad('bfloat16', 80, activation='gelu')",
    )
    types = multiplications(forward["ttir"])
    assert types.count("tensor<64x1xi64>") == 1, "row of x times its stride"
    assert types.count("tensor<1x32xi64>") == 1, "row of W times its stride"
    assert types.count("i64") == 1, "first row of the output tile times N"
    assert [t for t in types if t.endswith("xi32>")] == ["tensor<64x1xi32>"], "row inside the output tile times N"

    assert multiplications(one_pass["ttir"]) == ["i64"]

    types = multiplications(backward["ttir"])
    assert types.count("tensor<16x1xi64>") == 2, "rows of d_out and of the contiguous tensors"
    assert not [t for t in types if t.endswith("xi32>")]
