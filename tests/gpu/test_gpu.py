"""Values on an NVIDIA GPU, which has its own exponential, division and order of sums. ``make gpu-test`` runs this."""

import pytest
import torch
from gpu import DEVICE, EMULATED, HAS_GPU, MARKS, gradients, inputs, needs_gpu
from reference64 import (
    ACTIVATIONS,
    DTYPES,
    LAYOUTS,
    REGIMES,
    Inputs,
    accumulation_bound,
    act64,
    act_grad64,
    assert_forward,
    assert_grad,
    assert_no_worse_than_eager,
    assert_within,
    dtype_name,
    linear64,
    magnitude,
    rounding_bound,
    strided_vector,
    with_layout,
)

from bert_fused import cls_pool, linear_act
from bert_fused.fallback import device_reason, interpreted
from bert_fused.kernels.configs import Config
from bert_fused.kernels.elementwise import act_bwd, act_fwd
from bert_fused.kernels.linear_act import linear_act_fwd
from bert_fused.kernels.lookup import shipped_configs
from bert_fused.kernels.runtime import arch_of
from bert_fused.reference import GRAD_FROM_OUTPUT
from bert_fused.reference import linear_act as eager
from bert_fused.tune.candidates import candidates
from bert_fused.tune.search import fp32_products

pytestmark = MARKS

CONFIGS = (Config("pointer", "float16", 32, 32, 32, 4, 1),)
if HAS_GPU or EMULATED:  # in the emulator a few: tests/ptx runs all
    CONFIGS = tuple(shipped_configs(arch_of(DEVICE)))[:: 1 if HAS_GPU else 5]
    # No table names these yet.
    OFFERED = [c for dtype in ("bfloat16", "float16") for c in candidates(4096, 3072, 768, dtype, arch_of(DEVICE))]
    CONFIGS += tuple(c for c in OFFERED if c.kernel == "hopper")[:: 1 if HAS_GPU else 2]
MODELS = ((384, 1536), (768, 3072), (1024, 4096)) if HAS_GPU else ((48, 64),)
ROWS = (32, 500, 4096) if HAS_GPU else (20,)

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
every_config = pytest.mark.parametrize(
    "config", CONFIGS, ids=lambda config: f"{config.dtype} {config}".replace(" ", "-")
)


def tensor_dtype(config: Config) -> torch.dtype:
    return torch.float32 if config.dtype == "tf32" else getattr(torch, config.dtype)


def test_this_machine_runs_the_kernels() -> None:
    """If PyTorch ran instead, the other tests here would pass and prove nothing."""
    assert device_reason(DEVICE, torch.bfloat16) is None
    assert interpreted() != (HAS_GPU or EMULATED)


@every_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.usefixtures("poisoned_empty")
def test_forward_is_within_the_bound(activation: str, dtype: torch.dtype) -> None:
    for regime in REGIMES:
        data = inputs(regime, 200, 256, 192, dtype)
        out = linear_act(data.x, data.weight, data.bias, activation)
        assert_forward(out, data.x, data.weight, data.bias, activation, regime)
    if activation == "gelu":
        assert_forward(linear_act(data.x, data.weight), data.x, data.weight, None, activation, "no bias")


@needs_gpu
@pytest.mark.parametrize(("K", "N"), MODELS)
@pytest.mark.parametrize("M", ROWS)
def test_tf32_of_random_fp32_is_about_as_exact_as_eager_tf32(M: int, N: int, K: int) -> None:
    """Only here does rounding to TF32 show: the inputs of the tuner and the benchmarks are exact in TF32.

    The kernel does not round to the nearest, so tensor cores drop the bits that TF32 does not have: an error of u / 2
    on average and u / sqrt(12) around it per operand. If eager rounds, its error is u / sqrt(12): sqrt(7) = 2.65 less.
    """
    data = inputs("unit", M, N, K, torch.float32)
    preact = linear64(data.x, data.weight, data.bias)
    with fp32_products("tf32"):
        out, eagers = linear_act(*vars(data).values(), "none"), eager(*vars(data).values(), "none")
    # Both operands are off by less than 2^-10 of themselves.
    assert_within(out, preact, torch.full_like(preact, 2.0**-9 * magnitude(*vars(data).values())))
    mine, theirs = ((tensor.double() - preact).square().mean().sqrt() for tensor in (out, eagers))
    assert mine <= 2.8 * theirs, f"RMS error {mine:.2e}, eager's {theirs:.2e}"
    assert mine > 1e-5 * preact.square().mean().sqrt(), "TF32 was allowed, and not used"


@every_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("poisoned_empty")
def test_every_layout_is_no_worse_than_eager_and_integers_are_exact(layout: str, dtype: torch.dtype) -> None:
    """Through the lookup, which leaves awkward strides to cuBLAS, and in the pointer kernel, which takes any.

    cuBLAS rounds 16-bit pre-activations, as eager does, so eager's error is their bound.
    """
    data = inputs("unit", 70, 80, 96, dtype)
    x, weight, bias = with_layout(data.x, layout), with_layout(data.weight, layout), strided_vector(data.bias)
    out, ref = linear_act(x, weight, bias, "gelu"), act64(linear64(x, weight, bias), "gelu")
    if dtype == torch.float32:
        assert_forward(out, x, weight, bias, "gelu")
    else:
        allowed = accumulation_bound(x, weight, bias)
        assert_no_worse_than_eager(out, eager(x, weight, bias, "gelu"), ref, accumulation=allowed)

    data = inputs("integers", 70, 80, 96, dtype)
    x, weight, bias = with_layout(data.x, layout), with_layout(data.weight, layout), strided_vector(data.bias)
    config = Config("pointer", "tf32" if dtype == torch.float32 else dtype_name(dtype), 64, 64, 32, 4, 3)
    out, preact = linear_act_fwd(x, weight, bias, activation="relu", save_preact=True, config=config)
    expected = linear64(x, weight, bias)
    assert torch.equal(preact.double(), expected)
    assert torch.equal(out.double(), expected.clamp_min(0))


@every_dtype
@pytest.mark.usefixtures("poisoned_empty")
def test_pooler_reads_only_the_first_tokens(dtype: torch.dtype) -> None:
    data = inputs("unit", 33, 64, 64, dtype)
    hidden = data.x.new_full((33, 5, 64), float("nan"))
    hidden[:, 0] = data.x
    assert_forward(cls_pool(hidden, data.weight, data.bias), data.x, data.weight, data.bias, "tanh")


@every_config
@pytest.mark.parametrize(
    "shape", [(300, 272, 256), (300, 272, 208), (131, 203, 77)], ids=["ragged-rows", "ragged-k", "unaligned"]
)
@pytest.mark.usefixtures("poisoned_empty")
def test_every_configuration_is_exact_on_integers(config: Config, shape: tuple[int, int, int]) -> None:
    if config.kernel in ("tma", "hopper") and shape[2] % 8:
        pytest.skip("TMA needs rows on 16-byte boundaries")
    data = inputs("integers", *shape, tensor_dtype(config))
    out, preact = linear_act_fwd(data.x, data.weight, data.bias, activation="relu", save_preact=True, config=config)
    expected = linear64(data.x, data.weight, data.bias)
    assert torch.equal(preact.double(), expected)
    assert torch.equal(out.double(), expected.clamp_min(0))


@every_config
@pytest.mark.usefixtures("poisoned_empty")
def test_every_configuration_computes_gelu(config: Config) -> None:
    x, weight, bias = vars(inputs("unit", 320, 272, 256, tensor_dtype(config))).values()
    out, preact = linear_act_fwd(x, weight, bias, activation="gelu", save_preact=False, config=config)
    assert preact is None
    if config.dtype == "tf32":
        ref = act64(linear64(x, weight, bias), "gelu")
        assert_within(out, ref, torch.full_like(ref, 2.0**-10 * magnitude(x, weight, bias)))
    else:
        assert_forward(out, x, weight, bias, "gelu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("M", ROWS)
@pytest.mark.parametrize(("K", "N"), MODELS)
@pytest.mark.usefixtures("poisoned_empty")
def test_bert_shapes_are_no_worse_than_eager(K: int, N: int, M: int, dtype: torch.dtype) -> None:
    for regime in ("unit", "trained"):
        x, weight, bias = vars(inputs(regime, M, N, K, dtype)).values()
        out = linear_act(x, weight, bias, "gelu")
        assert_forward(out, x, weight, bias, "gelu", regime)
        ref = act64(linear64(x, weight, bias), "gelu")
        # Why fp16 is allowed more: docs/design/error.md.
        allowed = accumulation_bound(x, weight, bias) if dtype == torch.float16 else 0.0
        assert_no_worse_than_eager(out, eager(x, weight, bias, "gelu"), ref, accumulation=allowed, what=regime)


@every_dtype
@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "none"])
@pytest.mark.usefixtures("poisoned_empty")
def test_activation_and_derivative_are_within_the_bound_over_a_sweep(activation: str, dtype: torch.dtype) -> None:
    """The GPU's own exponential, division and erf, which the interpreter does not have."""
    z = torch.linspace(-10, 10, 20_001 if HAS_GPU else 501, device=DEVICE).to(dtype)[None]
    out = torch.empty_like(z)
    act_fwd(z.numel(), activation)(z, out)
    ref = act64(z, activation)
    assert_within(out, ref, rounding_bound(ref, dtype, activation) + 2.0**-22 * 10)

    saved = out if activation in GRAD_FROM_OUTPUT else z
    d_preact, _ = act_bwd(torch.ones_like(z), saved, activation=activation, bias_grad=False)
    ref = 1 - saved.double() ** 2 if activation == "tanh" else act_grad64(saved, activation)
    assert_within(d_preact, ref, rounding_bound(ref, dtype) + 1e-5)


@every_dtype
@pytest.mark.usefixtures("poisoned_empty")
def test_gelu_passes_infinity_and_nan_on(dtype: torch.dtype) -> None:
    x = torch.zeros(4, 16, dtype=dtype, device=DEVICE)
    weight = torch.zeros(16, 16, dtype=dtype, device=DEVICE)
    x[:, 0] = torch.tensor([float("inf"), float("nan"), 1.0, 3e4], dtype=dtype)
    weight[:, 0] = 1
    for M in (4, 300, 2048) if HAS_GPU else (4,):  # each another configuration
        rows = x.repeat(M // 4, 1)
        out = linear_act(rows, weight, None, "gelu").view(-1, 4, 16)
        assert (out[:, 0] == float("inf")).all()
        assert out[:, 1].isnan().all()
        assert out[:, 2:].isfinite().all()

    values = [float("nan"), 1.0, -1.0] + ([float("inf")] if dtype != torch.float32 else [])
    saved = torch.tensor(values, dtype=dtype, device=DEVICE)[:, None].repeat(1, 16)
    d_preact, d_bias = act_bwd(torch.ones_like(saved), saved, activation="gelu", bias_grad=True)
    assert d_preact[0].isnan().all()
    assert d_preact[1:].isfinite().all()
    assert d_bias is not None
    assert d_bias.isnan().all()
    if dtype != torch.float32:  # erf's derivative is 0 * inf there, in torch too
        assert (d_preact[3] == 1).all()


@needs_gpu
@pytest.mark.usefixtures("poisoned_empty")
def test_forward_of_more_than_2_to_the_31_elements_is_exact() -> None:
    """Offsets of 64 bits, in the pointer kernel and in the configuration of the table."""
    N, K = 4096, 64
    M = 2**31 // N + 300
    if torch.cuda.mem_get_info(DEVICE)[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free GPU memory")
    data = inputs("integers", M, N, K, torch.bfloat16)
    expected = linear64(data.x[-512:], data.weight, data.bias)
    for config in (None, Config("pointer", "bfloat16", 64, 64, 64, 4, 3)):
        out, _ = linear_act_fwd(data.x, data.weight, data.bias, activation="none", save_preact=False, config=config)
        assert torch.equal(out[-512:].double(), expected)


GRADIENT_CASES = [(activation, torch.bfloat16) for activation in ACTIVATIONS]
GRADIENT_CASES += [(activation, dtype) for activation in ("gelu", "tanh") for dtype in (torch.float16, torch.float32)]


@pytest.mark.parametrize(
    ("activation", "dtype"), GRADIENT_CASES, ids=lambda v: v if isinstance(v, str) else dtype_name(v)
)
@pytest.mark.usefixtures("poisoned_empty")
def test_gradients_are_no_worse_than_eagers(activation: str, dtype: torch.dtype) -> None:
    data = inputs("unit", 200, 256, 192, dtype)
    d_out = torch.randn(200, 256, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    ours = gradients(linear_act, data, activation, d_out)
    theirs = gradients(eager, data, activation, d_out)
    double = Inputs(data.x.double(), data.weight.double(), data.bias.double())
    truth = gradients(lambda x, w, b, a: act64(linear64(x, w, b), a), double, activation, d_out.double())
    for name, mine, other, ref in zip(("x", "weight", "bias"), ours, theirs, truth, strict=True):
        assert_grad(mine, other, ref, f"gradient of {name}")
