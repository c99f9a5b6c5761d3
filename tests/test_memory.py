"""Nothing is read or written outside the tensors given, and every output element is written exactly once."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from checks import DTYPES, LAYOUTS, assert_forward, dtype_name, make_inputs, shape_name, strided_vector, with_layout
from interpreter import Sanitizer, SanitizerError
from interpreter import sanitized as sanitize

from bert_fused.kernels.act_grad import BLOCK_N, act_bwd, rows_per_program
from bert_fused.kernels.configs import Config
from bert_fused.kernels.linear_act import linear_act_fwd
from bert_fused.kernels.runtime import INTERPRETER_SMS

pytestmark = pytest.mark.usefixtures("poisoned_empty")

ROOT = Path(__file__).parent.parent

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

from bert_fused.kernels.act_grad import act_bwd
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


# -------------------------------------------------------------------------------------------------------- the sanitizer


@triton.jit
def planted_kernel(src_ptr, dst_ptr, first, reads, writes, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    value = tl.load(src_ptr + first + offs, mask=offs < reads, other=0.0)
    tl.store(dst_ptr + offs, value, mask=offs < writes)


@triton.jit
def unmasked_kernel(src_ptr, dst_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(dst_ptr + offs, tl.load(src_ptr + offs))


@triton.jit
def atomic_kernel(dst_ptr, BLOCK: tl.constexpr):
    tl.atomic_add(dst_ptr + tl.arange(0, BLOCK), 1)


@pytest.mark.parametrize(
    ("first", "reads", "writes", "programs", "message"),
    [
        (0, 5, 4, 1, "reads 1 elements of 4 bytes outside .* src_ptr"),
        (-1, 4, 4, 1, "reads 1 elements of 4 bytes outside .* src_ptr -4 bytes"),
        (0, 4, 5, 1, "writes 1 elements of 4 bytes outside .* dst_ptr"),
        (0, 4, 3, 1, "of 4 elements of dst_ptr, 1 were never written and 0 more than once"),
        (0, 4, 4, 2, "of 4 elements of dst_ptr, 0 were never written and 4 more than once"),
    ],
    ids=["read past the end", "read before the start", "write past the end", "unwritten", "written twice"],
)
@pytest.mark.parametrize("view", ["rows", "middle of a row"])
def test_planted_faults_are_reported(
    view: str, first: int, reads: int, writes: int, programs: int, message: str
) -> None:
    """Also where the stray element lies inside the memory of the same tensor's base."""
    pad = 0 if view == "rows" else 3
    src, dst = (torch.zeros(4 + 2 * pad)[pad : 4 + pad] for _ in range(2))
    with sanitize(), pytest.raises(SanitizerError, match=message):
        planted_kernel[(programs,)](src, dst, first, reads, writes, 8)


def test_row_padding_is_outside() -> None:
    src, dst = torch.zeros(2, 6)[:, :4], torch.zeros(8)
    with sanitize(), pytest.raises(SanitizerError, match="reads 2 elements"):
        unmasked_kernel[(1,)](src, dst, 8)


def test_atomics_are_refused_on_floats_and_watched_on_counters() -> None:
    with sanitize(), pytest.raises(SanitizerError, match="atomics"):
        atomic_kernel[(1,)](torch.zeros(8), 8)
    with sanitize(), pytest.raises(SanitizerError, match="counts 1 elements of 4 bytes outside"):
        atomic_kernel[(1,)](torch.zeros(7, dtype=torch.int32), 8)
    counters = torch.zeros(8, dtype=torch.int32)
    with sanitize():
        atomic_kernel[(2,)](counters, 8)
    assert torch.equal(counters, torch.full((8,), 2, dtype=torch.int32))


def test_clean_launches_pass_and_the_watch_ends() -> None:
    src, dst = torch.ones(4), torch.zeros(4)
    with sanitize() as record:
        planted_kernel[(1,)](src, dst, 0, 4, 4, 8)
        planted_kernel[(1,)](src, dst, 0, 4, 4, 8)
    assert [launch.stored for launch in record.launches] == [{"dst_ptr": 4}] * 2
    assert torch.equal(src, dst)
    planted_kernel[(1,)](src, dst, 0, 4, 3, 8)
    assert len(record.launches) == 2
