"""The forward kernel, alone, against fp64 on the same rounded inputs, on every path it can take."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from reference64 import (
    ACTIVATIONS,
    DTYPES,
    LAYOUTS,
    REGIMES,
    UNIT_ROUNDOFF,
    act64,
    assert_forward,
    assert_no_worse_than_eager,
    assert_within,
    dtype_name,
    linear64,
    make_inputs,
    rounding_bound,
    shape_name,
    strided_vector,
    with_layout,
)

from bert_fused.kernels.configs import Config
from bert_fused.kernels.linear_act import linear_act_fwd
from bert_fused.kernels.lookup import shipped_configs
from bert_fused.reference import linear_act as eager

pytestmark = pytest.mark.usefixtures("poisoned_empty")

all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
HALF_DTYPES = (torch.float16, torch.bfloat16)

RAGGED = (37, 136, 200)
SHAPES = [(1, 1, 1), (1, 70, 1), (33, 1, 40), (5, 37, 32), (1, 129, 77), (17, 33, 129), (40, 48, 64), (16, 32, 32)]


def small_tiles(dtype: torch.dtype) -> Config:
    """Tiles that the ragged shape fills 3 x 3 x 4 times, never exactly."""
    return Config("pointer", dtype_name(dtype), 16, 64, 64, num_warps=4, num_stages=1, group_m=2)


def tma_tiles(dtype: torch.dtype) -> Config:
    return dataclasses.replace(small_tiles(dtype), kernel="tma", block_n=32, block_k=32)


def library(dtype: torch.dtype) -> Config:
    return Config("library", dtype_name(dtype))


@pytest.mark.parametrize("regime", REGIMES)
@all_dtypes
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_element_within_the_bound(activation: str, dtype: torch.dtype, regime: str) -> None:
    i = make_inputs(regime, *RAGGED, dtype)
    out, preact = linear_act_fwd(
        i.x, i.weight, i.bias, activation=activation, save_preact=True, config=small_tiles(dtype)
    )
    assert preact is not None
    assert_forward(out, i.x, i.weight, i.bias, activation)
    assert_forward(preact, i.x, i.weight, i.bias, "none", "preact")
    if dtype in HALF_DTYPES:
        ref = act64(linear64(i.x, i.weight, i.bias), activation)
        assert_no_worse_than_eager(out, eager(i.x, i.weight, i.bias, activation), ref)


@pytest.mark.parametrize("save_preact", [False, True], ids=["out", "out+preact"])
@pytest.mark.parametrize("bias", [False, True], ids=["nobias", "bias"])
@all_dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=shape_name)
def test_shapes(shape: tuple[int, int, int], dtype: torch.dtype, bias: bool, save_preact: bool) -> None:
    i = make_inputs("unit", *shape, dtype, bias=bias)
    out, preact = linear_act_fwd(i.x, i.weight, i.bias, activation="gelu", save_preact=save_preact)
    assert_forward(out, i.x, i.weight, i.bias, "gelu")
    if dtype in HALF_DTYPES:
        ref = act64(linear64(i.x, i.weight, i.bias), "gelu")
        assert_no_worse_than_eager(out, eager(i.x, i.weight, i.bias, "gelu"), ref)
    assert (preact is not None) == save_preact
    if preact is not None:
        assert_forward(preact, i.x, i.weight, i.bias, "none", "preact")


@pytest.mark.parametrize("bias", [False, True], ids=["nobias", "bias"])
@pytest.mark.parametrize("activation", ["gelu", "tanh"])
@all_dtypes
@pytest.mark.parametrize("shape", [(21, 72, 40), (16, 32, 32), (1, 8, 8), (40, 40, 104)], ids=shape_name)
def test_tma(shape: tuple[int, int, int], dtype: torch.dtype, activation: str, bias: bool) -> None:
    i = make_inputs("unit", *shape, dtype, bias=bias)
    config = tma_tiles(dtype)
    out, preact = linear_act_fwd(i.x, i.weight, i.bias, activation=activation, save_preact=True, config=config)
    assert preact is not None
    assert_forward(out, i.x, i.weight, i.bias, activation)
    assert_forward(preact, i.x, i.weight, i.bias, "none", "preact")
    alone, _ = linear_act_fwd(i.x, i.weight, i.bias, activation=activation, save_preact=False, config=config)
    assert torch.equal(alone, out)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@all_dtypes
def test_library_path(dtype: torch.dtype, activation: str) -> None:
    """cuBLAS rounds the pre-activation: in 16 bits each of the two steps has its bound, and eager's error the sum."""
    i = make_inputs("unit", *RAGGED, dtype)
    config = library(dtype)
    out, preact = linear_act_fwd(i.x, i.weight, i.bias, activation=activation, save_preact=True, config=config)
    assert preact is not None
    assert preact.data_ptr() != out.data_ptr()
    assert_forward(preact, i.x, i.weight, i.bias, "none", "preact")
    unit, zero = torch.ones(1, 1, dtype=dtype), torch.zeros(1, dtype=dtype)
    assert_forward(out.view(-1, 1), preact.view(-1, 1), unit, zero, activation, "out of the rounded preact")
    if dtype == torch.float32:
        assert_forward(out, i.x, i.weight, i.bias, activation)
    else:
        ref = act64(linear64(i.x, i.weight, i.bias), activation)
        assert_no_worse_than_eager(out, eager(i.x, i.weight, i.bias, activation), ref)
    in_place, none = linear_act_fwd(i.x, i.weight, i.bias, activation=activation, save_preact=False, config=config)
    assert none is None
    assert torch.equal(in_place, out)


@pytest.mark.parametrize("config", [small_tiles, library], ids=["pointer", "library"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("argument", ["x", "weight"])
@all_dtypes
def test_layouts(dtype: torch.dtype, argument: str, layout: str, config: Callable[[torch.dtype], Config]) -> None:
    """Strides and offsets change nothing: exact integers stay exact, other numbers within the bound."""
    # oneDNN's bf16 product (AMX) multiplies what follows a row of odd length by zero, and so must not find NaN there.
    around = 1000.0 if config is library and dtype is torch.bfloat16 else math.nan
    i = make_inputs("integers", 19, 70, 45, dtype)
    args = {"x": i.x, "weight": i.weight}
    args[argument] = with_layout(args[argument], layout, around)
    assert i.bias is not None
    bias = strided_vector(i.bias)
    out, _ = linear_act_fwd(**args, bias=bias, activation="none", save_preact=False, config=config(dtype))
    assert out.is_contiguous()
    assert torch.equal(out.double(), linear64(args["x"], args["weight"], i.bias))

    i = make_inputs("unit", 19, 70, 45, dtype)
    args = {"x": i.x, "weight": i.weight}
    args[argument] = with_layout(args[argument], layout, around)
    out, _ = linear_act_fwd(**args, bias=i.bias, activation="relu", save_preact=False, config=config(dtype))
    assert_forward(out, args["x"], args["weight"], i.bias, "relu")


@all_dtypes
def test_tma_reads_rows_of_a_wider_tensor(dtype: torch.dtype) -> None:
    i = make_inputs("integers", 19, 40, 48, dtype)
    x = i.x.new_full((19, 3, 48), float("nan"))[:, 0].copy_(i.x)
    weight = i.weight.new_full((40, 64), float("nan"))[:, 8:56].copy_(i.weight)
    out, _ = linear_act_fwd(x, weight, i.bias, activation="none", save_preact=False, config=tma_tiles(dtype))
    assert torch.equal(out.double(), linear64(i.x, i.weight, i.bias))


# Warps and stages mean nothing to the interpreter: one of each tile will do.
SHIPPED = list(
    dict.fromkeys(
        dataclasses.replace(config, num_warps=1, num_stages=1)
        for arch in (0, 80, 86, 89, 90, 100)
        for config in shipped_configs(arch)
    )
)


@pytest.mark.parametrize("even_k", [False, True], ids=["ragged_k", "even_k"])
@pytest.mark.parametrize("config", SHIPPED, ids=lambda c: f"{c.kernel}-{c.dtype}-{c.block_m}x{c.block_n}x{c.block_k}")
def test_shipped_configurations_are_exact_on_integers(config: Config, even_k: bool) -> None:
    dtype = torch.float32 if config.dtype == "tf32" else getattr(torch, config.dtype)
    K = 2 * config.block_k if even_k else 2 * config.block_k + 8
    i = make_inputs("integers", config.block_m + 5, config.block_n + 24, K, dtype)
    out, preact = linear_act_fwd(i.x, i.weight, i.bias, activation="relu", save_preact=True, config=config)
    assert preact is not None
    ref = linear64(i.x, i.weight, i.bias)
    assert torch.equal(preact.double(), ref)
    assert torch.equal(out.double(), ref.clamp_min(0))


@pytest.mark.parametrize("group_m", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", [(83, 40, 20), (9, 100, 20)], ids=["tall", "wide"])
def test_every_order_of_tiles_covers_the_output(shape: tuple[int, int, int], group_m: int) -> None:
    i = make_inputs("integers", *shape, torch.float16)
    config = Config("pointer", "float16", 16, 16, 32, num_warps=1, num_stages=1, group_m=group_m)
    out, _ = linear_act_fwd(i.x, i.weight, i.bias, activation="none", save_preact=False, config=config)
    assert torch.equal(out.double(), linear64(i.x, i.weight, i.bias))


@pytest.mark.parametrize("bias", [False, True], ids=["nobias", "bias"])
@pytest.mark.parametrize("config", [small_tiles, tma_tiles, library], ids=["pointer", "tma", "library"])
@all_dtypes
def test_no_inputs_give_the_activation_of_the_bias(
    dtype: torch.dtype, config: Callable[[torch.dtype], Config], bias: bool
) -> None:
    """Also with a tile's configuration. The kernel assumes K > 0, and the interpreter asserts that."""
    i = make_inputs("unit", 18, 70, 0, dtype, bias=bias)
    out, preact = linear_act_fwd(i.x, i.weight, i.bias, activation="gelu", save_preact=True, config=config(dtype))
    expected = (i.bias if i.bias is not None else torch.zeros(70, dtype=dtype)).expand(18, 70)
    assert preact is not None
    assert torch.equal(preact, expected)
    assert_forward(out, i.x, i.weight, i.bias, "gelu")


@pytest.mark.parametrize("config", [None, small_tiles, tma_tiles, library], ids=["lookup", "pointer", "tma", "library"])
@pytest.mark.parametrize("shape", [(0, 8, 8), (8, 0, 8), (0, 0, 0), (0, 8, 0)], ids=shape_name)
@all_dtypes
def test_no_outputs(
    dtype: torch.dtype, shape: tuple[int, int, int], config: Callable[[torch.dtype], Config] | None
) -> None:
    i = make_inputs("unit", *shape, dtype)
    chosen = config(dtype) if config is not None else None
    out, preact = linear_act_fwd(i.x, i.weight, i.bias, activation="gelu", save_preact=True, config=chosen)
    assert preact is not None
    assert out.shape == preact.shape == shape[:2]
    assert out.dtype == preact.dtype == dtype


@pytest.mark.parametrize("config", [small_tiles, tma_tiles, library], ids=["pointer", "tma", "library"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@all_dtypes
def test_nan_stays_in_its_row_and_column(
    dtype: torch.dtype, activation: str, config: Callable[[torch.dtype], Config]
) -> None:
    """Also from the last row and column, which lanes outside the output may read again."""
    i = make_inputs("unit", 19, 40, 48, dtype)
    expected = torch.zeros(19, 40, dtype=torch.bool)
    for row in (3, 18):
        i.x[row, 47] = float("nan")
        expected[row] = True
    for column in (0, 39):
        i.weight[column, 1] = float("nan")
        expected[:, column] = True
    out, preact = linear_act_fwd(i.x, i.weight, i.bias, activation=activation, save_preact=True, config=config(dtype))
    assert preact is not None
    assert torch.equal(out.isnan(), expected)
    assert torch.equal(preact.isnan(), expected)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@all_dtypes
def test_extreme_values(dtype: torch.dtype, activation: str) -> None:
    """Far out every activation is z, 0 or its bound of +-1, and no intermediate overflow or 0 * inf shows."""
    z = torch.tensor([88.0, 1e4, 3e38, float("inf")]).to(dtype)
    one, zero = torch.ones(1, 1, dtype=dtype), torch.zeros(1, dtype=dtype)

    def run(values: torch.Tensor) -> torch.Tensor:
        args = (values.view(-1, 1), one, zero)
        return linear_act_fwd(*args, activation=activation, save_preact=False)[0].view(-1)

    upper = torch.ones_like(z) if activation == "tanh" else z
    assert torch.equal(run(z), upper)

    lower = {"tanh": -torch.ones_like(z), "none": -z}.get(activation, torch.zeros_like(z))
    finite = z.isfinite()
    below = run(-z)
    torch.testing.assert_close(below[finite], lower[finite], rtol=0, atol=1e-30)
    # -inf * 0 is NaN in torch's own GELU and SiLU; the limit is as good.
    limit_or_torch = torch.equal(below[~finite], lower[~finite]) or below[~finite].isnan().all()
    assert limit_or_torch if activation in ("gelu", "gelu_tanh", "silu", "quick_gelu") else torch.equal(below, lower)

    assert run(z.new_tensor([float("nan")])).isnan().all()


@pytest.mark.parametrize("config", [small_tiles, tma_tiles, library], ids=["pointer", "tma", "library"])
@all_dtypes
def test_same_call_same_bits_and_untouched_inputs(dtype: torch.dtype, config: Callable[[torch.dtype], Config]) -> None:
    i = make_inputs("unit", 19, 40, 48, dtype)
    assert i.bias is not None
    before = [t.clone() for t in (i.x, i.weight, i.bias)]
    runs = [
        linear_act_fwd(i.x, i.weight, i.bias, activation="gelu", save_preact=True, config=config(dtype))
        for _ in range(2)
    ]
    for first, second in zip(*runs, strict=True):
        assert first is not None
        assert second is not None
        assert torch.equal(first, second)
    for tensor, copy in zip((i.x, i.weight, i.bias), before, strict=True):
        assert torch.equal(tensor, copy)


def test_bound_is_tight_enough_to_see_a_second_rounding() -> None:
    """What the bound is for: rounding the pre-activation before the activation, as eager does, breaks it."""
    i = make_inputs("unit", *RAGGED, torch.bfloat16)
    ref = act64(linear64(i.x, i.weight, i.bias), "gelu")
    with pytest.raises(AssertionError, match="outside the bound"):
        assert_forward(eager(i.x, i.weight, i.bias, "gelu"), i.x, i.weight, i.bias, "gelu")
    assert_within(ref.bfloat16(), ref, rounding_bound(ref, torch.bfloat16))
    assert UNIT_ROUNDOFF[torch.bfloat16] == torch.finfo(torch.bfloat16).eps / 2
