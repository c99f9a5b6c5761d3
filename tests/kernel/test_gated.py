"""Gated activations in every kernel: against fp64 on the same rounded inputs, every launch watched."""

import dataclasses
import itertools

import pytest
import torch
from gated64 import EVERY, NAMES, gated64, gated_bound, gated_grad64, own_error
from interpreter import Sanitizer
from reference64 import (
    DTYPES,
    LAYOUTS,
    Inputs,
    assert_forward,
    assert_no_worse_than_eager,
    assert_within,
    dtype_name,
    generator,
    linear64,
    make_inputs,
    rms,
    rounding_bound,
    shape_name,
    strided_vector,
    with_layout,
)

from bert_fused import reference
from bert_fused.kernels.configs import Config
from bert_fused.kernels.elementwise import BLOCK_N, FWD_BLOCK, act_bwd, act_fwd, rows_per_program
from bert_fused.kernels.gated import gated, gated_config, gated_configs, parse
from bert_fused.kernels.linear_act import linear_act_fwd
from bert_fused.kernels.lookup import get_config, shipped_configs
from bert_fused.kernels.runtime import INTERPRETER_SMS

pytestmark = pytest.mark.usefixtures("poisoned_empty")

_pointer = Config("pointer", "float16", 16, 32, 32, num_warps=1, num_stages=1, group_m=2)
_tma = dataclasses.replace(_pointer, kernel="tma")
PATHS = {
    "pointer": _pointer,
    "tma": _tma,
    "persistent": dataclasses.replace(_tma, persistent=2),
    "subtiles": dataclasses.replace(_tma, persistent=1, subtiles=2),
    "library": Config("library", "float16"),
}
# M, columns of each half, K. TMA stores whole tiles of each half.
RAGGED, WHOLE = (37, 71, 200), (37, 96, 200)
SHAPES = [(1, 1, 1), (1, 35, 1), (33, 1, 40), (5, 19, 64), (17, 65, 129), (34, 32, 7), (16, 64, 64)]

all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)


def inputs(regime: str, shape: tuple[int, int, int], dtype: torch.dtype, *, bias: bool = True) -> Inputs:
    M, N, K = shape
    return make_inputs(regime, M, 2 * N, K, dtype, bias=bias)


def run(record: Sanitizer, path: str, i: Inputs, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """``(out, preact)`` of a launch that stores every element of both once."""
    del record.launches[:]
    config = dataclasses.replace(PATHS[path], dtype=dtype_name(i.x.dtype))
    out, preact = linear_act_fwd(i.x, i.weight, i.bias, activation=name, save_preact=True, config=config)
    assert preact is not None
    assert preact.shape == (len(i.x), len(i.weight))
    stored = {"out_ptr": out.numel(), "preact_ptr": preact.numel()}
    if path == "library":  # torch stores the product
        del stored["preact_ptr"]
    assert [launch.stored for launch in record.launches] == [stored]
    return out, preact


def check(record: Sanitizer, path: str, i: Inputs, activation: str, half: str) -> None:
    name = NAMES[activation, half]
    out, preact = run(record, path, i, name)
    assert_forward(preact, i.x, i.weight, i.bias, "none", "preact")
    ref, bound = gated_bound(i.x, i.weight, i.bias, activation, half)
    assert out.dtype == i.x.dtype
    if path != "library" or i.x.dtype == torch.float32:
        assert_within(out, ref, bound, "out")
        ours = reference.error_bound(i.x, i.weight, i.bias, name, ref, i.x.dtype)
        torch.testing.assert_close(ours, bound, rtol=1e-9, atol=1e-12)
    else:  # cuBLAS rounds the pre-activation
        rounded = gated64(preact, activation, half)
        factor = preact.double().chunk(2, -1)[half == "first"]
        own = own_error(activation, out.dtype) * factor.abs()
        assert_within(out, rounded, rounding_bound(rounded, out.dtype) + own, "out")
    if i.x.dtype == torch.float32:
        return
    eager = reference.linear_act(i.x, i.weight, i.bias, name)
    if path != "library":
        assert_no_worse_than_eager(out, eager, ref)
    elif out.numel() > 1000:  # eager rounds once more, which by chance may undo a rounding that both made before
        assert rms(out.double() - ref) <= 1.001 * rms(eager.double() - ref)


@pytest.mark.parametrize(
    ("path", "activation", "half"),
    [(path, *each) for path in ("pointer", "library") for each in EVERY]
    + [(path, "gelu", half) for path in ("tma", "persistent", "subtiles") for half in ("first", "second")],
)
@all_dtypes
def test_every_element_is_within_the_bound(
    sanitized: Sanitizer, dtype: torch.dtype, path: str, activation: str, half: str
) -> None:
    shape = RAGGED if path in ("pointer", "library") else WHOLE
    check(sanitized, path, inputs("unit", shape, dtype), activation, half)


@pytest.mark.parametrize("bias", [False, True], ids=["nobias", "bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_name)
@pytest.mark.parametrize("path", ["pointer", "library"])
def test_any_shape_is_within_the_bound(
    sanitized: Sanitizer, path: str, shape: tuple[int, int, int], bias: bool
) -> None:
    for dtype in DTYPES:
        check(sanitized, path, inputs("unit", shape, dtype, bias=bias), "silu", "first")


def check_exact(record: Sanitizer, path: str, i: Inputs) -> None:
    """Sums of integers, and their products, are exact in fp32; the result is rounded once."""
    out, preact = run(record, path, i, "relu(a)*b")
    z = linear64(i.x, i.weight, i.bias)
    assert torch.equal(preact.double(), z)
    assert torch.equal(out, gated64(z, "relu", "first").to(out.dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("argument", ["x", "weight"])
def test_strides_and_offsets_change_nothing(sanitized: Sanitizer, argument: str, layout: str) -> None:
    """Both halves of a weight with any strides are read in place. The bias has a stride as well."""
    i = inputs("integers", (21, 35, 40), torch.bfloat16)
    assert i.bias is not None
    i = dataclasses.replace(i, bias=strided_vector(i.bias))
    check_exact(sanitized, "pointer", dataclasses.replace(i, **{argument: with_layout(getattr(i, argument), layout)}))


def gated_tiles() -> list[Config]:
    """Every tile that serves gated calls on any architecture, each once, as the interpreter runs it."""
    configs = [config for arch in (0, 80, 86, 89, 90, 100, 120) for config in gated_configs(arch)]
    configs = [
        dataclasses.replace(config, num_warps=1, num_stages=1) for config in configs if config.dtype != "float16"
    ]
    return list(dict.fromkeys(configs))


@pytest.mark.parametrize("config", gated_tiles(), ids=lambda config: f"{config.dtype}-{config}".replace(" ", "-"))
def test_every_configuration_that_serves_gated_calls_is_exact(
    sanitized: Sanitizer, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = torch.float32 if config.dtype in ("tf32", "float32") else torch.bfloat16
    monkeypatch.setitem(PATHS, "tile", config)
    N = 2 * config.block_n if config.kernel == "tma" else config.block_n + 9
    check_exact(sanitized, "tile", inputs("integers", (config.block_m + 5, N, config.block_k + 8), dtype))


@pytest.mark.parametrize("arch", [0, 80, 86, 89, 90, 100, 120])
def test_gated_calls_get_the_products_tile_with_half_as_many_columns(arch: int) -> None:
    """So that registers and shared memory are the same. TMA serves only where tiles divide the half."""
    for config, M, N in itertools.product(shipped_configs(arch), (1, 8192), (1152, 2624, 1160)):
        chosen = gated_config(config, M, N, arch)
        if config.kernel == "tma" and N % (config.block_n // 2):
            assert chosen.kernel == "pointer"
        else:
            expected = max(16, config.block_n // 2)
            assert chosen == dataclasses.replace(config, block_n=expected, subtiles=chosen.subtiles)
    wide = Config("tma", "float16", 128, 64, 64, 4, 3, persistent=2, subtiles=4)
    assert (gated_config(wide, 512, 64, 90).block_n, gated_config(wide, 512, 64, 90).subtiles) == (32, 2)
    assert gated_config(Config("library", "tf32"), 512, 64, 90) == Config("library", "tf32")


@pytest.mark.parametrize(("M", "N", "K"), [(8192, 1152, 768), (512, 2624, 1024), (1, 1152, 768)])
def test_a_call_gets_the_configuration_of_the_product_with_both_halves(
    M: int, N: int, K: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bert_fused.kernels import linear_act as launcher

    asked: list[Config] = []
    monkeypatch.setattr(launcher, "arch_of", lambda device: 90)
    monkeypatch.setattr(launcher, "name_of", lambda device: "")
    monkeypatch.setattr(launcher, "_launch_of", lambda *a: asked.append(a[-1]) or (lambda *tensors: None))
    x, weight = torch.empty(M, K, dtype=torch.float16), torch.empty(2 * N, K, dtype=torch.float16)
    linear_act_fwd(x, weight, None, activation="gelu(a)*b", save_preact=False)
    product = get_config(M, 2 * N, K, "float16", 90, aligned=True)
    assert asked == [gated_config(product, M, N, 90)]


@pytest.mark.parametrize("path", [None, "pointer", "library"])
def test_empty_halves_and_sums_of_nothing(path: str | None) -> None:
    config = PATHS[path] if path is not None else None
    for M, N, K in ((0, 8, 8), (8, 0, 8), (3, 8, 0)):
        i = inputs("unit", (M, N, K), torch.float16)
        out, preact = linear_act_fwd(i.x, i.weight, i.bias, activation="a*gelu(b)", save_preact=True, config=config)
        assert preact is not None
        assert (out.shape, preact.shape) == ((M, N), (M, 2 * N))
        if not K:
            ref = gated64(i.bias.expand(M, 2 * N), "gelu", "second")
            assert_within(out, ref, rounding_bound(ref, torch.float16))


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, FWD_BLOCK), (3, FWD_BLOCK + 1), (7, 300)], ids=shape_name)
@pytest.mark.parametrize("half", ["first", "second"])
def test_the_pass_finds_every_row(sanitized: Sanitizer, half: str, shape: tuple[int, int]) -> None:
    """Rows shorter and longer than a block, so that blocks begin inside rows and rows inside blocks."""
    M, N = shape
    z = torch.randn(M, 2 * N, generator=generator(3))
    out = torch.empty(M, N)
    act_fwd(M * N, gated("relu", half), N)(z, out)
    assert torch.equal(out, gated64(z, "relu", half).float())
    assert [launch.stored for launch in sanitized.launches] == [{"out_ptr": M * N}]


@pytest.mark.parametrize(
    ("shape", "activation", "half"),
    [((67, 33), *each) for each in EVERY]
    + [(shape, "gelu", half) for shape in ((1, 1), (273, BLOCK_N + 9)) for half in ("first", "second")],
)
def test_the_backward_pass_is_within_the_bound(
    sanitized: Sanitizer, shape: tuple[int, int], activation: str, half: str
) -> None:
    M, N = shape
    for dtype in DTYPES:
        g = generator(4)
        d_out, saved = torch.randn(M, N, generator=g).to(dtype), (2 * torch.randn(M, 2 * N, generator=g)).to(dtype)
        d_preact, d_bias = act_bwd(d_out, saved, activation=NAMES[activation, half], bias_grad=True)
        programs = -(-M // rows_per_program(M, N, INTERPRETER_SMS))
        stored = {"d_preact_ptr": 2 * M * N, "partial_ptr": programs * 2 * N}
        assert sanitized.launches.pop().stored == stored
        ref, bound = gated_grad64(d_out, saved, activation, half)
        assert_within(d_preact, ref, bound, "d_preact")
        assert d_bias is not None
        accumulation = 2.0**-23 * (1 + M / 16) * ref.abs().sum(0)
        assert_within(d_bias, ref.sum(0), rounding_bound(ref.sum(0), dtype) + bound.sum(0) + accumulation, "d_bias")


@pytest.mark.parametrize("layout", [*LAYOUTS[1:7], "scalar"])
def test_strides_of_d_out_change_nothing(layout: str) -> None:
    g = generator(5)
    d_out, saved = torch.randn(150, 37, generator=g), torch.randn(150, 74, generator=g)
    view = d_out[0, 0].expand_as(d_out) if layout == "scalar" else with_layout(d_out, layout)
    ours = act_bwd(view, saved, activation="gelu(a)*b", bias_grad=True)
    expected = act_bwd(view.contiguous(), with_layout(saved, "column_slice"), activation="gelu(a)*b", bias_grad=True)
    assert all(torch.equal(actual, same) for actual, same in zip(ours, expected, strict=True))


def test_a_nan_stays_in_its_row_and_column() -> None:
    i = inputs("unit", RAGGED, torch.float16)
    expected = torch.zeros(37, 71, dtype=torch.bool)
    for row, column in ((3, 0), (36, 141)):
        i.x[row, 47] = i.weight[column, 1] = float("nan")
        expected[row] = expected[:, column % 71] = True
    for path in ("pointer", "library"):
        out, _ = linear_act_fwd(i.x, i.weight, i.bias, activation="gelu(a)*b", save_preact=False, config=PATHS[path])
        assert torch.equal(out.isnan(), expected)


@pytest.mark.parametrize(("activation", "half"), EVERY)
def test_names_are_read_as_they_are_written(activation: str, half: str) -> None:
    assert gated(activation, half) == NAMES[activation, half]
    assert parse(gated(activation, half)) == (activation, half)
    assert parse(activation) == (activation, "")
