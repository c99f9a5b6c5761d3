"""Nothing is read or written outside the tensors given, and every output element is written exactly once."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from interpreter import Sanitizer
from reference64 import (
    DTYPES,
    LAYOUTS,
    assert_forward,
    dtype_name,
    make_inputs,
    shape_name,
    strided_vector,
    with_layout,
)

from bert_fused.kernels.configs import Config
from bert_fused.kernels.elementwise import BLOCK_N, act_bwd, rows_per_program
from bert_fused.kernels.linear_act import linear_act_fwd
from bert_fused.kernels.runtime import INTERPRETER_SMS

pytestmark = pytest.mark.usefixtures("poisoned_empty")

ROOT = Path(__file__).parents[2]

all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)


def tiles(kernel: str, dtype: torch.dtype) -> Config:
    return Config(kernel, dtype_name(dtype), 16, 32, 32, num_warps=1, num_stages=1, group_m=2)


# ---------------------------------------------------------------------------------------------------------- the kernels


@pytest.mark.parametrize("save_preact", [False, True], ids=["out", "out+preact"])
@all_dtypes
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 37, 32), (19, 70, 45), (33, 65, 64), (34, 64, 7)], ids=shape_name)
def test_pointer_kernel(
    sanitized: Sanitizer, shape: tuple[int, int, int], dtype: torch.dtype, save_preact: bool
) -> None:
    i = make_inputs("unit", *shape, dtype)
    out, _ = linear_act_fwd(
        i.x, i.weight, i.bias, activation="gelu", save_preact=save_preact, config=tiles("pointer", dtype)
    )
    assert_forward(out, i.x, i.weight, i.bias, "gelu")
    (launch,) = sanitized.launches
    assert launch.kernel == "linear_act_fwd_kernel"
    assert launch.stored == dict.fromkeys(["out_ptr", "preact_ptr"][: 1 + save_preact], out.numel())


@pytest.mark.parametrize("shape", [(1, 8, 8), (19, 72, 40), (33, 64, 64)], ids=shape_name)
@all_dtypes
def test_tma_kernel(sanitized: Sanitizer, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    i = make_inputs("unit", *shape, dtype)
    out, _ = linear_act_fwd(i.x, i.weight, i.bias, activation="gelu", save_preact=True, config=tiles("tma", dtype))
    assert_forward(out, i.x, i.weight, i.bias, "gelu")
    (launch,) = sanitized.launches
    assert launch.stored == dict.fromkeys(("out_ptr", "preact_ptr"), out.numel())


@pytest.mark.parametrize("save_preact", [False, True], ids=["in_place", "out+preact"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (19, 70, 45), (32, 32, 8)], ids=shape_name)
@all_dtypes
def test_library_pass(sanitized: Sanitizer, dtype: torch.dtype, shape: tuple[int, int, int], save_preact: bool) -> None:
    i = make_inputs("unit", *shape, dtype)
    config = Config("library", dtype_name(dtype))
    out, _ = linear_act_fwd(i.x, i.weight, i.bias, activation="gelu", save_preact=save_preact, config=config)
    (launch,) = sanitized.launches
    assert launch.kernel == "act_fwd_kernel"
    stored = ["out_ptr"] if save_preact else ["preact_ptr", "out_ptr"]
    assert launch.stored == dict.fromkeys(stored, out.numel())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("argument", ["x", "weight"])
def test_layouts(sanitized: Sanitizer, argument: str, layout: str) -> None:
    i = make_inputs("unit", 19, 37, 45, torch.float16)
    args = {"x": i.x, "weight": i.weight}
    args[argument] = with_layout(args[argument], layout)
    assert i.bias is not None
    out, _ = linear_act_fwd(**args, bias=strided_vector(i.bias), activation="tanh", save_preact=False)
    assert_forward(out, args["x"], args["weight"], i.bias, "tanh")
    assert [launch.stored for launch in sanitized.launches] == [{"out_ptr": out.numel()}]


@pytest.mark.parametrize("layout", ["contiguous", "column_slice", "transposed", "expanded"])
@pytest.mark.parametrize(
    "shape",
    [(1, 1), (127, 33), (257, BLOCK_N + 1), (256, BLOCK_N)],
    ids=shape_name,
)
@all_dtypes
def test_backward_kernel(sanitized: Sanitizer, dtype: torch.dtype, shape: tuple[int, int], layout: str) -> None:
    M, N = shape
    d_out, saved = (torch.randn(shape, generator=torch.Generator().manual_seed(s)).to(dtype) for s in (0, 1))
    act_bwd(with_layout(d_out, layout), saved, activation="silu", bias_grad=True)
    act_bwd(with_layout(d_out, layout), saved, activation="silu", bias_grad=False)
    with_bias, without = sanitized.launches
    sums = triton.cdiv(M, rows_per_program(M, N, INTERPRETER_SMS))
    assert with_bias.stored == {"d_preact_ptr": M * N, "partial_ptr": sums * N}
    assert without.stored == {"d_preact_ptr": M * N}


INT64_SCRIPT = """
import dataclasses
import torch
from triton.runtime import interpreter

interpreter.interpreter_builder.options = dataclasses.replace(interpreter.interpreter_builder.options, debug=True)
# Its copy of the arguments back to the device would touch all of the memory.
interpreter.GridExecutor._restore_args_dev = lambda *args: None

from bert_fused.kernels.elementwise import act_bwd
from bert_fused.kernels.configs import Config
from bert_fused.kernels.linear_act import linear_act_fwd

STRIDE = 2**30
memory = torch.empty(3 * STRIDE + 64, dtype=torch.float16)  # only the pages that are touched become real


def far(small, by_columns):
    strides = (1, STRIDE) if by_columns else (STRIDE, 1)
    return memory.as_strided(small.shape, strides).copy_(small)


def check(x, weight, far_args):
    args = {"x": x, "weight": weight} | far_args
    for block_k in (2, 4):  # the step between tiles overflows, or the offsets inside one
        config = Config("pointer", "float16", 16, 16, block_k, num_warps=1, num_stages=1)
        near = linear_act_fwd(x, weight, None, activation="none", save_preact=False, config=config)[0]
        out = linear_act_fwd(**args, bias=None, activation="none", save_preact=False, config=config)[0]
        assert torch.equal(out, near), (list(far_args), block_k)


rows, columns = torch.arange(64.0).view(4, 16).half(), torch.arange(64.0).view(16, 4).half()
many = torch.ones(5, 16).half()
check(rows, many, {"x": far(rows, by_columns=False)})
check(many, rows, {"weight": far(rows, by_columns=False)})
few = torch.ones(5, 4).half()
check(columns, few, {"x": far(columns, by_columns=True)})
check(few, columns, {"weight": far(columns, by_columns=True)})
for small, by_columns in ((rows, False), (columns, True)):
    saved = torch.ones_like(small)
    d_preact, _ = act_bwd(far(small, by_columns), saved, activation="relu", bias_grad=True)
    assert torch.equal(d_preact, small)
print("passed")
"""


def test_offsets_past_32_bits() -> None:
    """Strides of 2^30 elements, in a process of its own: a wrapped offset is a segmentation fault."""
    result = subprocess.run([sys.executable, "-c", INT64_SCRIPT], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.stdout.strip() == "passed", f"exit status {result.returncode}: {result.stderr[-2000:]}"
