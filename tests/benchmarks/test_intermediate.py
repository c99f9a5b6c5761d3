"""What is read from Triton's intermediate code: matrix instructions, and products narrower than an offset."""

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.intermediate import matrix_instructions, right_instruction

ROOT = Path(__file__).parents[2]


def test_matrix_instructions_are_told_apart() -> None:
    ptx = """
    wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%r1}, %rd1, %rd2, p, 1, 1, 0, 0;
    wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%r1}, %rd1, %rd2, p, 1, 1, 0, 0;
    mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%r1}, {%r2}, {%r3}, {%r4};
    mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%r1}, {%r2}, {%r3}, {%r4};
    @p tcgen05.mma.cta_group::1.kind::f16 [%r1], %rd1, %rd2, %r2, p;
    """
    assert matrix_instructions(ptx) == sorted(
        ["mma.f16.f16.f16.f16", "mma.f32.f16.f16.f32", "tcgen05.mma.kind::f16", "wgmma.mma_async.f32.bf16.bf16"]
    )
    assert right_instruction(90, "bfloat16", 64) == "wgmma.mma_async.f32.bf16.bf16"
    assert right_instruction(90, "float16", 32) == right_instruction(80, "float16", 128) == "mma.f32.f16.f16.f32"
    assert right_instruction(100, "tf32", 128) == "tcgen05.mma.kind::tf32"
    assert right_instruction(120, "tf32", 128) == "mma.f32.tf32.tf32.f32"


PLANTED_OFFSETS = """
import triton
import triton.language as tl


@triton.jit
def kernel(x_ptr, out_ptr, N, stride_xm, KIND: tl.constexpr):
    first = tl.program_id(0) * 16
    inside = tl.arange(0, 16)[:, None]
    rows = first + inside
    cols = tl.arange(0, 16)[None, :]
    wide_rows = rows.to(tl.int64) * stride_xm
    base = first.to(tl.int64) * N
    if KIND == "stride":
        wide_rows = rows * stride_xm
    elif KIND == "inside stride":
        wide_rows = inside * stride_xm
    elif KIND == "size":
        base = first * N
    elif KIND == "row":
        wide_rows = rows * 4096
    tl.store(out_ptr + base + inside * N + cols, tl.load(x_ptr + wide_rows + cols))
"""

PLANTED_SCRIPT = """
import json
import planted
from benchmarks import ahead_of_time
from benchmarks.intermediate import narrow_offsets, wide_products
found = {}
for kind in ("good", "stride", "inside stride", "size", "row"):
    ttir = ahead_of_time.compile_kernel(planted.kernel, "float16", 80, {"KIND": kind}, {}).asm["ttir"]
    found[kind] = [narrow_offsets(ttir), wide_products(ttir)]
print(json.dumps(found))
"""


def test_narrow_offsets_are_found_and_rows_inside_a_tile_let_pass(tmp_path: Path) -> None:
    """Kernels here are interpreted, so compiling is left to a process without ``TRITON_INTERPRET``."""
    (tmp_path / "planted.py").write_text(PLANTED_OFFSETS)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(tmp_path)
    command = [sys.executable, "-c", PLANTED_SCRIPT]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "good": [[], 2],
        "stride": [["arith.addi times stride_xm"], 1],
        "inside stride": [["stride_xm times tt.make_range"], 1],
        "size": [["N times arith.muli"], 1],
        "row": [["arith.addi times arith.constant"], 1],
    }
