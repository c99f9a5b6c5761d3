"""The backward kernel against the fp64 derivative at the saved values, and the gradients of the whole operator."""

from collections.abc import Callable

import pytest
import torch
from interpreter import Sanitizer
from reference64 import (
    ACTIVATIONS,
    DTYPES,
    LAYOUTS,
    act64,
    act_grad64,
    assert_bias_grad,
    assert_grad,
    assert_within,
    dtype_name,
    generator,
    grad_bound,
    linear64,
    make_inputs,
    saved_grad64,
    shape_name,
    with_layout,
)

from bert_fused import ops
from bert_fused.kernels.elementwise import BLOCK_M, BLOCK_N, MAX_ROWS_PER_PROGRAM, act_bwd, rows_per_program
from bert_fused.kernels.runtime import INTERPRETER_SMS
from bert_fused.reference import linear_act as eager

pytestmark = pytest.mark.usefixtures("poisoned_empty")

all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
DIFFERENTIABLE = [activation for activation in ACTIVATIONS if activation != "none"]

# Rows and columns on both sides of a program's share, which is of one step, two and four.
SHAPES = [(1, 1), (1, BLOCK_N + 1), (127, 33), (256, BLOCK_N), (257, 37), (273, BLOCK_N + 9)]


def test_the_tested_shapes_have_programs_of_one_and_several_steps() -> None:
    shares = [rows_per_program(M, N, INTERPRETER_SMS) for M, N in SHAPES]
    assert sorted({share // BLOCK_M for share in shares}) == [1, 2, 4]
    assert any(M % share == 0 for (M, _), share in zip(SHAPES, shares, strict=True) if share > BLOCK_M)
    assert any(M % share for (M, _), share in zip(SHAPES, shares, strict=True) if share > BLOCK_M)


@pytest.mark.parametrize("N", [1536, 3072, 4096])
@pytest.mark.parametrize("M", [1, 512, 2048, 32768, 2**20])
def test_rows_per_program_fill_the_chip(M: int, N: int) -> None:
    """Enough blocks for an H100's 132 SMs if there are enough rows, and no more rows of sums than these need."""
    rows = rows_per_program(M, N, 132)
    assert rows % BLOCK_M == 0
    assert BLOCK_M <= rows <= MAX_ROWS_PER_PROGRAM
    blocks = -(-M // rows) * -(-N // BLOCK_N)
    assert blocks >= 4 * 132 or rows == BLOCK_M
    assert blocks <= 8 * 132 + N or rows == MAX_ROWS_PER_PROGRAM


def make_saved(activation: str, M: int, N: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A random d_out and what the forward saves of a random pre-activation."""
    g = generator(seed)
    d_out, z = (torch.randn(M, N, generator=g).to(dtype) for _ in range(2))
    return d_out, act64(2 * z, activation).to(dtype) if activation in ("relu", "tanh") else 2 * z


def stored(shape: tuple[int, int]) -> dict[str, int]:
    """How many elements of each output a launch with the gradient of the bias stores, each once."""
    M, N = shape
    return {"d_preact_ptr": M * N, "partial_ptr": -(-M // rows_per_program(M, N, INTERPRETER_SMS)) * N}


@pytest.mark.parametrize("activation", DIFFERENTIABLE)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_name)
@all_dtypes
def test_every_element_is_within_the_bound(
    sanitized: Sanitizer, dtype: torch.dtype, shape: tuple[int, int], activation: str
) -> None:
    d_out, saved = make_saved(activation, *shape, dtype)
    d_preact, d_bias = act_bwd(d_out, saved, activation=activation, bias_grad=True)
    assert [launch.stored for launch in sanitized.launches] == [stored(shape)]
    ref = d_out.double() * saved_grad64(saved, activation)
    assert (d_preact.dtype, d_preact.is_contiguous()) == (dtype, True)
    assert_within(d_preact, ref, grad_bound(ref, d_out, activation), "d_preact")
    assert d_bias is not None
    assert_bias_grad(d_bias, d_out, saved, activation)


@pytest.mark.parametrize("shape", SHAPES, ids=shape_name)
@all_dtypes
def test_integers_are_exact(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Every row counts once: the sum is exact in fp32, whatever the order, and rounded once."""
    g = generator(1)
    d_out = torch.randint(-4, 5, shape, generator=g).to(dtype)
    saved = torch.randint(0, 2, shape, generator=g).to(dtype)
    d_preact, d_bias = act_bwd(d_out, saved, activation="relu", bias_grad=True)
    assert torch.equal(d_preact, d_out * saved)
    assert d_bias is not None
    assert torch.equal(d_bias, (d_out.double() * saved.double()).sum(0).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_name)
def test_sums_of_blocks_are_added_in_fp32(dtype: torch.dtype) -> None:
    """Two blocks with large sums that cancel but for one: 16 bits would lose it."""
    M = 2 * MAX_ROWS_PER_PROGRAM
    while rows_per_program(M, 1, INTERPRETER_SMS) < MAX_ROWS_PER_PROGRAM:
        M += MAX_ROWS_PER_PROGRAM
    d_out = torch.zeros(M, 1, dtype=dtype)
    for row, value in ((0, 4096.0), (1, 1.0), (MAX_ROWS_PER_PROGRAM, -4096.0)):
        d_out[row] = value
    _, d_bias = act_bwd(d_out, torch.ones_like(d_out), activation="relu", bias_grad=True)
    assert torch.equal(d_bias, torch.ones(1, dtype=dtype))


@pytest.mark.parametrize(
    ("argument", "layout"),
    [("d_out", layout) for layout in (*LAYOUTS[1:7], "scalar")] + [("saved", "column_slice"), ("saved", "transposed")],
)
@all_dtypes
def test_strides_and_offsets_change_nothing(
    sanitized: Sanitizer, dtype: torch.dtype, argument: str, layout: str
) -> None:
    """Also the strides of ``out.sum().backward()``, which are all 0, and a saved tensor with strides of its own."""
    tensors = dict(zip(("d_out", "saved"), make_saved("gelu", 259, 37, dtype), strict=True))
    given = tensors[argument]
    view = given[0, 0].expand_as(given) if layout == "scalar" else with_layout(given, layout)
    ours = act_bwd(**tensors | {argument: view}, activation="gelu", bias_grad=True)
    expected = act_bwd(**tensors | {argument: view.contiguous()}, activation="gelu", bias_grad=True)
    assert all(torch.equal(actual, same) for actual, same in zip(ours, expected, strict=True))
    assert [launch.stored for launch in sanitized.launches] == 2 * [stored((259, 37))]


@pytest.mark.parametrize("shape", [(0, 37), (37, 0), (0, 0)], ids=shape_name)
@all_dtypes
def test_no_rows_give_a_zero_bias_gradient(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    empty = torch.zeros(shape, dtype=dtype)
    d_preact, d_bias = act_bwd(empty, empty, activation="gelu", bias_grad=True)
    assert d_preact.shape == shape
    assert d_bias is not None
    assert torch.equal(d_bias, torch.zeros(shape[1], dtype=dtype))


@all_dtypes
def test_without_a_bias_gradient_the_rest_has_the_same_bits_and_inputs_stay(
    sanitized: Sanitizer, dtype: torch.dtype
) -> None:
    d_out, saved = make_saved("gelu", 273, 37, dtype)
    before = d_out.clone(), saved.clone()
    alone, none = act_bwd(d_out, saved, activation="gelu", bias_grad=False)
    assert none is None
    assert [launch.stored for launch in sanitized.launches] == [{"d_preact_ptr": 273 * 37}]
    first, second = (act_bwd(d_out, saved, activation="gelu", bias_grad=True) for _ in range(2))
    assert torch.equal(alone, first[0])
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert torch.equal(d_out, before[0])
    assert torch.equal(saved, before[1])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@all_dtypes
def test_gradients_of_the_operator_are_as_good_as_eagers(dtype: torch.dtype, activation: str) -> None:
    M, N, K = 67, 72, 96
    i = make_inputs("trained", M, N, K, dtype)
    d_out = torch.randn(M, N, generator=generator(2)).to(dtype)

    def grads(function: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        leaves = [t.clone().requires_grad_() for t in (i.x, i.weight, i.bias) if t is not None]
        function(*leaves, activation).backward(d_out)
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    d_preact = d_out.double() * act_grad64(linear64(i.x, i.weight, i.bias), activation)
    refs = (d_preact @ i.weight.double(), d_preact.t() @ i.x.double(), d_preact.sum(0))
    ours, theirs = grads(ops.linear_act), grads(eager)
    for name, actual, baseline, ref in zip(("d_x", "d_weight", "d_bias"), ours, theirs, refs, strict=True):
        assert_grad(actual, baseline, ref, name)
