"""The interpreter itself: the repair of its bf16, and its lock (tests/support/interpreter.py)."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from interpreter import bf16_to_fp32, fp32_to_bf16
from reference64 import linear64, make_inputs

from bert_fused.kernels.linear_act import linear_act_fwd

BLOCK = 64


@triton.jit
def cast_kernel(src_ptr, dst_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(dst_ptr + offs, tl.load(src_ptr + offs).to(dst_ptr.dtype.element_ty))


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    product = tl.dot(tl.load(a_ptr + offs), tl.load(b_ptr + offs), tl.zeros((BLOCK, BLOCK), dtype=tl.float32))
    tl.store(out_ptr + offs, product)


@triton.jit
def raw_kernel(src_ptr, dst_ptr, OP: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    value = tl.load(src_ptr + offs)
    if OP == "add":
        value = value + value
    elif OP == "compare":
        value = tl.where(value > value, value, value)
    elif OP == "abs":
        value = tl.abs(value)
    elif OP == "reduce":
        value = value + tl.reduce(value, 0, tl.standard._elementwise_max)
    elif OP == "select":
        value = tl.where(offs < BLOCK // 2, value, value)
    tl.store(dst_ptr + offs, value)


def fp32_samples() -> torch.Tensor:
    """Values around every kind of rounding: ties to both sides, carries into the exponent, denormals, inf and NaN."""
    bits = torch.randint(-(2**31), 2**31 - 1, (4096,), generator=torch.Generator().manual_seed(0))
    ties = torch.tensor(
        [0x3F808000, 0x3F818000, 0x3F80FFFF, 0x3F807FFF, 0x7F7FFFFF, 0x7F7F8000, 0x00008000, 0x7F800001]
    )
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-40, -1e-40])
    return torch.cat([torch.cat([bits, ties]).to(torch.int32).view(torch.float32), special])


def test_casts_match_torchs() -> None:
    values = fp32_samples()
    expected = values.bfloat16()
    ours = torch.from_numpy(fp32_to_bf16(values.numpy()).view(np.int16)).view(torch.bfloat16)
    assert torch.equal(ours.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(ours[number].view(torch.int16), expected[number].view(torch.int16))

    every = torch.arange(-(2**15), 2**15).to(torch.int16)
    back = torch.from_numpy(bf16_to_fp32(every.numpy().view(np.uint16)))
    torch.testing.assert_close(back, every.view(torch.bfloat16).float(), rtol=0, atol=0, equal_nan=True)


def test_kernels_use_the_repaired_casts() -> None:
    values = fp32_samples()[-2 * BLOCK : -BLOCK]
    rounded, back = torch.zeros(BLOCK, dtype=torch.bfloat16), torch.zeros(BLOCK)
    cast_kernel[(1,)](values, rounded, BLOCK)
    cast_kernel[(1,)](rounded, back, BLOCK)
    torch.testing.assert_close(rounded, values.bfloat16(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(back, values.bfloat16().float(), rtol=0, atol=0, equal_nan=True)


def test_dot_multiplies_values_not_bits() -> None:
    a, b = (torch.randint(-3, 4, (16, 16), generator=torch.Generator().manual_seed(s)).bfloat16() for s in (0, 1))
    out = torch.zeros(16, 16)
    dot_kernel[(1,)](a, b, out, 16)
    assert torch.equal(out, a.float() @ b.float())


@pytest.mark.parametrize("operation", ["add", "compare", "abs", "reduce"])
def test_raw_bf16_arithmetic_raises(operation: str) -> None:
    src, dst = torch.ones(BLOCK, dtype=torch.bfloat16), torch.zeros(BLOCK, dtype=torch.bfloat16)
    with pytest.raises(Exception, match="raw bf16"):
        raw_kernel[(1,)](src, dst, operation, BLOCK)


@pytest.mark.parametrize("operation", ["copy", "select"])
def test_copying_and_selecting_raw_bf16_is_allowed(operation: str) -> None:
    src, dst = torch.randn(BLOCK).bfloat16(), torch.zeros(BLOCK, dtype=torch.bfloat16)
    raw_kernel[(1,)](src, dst, operation, BLOCK)
    assert torch.equal(src, dst)


def test_threads_get_exact_results_from_the_interpreter() -> None:
    i = make_inputs("integers", 19, 70, 45, torch.float16)
    ref = linear64(i.x, i.weight, i.bias)

    def run(_: int) -> torch.Tensor:
        return linear_act_fwd(i.x, i.weight, i.bias, activation="none", save_preact=False)[0]

    with ThreadPoolExecutor(4) as pool:
        for out in pool.map(run, range(12)):
            assert torch.equal(out.double(), ref)
