"""The forward kernel on every path it can take: against fp64 on the same rounded inputs, every launch watched."""

import dataclasses
import itertools
import math

import pytest
import torch
from interpreter import Sanitizer
from reference64 import (
    ACTIVATIONS,
    DTYPES,
    LAYOUTS,
    UNIT_ROUNDOFF,
    Inputs,
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
from bert_fused.tune.candidates import candidates

pytestmark = pytest.mark.usefixtures("poisoned_empty")

# 3 x 5 tiles of the TMA kernels, with 7 steps of K: no number of blocks divides them.
RAGGED = (37, 136, 200)
SHAPES = [(1, 1, 1), (1, 70, 1), (33, 1, 40), (5, 37, 64), (1, 129, 77), (17, 65, 129), (34, 64, 7), (16, 64, 64)]
# TMA's rows are multiples of 16 bytes. From one tile, which leaves blocks without one, to many.
TMA_SHAPES = [(1, 8, 8), (16, 32, 32), (21, 72, 40), (64, 64, 104), (5, 264, 256)]

_pointer = Config("pointer", "float16", 16, 64, 64, num_warps=1, num_stages=1, group_m=2)
_tma = dataclasses.replace(_pointer, kernel="tma", block_n=32, block_k=32)
# No interpreter runs Gluon; tests/ptx executes what is compiled from it.
NOT_TRITON = ("library", "hopper")
PATHS = {
    "pointer": _pointer,
    "tma": _tma,
    "persistent": dataclasses.replace(_tma, persistent=1),
    "persistent-2": dataclasses.replace(_tma, persistent=2),
    "subtiles2": dataclasses.replace(_tma, persistent=1, subtiles=2),
    "subtiles4": dataclasses.replace(_tma, persistent=1, block_n=64, subtiles=4),
    "library": Config("library", "float16"),
}
TMA_PATHS = [path for path in PATHS if path not in ("pointer", "library")]

all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
all_paths = pytest.mark.parametrize("path", PATHS)


def config_of(path: str, dtype: torch.dtype) -> Config:
    return dataclasses.replace(PATHS[path], dtype=dtype_name(dtype))


def run(
    record: Sanitizer, config: Config, i: Inputs, activation: str, *, save_preact: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``(out, preact)`` of a launch, which stores every element once."""
    del record.launches[:]
    out, preact = linear_act_fwd(i.x, i.weight, i.bias, activation=activation, save_preact=save_preact, config=config)
    stored = ["out_ptr", "preact_ptr"][: 1 + save_preact]
    if config.kernel == "library":  # torch stores the product; the pass then works in place unless both are wanted
        stored = ["out_ptr", "preact_ptr"][: 2 - save_preact]
    assert [launch.stored for launch in record.launches] == [dict.fromkeys(stored, out.numel())]
    assert (preact is not None) == save_preact
    return out, preact


def check(record: Sanitizer, config: Config, i: Inputs, activation: str) -> None:
    """Both results are within the bound, and out is no worse than eager's in 16 bits."""
    out, preact = run(record, config, i, activation)
    assert preact is not None
    assert preact.data_ptr() != out.data_ptr()
    assert_forward(preact, i.x, i.weight, i.bias, "none", "preact")
    dtype = i.x.dtype
    if config.kernel != "library" or dtype == torch.float32:
        assert_forward(out, i.x, i.weight, i.bias, activation)
    else:  # cuBLAS rounds the pre-activation: each of the two steps has its bound, and eager's error the sum
        unit, zero = torch.ones(1, 1, dtype=dtype), torch.zeros(1, dtype=dtype)
        assert_forward(out.view(-1, 1), preact.view(-1, 1), unit, zero, activation, "out of the rounded preact")
    if dtype != torch.float32:
        ref = act64(linear64(i.x, i.weight, i.bias), activation)
        assert_no_worse_than_eager(out, eager(i.x, i.weight, i.bias, activation), ref)


def check_exact(record: Sanitizer, config: Config, i: Inputs) -> None:
    """Integers are exact, before the activation and after it."""
    out, preact = run(record, config, i, "relu")
    ref = linear64(i.x, i.weight, i.bias)
    assert preact is not None
    assert out.is_contiguous()
    assert torch.equal(preact.double(), ref)
    assert torch.equal(out.double(), ref.clamp_min(0))


@pytest.mark.parametrize(
    ("path", "activation", "regime"),
    [(path, activation, "unit") for path in ("pointer", "library") for activation in ACTIVATIONS]
    + [(path, activation, "unit") for path in TMA_PATHS for activation in ("gelu", "tanh")]
    + [("pointer", activation, "trained") for activation in ("gelu", "tanh")],
)
@all_dtypes
def test_every_element_is_within_the_bound(
    sanitized: Sanitizer, dtype: torch.dtype, path: str, activation: str, regime: str
) -> None:
    check(sanitized, config_of(path, dtype), make_inputs(regime, *RAGGED, dtype), activation)


@pytest.mark.parametrize("bias", [False, True], ids=["nobias", "bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_name)
@pytest.mark.parametrize("path", ["pointer", "library"])
@all_dtypes
def test_any_shape_is_within_the_bound(
    sanitized: Sanitizer, dtype: torch.dtype, path: str, shape: tuple[int, int, int], bias: bool
) -> None:
    check(sanitized, config_of(path, dtype), make_inputs("unit", *shape, dtype, bias=bias), "gelu")


@pytest.mark.parametrize("bias", [False, True], ids=["nobias", "bias"])
@pytest.mark.parametrize("shape", TMA_SHAPES, ids=shape_name)
@pytest.mark.parametrize("path", TMA_PATHS)
def test_any_shape_of_whole_16_bytes_is_exact_through_tma(
    sanitized: Sanitizer, path: str, shape: tuple[int, int, int], bias: bool
) -> None:
    i = make_inputs("integers", *shape, torch.float16, bias=bias)
    check_exact(sanitized, config_of(path, torch.float16), i)


@pytest.mark.parametrize(
    ("path", "layout"), [(path, layout) for path in ("pointer", "library") for layout in LAYOUTS] + [("tma", "cls")]
)
@pytest.mark.parametrize("argument", ["x", "weight"])
@all_dtypes
def test_strides_and_offsets_change_nothing(
    sanitized: Sanitizer, dtype: torch.dtype, argument: str, path: str, layout: str
) -> None:
    # oneDNN's bf16 product (AMX) multiplies what follows a row of odd length by zero, and so must not find NaN there.
    around = 1000.0 if path == "library" and dtype is torch.bfloat16 else math.nan
    i = make_inputs("integers", 19, *((72, 48) if path == "tma" else (70, 77)), dtype)
    assert i.bias is not None
    viewed = {argument: with_layout(getattr(i, argument), layout, around), "bias": strided_vector(i.bias)}
    check_exact(sanitized, config_of(path, dtype), dataclasses.replace(i, **viewed))


def tiles() -> list[Config]:
    """Every Triton configuration shipped, or offered to ``tune`` for BERT-base and BERT-large, each once.

    Warps, stages and blocks per SM mean nothing to the interpreter.
    """
    configs = [config for arch in (0, 80, 86, 89, 90, 100, 120) for config in shipped_configs(arch)]
    shapes = [(2**i, *sizes) for i in range(18) for sizes in ((3072, 768), (768, 768), (4096, 1024), (1024, 1024))]
    for arch, dtype, shape in itertools.product((80, 86, 90, 100, 120), ("float16", "bfloat16", "tf32"), shapes):
        configs += [config for config in candidates(*shape, dtype, arch) if config.kernel not in NOT_TRITON]
    return list(
        dict.fromkeys(
            dataclasses.replace(config, num_warps=1, num_stages=1, persistent=min(config.persistent, 1))
            for config in configs
        )
    )


@pytest.mark.parametrize("config", tiles(), ids=lambda config: f"{config.dtype}-{config}".replace(" ", "-"))
def test_every_configuration_shipped_or_offered_is_exact(sanitized: Sanitizer, config: Config) -> None:
    """With a ragged K, and with a K of whole steps if the kernel has another loop for that."""
    dtype = torch.float32 if config.dtype == "tf32" else getattr(torch, config.dtype)
    M, N, K = config.block_m + 5, config.block_n + 24, 2 * config.block_k
    check_exact(sanitized, config, make_inputs("integers", M, N, K + 8, dtype))
    if config.kernel == "pointer":
        check_exact(sanitized, config, make_inputs("integers", M, N, K, dtype))


@pytest.mark.parametrize("group_m", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", [(83, 40, 20), (9, 100, 20)], ids=["tall", "wide"])
def test_every_order_of_tiles_covers_the_output(
    sanitized: Sanitizer, shape: tuple[int, int, int], group_m: int
) -> None:
    config = dataclasses.replace(PATHS["pointer"], block_n=16, block_k=16, group_m=group_m)
    check_exact(sanitized, config, make_inputs("integers", *shape, torch.float16))


@pytest.mark.parametrize("bias", [False, True], ids=["nobias", "bias"])
@pytest.mark.parametrize("path", ["pointer", "tma", "library"])
@all_dtypes
def test_k_of_0_gives_the_activation_of_the_bias(dtype: torch.dtype, path: str, bias: bool) -> None:
    """Also with a tile's configuration. The kernel assumes K > 0, and the interpreter asserts that."""
    i = make_inputs("unit", 18, 70, 0, dtype, bias=bias)
    config = config_of(path, dtype)
    out, preact = linear_act_fwd(i.x, i.weight, i.bias, activation="gelu", save_preact=True, config=config)
    expected = (i.bias if i.bias is not None else torch.zeros(70, dtype=dtype)).expand(18, 70)
    assert preact is not None
    assert torch.equal(preact, expected)
    assert_forward(out, i.x, i.weight, i.bias, "gelu")


@pytest.mark.parametrize("path", [None, "pointer", "tma", "library"])
@all_dtypes
def test_empty_outputs_have_their_shape_and_dtype(dtype: torch.dtype, path: str | None) -> None:
    config = config_of(path, dtype) if path is not None else None
    for M, N, K in ((0, 8, 8), (8, 0, 8), (0, 0, 0), (0, 8, 0)):
        i = make_inputs("unit", M, N, K, dtype)
        for out in linear_act_fwd(i.x, i.weight, i.bias, activation="gelu", save_preact=True, config=config):
            assert out is not None
            assert (out.shape, out.dtype) == ((M, N), dtype)


@pytest.mark.parametrize(
    ("path", "activation"),
    [("pointer", activation) for activation in ACTIVATIONS] + [(path, "gelu") for path in PATHS if path != "pointer"],
)
@all_dtypes
def test_nan_stays_in_its_row_and_column(dtype: torch.dtype, path: str, activation: str) -> None:
    """Also from the last row and column, which lanes outside the output may read again."""
    i = make_inputs("unit", 37, 136, 48, dtype)
    expected = torch.zeros(37, 136, dtype=torch.bool)
    for row, column in ((3, 0), (36, 135)):
        i.x[row, 47] = i.weight[column, 1] = float("nan")
        expected[row] = expected[:, column] = True
    config = config_of(path, dtype)
    for out in linear_act_fwd(i.x, i.weight, i.bias, activation=activation, save_preact=True, config=config):
        assert out is not None
        assert torch.equal(out.isnan(), expected)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@all_dtypes
def test_extreme_values_give_the_activations_limits(dtype: torch.dtype, activation: str) -> None:
    """Far out every activation is z, 0 or its bound of +-1, and no intermediate overflow or 0 * inf shows."""
    z = torch.tensor([88.0, 1e4, 3e38, float("inf")]).to(dtype)
    one, zero = torch.ones(1, 1, dtype=dtype), torch.zeros(1, dtype=dtype)

    def activated(values: torch.Tensor) -> torch.Tensor:
        args = (values.view(-1, 1), one, zero)
        return linear_act_fwd(*args, activation=activation, save_preact=False)[0].view(-1)

    upper = torch.ones_like(z) if activation == "tanh" else z
    assert torch.equal(activated(z), upper)

    lower = {"tanh": -torch.ones_like(z), "none": -z}.get(activation, torch.zeros_like(z))
    finite = z.isfinite()
    below = activated(-z)
    torch.testing.assert_close(below[finite], lower[finite], rtol=0, atol=1e-30)
    # -inf * 0 is NaN in torch's own GELU and SiLU; the limit is as good.
    limit_or_torch = torch.equal(below[~finite], lower[~finite]) or below[~finite].isnan().all()
    assert limit_or_torch if activation in ("gelu", "gelu_tanh", "silu", "quick_gelu") else torch.equal(below, lower)

    assert activated(z.new_tensor([float("nan")])).isnan().all()


@all_paths
@all_dtypes
def test_a_second_call_without_preact_gives_the_same_bits_and_leaves_its_inputs(
    sanitized: Sanitizer, dtype: torch.dtype, path: str
) -> None:
    i = make_inputs("unit", *RAGGED, dtype)
    assert i.bias is not None
    before = [t.clone() for t in (i.x, i.weight, i.bias)]
    out, _ = run(sanitized, config_of(path, dtype), i, "gelu")
    alone, _ = run(sanitized, config_of(path, dtype), i, "gelu", save_preact=False)
    assert torch.equal(alone, out)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip((i.x, i.weight, i.bias), before, strict=True))


def test_the_bound_is_tight_enough_to_see_a_second_rounding() -> None:
    """Rounding the pre-activation before the activation, as eager does, breaks the bound."""
    i = make_inputs("unit", *RAGGED, torch.bfloat16)
    ref = act64(linear64(i.x, i.weight, i.bias), "gelu")
    with pytest.raises(AssertionError, match="outside the bound"):
        assert_forward(eager(i.x, i.weight, i.bias, "gelu"), i.x, i.weight, i.bias, "gelu")
    assert_within(ref.bfloat16(), ref, rounding_bound(ref, torch.bfloat16))
    assert UNIT_ROUNDOFF[torch.bfloat16] == torch.finfo(torch.bfloat16).eps / 2
