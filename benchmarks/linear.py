"""The suites modules, pooler and training: one linear layer and its activation, ours and every rival's."""

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bert_fused
from benchmarks.cases import Case
from benchmarks.compilers import COMPILERS
from benchmarks.measure import Implementation, Inputs, Problem, each, graphed
from bert_fused import reference
from bert_fused.fallback import device_reason
from bert_fused.kernels.gated import gated_config, parse
from bert_fused.kernels.lookup import get_config
from bert_fused.reference import rms_error
from bert_fused.timing import MIN_CALLS, Call, buffer_count
from bert_fused.tune import accuracy
from bert_fused.tune.accuracy import rows_of

# A gradient of ours, in RMS against fp64, may be this many times eager's: docs/design/error.md.
GRADIENT_RATIO = 1.05


def torch_dtype(case: Case) -> torch.dtype:
    return torch.float32 if case.dtype == "tf32" else getattr(torch, case.dtype)


def problem(case: Case, device: str) -> Problem:
    products = 3 if case.suite == "training" else 1  # forward, d_x and d_weight
    elements = case.M * case.K + case.N * case.K + case.M * columns(case)
    return Problem(
        implementations=rivals(case, device),
        sets=make_inputs(case, device),
        check=functools.partial(check_gradients if case.suite == "training" else check, case),
        flops=2.0 * products * case.M * case.N * case.K,
        bytes=float(products * torch_dtype(case).itemsize * elements),
        min_calls=min_calls(device),
    )


def columns(case: Case) -> int:
    """Return the width of the result."""
    return case.N // 2 if parse(case.activation)[1] else case.N


def min_calls(device: str) -> int:
    """Return the fewest calls in a sample. Few on a CPU: most samples then fit between the turns of other processes."""
    return MIN_CALLS if device == "cuda" else 4


def make_inputs(case: Case, device: str) -> list[Inputs]:
    """Return sets of x, weight, bias and, for training, the output's gradient: random, weights of BERT's scale."""
    dtype = torch_dtype(case)
    g = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        values = scale * torch.randn(shape, device=device, generator=g)
        # TF32 represents bfloat16 numbers exactly, so its products are exact and fp32's bound can judge them.
        return (values.bfloat16() if case.dtype == "tf32" else values).to(dtype)

    cache = torch.cuda.get_device_properties(device).L2_cache_size if device == "cuda" else 0
    shape = (case.M, case.sequence, case.K) if case.suite == "pooler" and case.sequence else (case.M, case.K)
    sets: list[Inputs] = []
    for _ in range(buffer_count((case.M + case.N) * case.K * dtype.itemsize, cache)):
        x, weight, bias = normal(*shape), normal(case.N, case.K, scale=0.02), normal(case.N, scale=0.02)
        if case.suite == "training":
            inputs = tuple(tensor.requires_grad_() for tensor in (x, weight, bias))
            sets.append((*inputs, normal(case.M, columns(case))))
        else:
            sets.append((x, weight, bias))
    return sets


def rivals(case: Case, device: str) -> list[Implementation]:
    """Return the rivals, functions of x, weight and bias. The ratio of "eager" and "eager again" is the noise floor."""
    activation = case.activation

    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reference.linear_act(rows_of(x), weight, bias, activation)

    def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(rows_of(x), weight, bias)

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        public = bert_fused.cls_pool if case.suite == "pooler" else bert_fused.linear_act
        return public(x, weight, bias, activation)

    training, cuda = case.suite == "training", device == "cuda"
    run = with_backward if training else lambda function: function
    found = [
        Implementation("ours", each(run(ours)), _choice(case, device)),
        Implementation("eager", each(run(eager))),
        Implementation("eager again", each(run(eager))),
    ]
    if columns(case) == case.N or not training:  # else its result is wider than the gradient
        found.append(Implementation("F.linear", each(run(linear)), computes="none"))
    found += _liger(activation, run) if cuda else []
    if case.rivals == "compilers" and not training:
        found += [Implementation(name, _layers(compiler, activation)) for name, compiler in COMPILERS.items()]
    if cuda:
        found.append(Implementation("torch.compile", each(run(torch.compile(eager, dynamic=False)))))
    if cuda and case.rivals == "max-autotune":
        tuned = torch.compile(eager, dynamic=False, mode="max-autotune")
        found.append(Implementation("max-autotune", _one_static_set(tuned), graphs=True))
        ungraphed = torch.compile(eager, dynamic=False, mode="max-autotune-no-cudagraphs")
        found.append(Implementation("max-autotune without graphs", each(ungraphed)))
    if cuda and not training:
        found.append(Implementation("eager in a CUDA graph", graphed(eager), graphs=True))
        found.append(Implementation("ours in a CUDA graph", graphed(ours), graphs=True))
        found += _addmm_activation(activation) + _quack(activation)
    return found


def with_backward(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """Return a function of x, weight, bias and d_out, which returns the output, d_x, d_weight and d_bias."""

    def call(x: Tensor, weight: Tensor, bias: Tensor, d_out: Tensor) -> tuple[Tensor, ...]:
        out = function(x, weight, bias)
        return out, *torch.autograd.grad(out, (x, weight, bias), d_out)

    return call


def _choice(case: Case, device: str) -> str:
    """Describe the path that ours takes."""
    reason = device_reason(torch.device(device), torch_dtype(case))
    if reason is not None:
        return f"PyTorch ({reason})"
    # Imported here, since they import Triton, which a rehearsal on a CPU can do without.
    from bert_fused.kernels.runtime import arch_of, name_of

    where = torch.device(device)
    arch = arch_of(where)
    config = get_config(case.M, case.N, case.K, case.dtype, arch, aligned=True, device=name_of(where))
    return str(config if columns(case) == case.N else gated_config(config, case.M, columns(case), arch))


def _liger(activation: str, run: Callable[..., Any]) -> list[Implementation]:
    """Return Liger's product of the halves, in one pass after the linear layer, if it is installed.

    Its GELU is the tanh form.
    """
    name, half = parse(activation)
    function = {"gelu": "LigerGELUMulFunction", "silu": "LigerSiLUMulFunction"}.get(name)
    if half != "first" or function is None or importlib.util.find_spec("liger_kernel") is None:
        return []

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        home = importlib.import_module("liger_kernel.ops." + ("geglu" if name == "gelu" else "swiglu"))
        a, b = F.linear(rows_of(x), weight, bias).chunk(2, dim=-1)
        return getattr(home, function).apply(a.contiguous(), b.contiguous())

    return [Implementation("Liger", each(run(call)), computes="gelu_tanh(a)*b" if name == "gelu" else None)]


def _addmm_activation(activation: str) -> list[Implementation]:
    """Return cuBLASLt's epilogue, whose GELU is the tanh form, not BERT's."""
    if activation not in ("gelu", "gelu_tanh", "relu"):
        return []

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch._addmm_activation(bias, rows_of(x), weight.t(), use_gelu=activation != "relu")

    return [Implementation("_addmm_activation", each(call), computes="gelu_tanh" if activation == "gelu" else None)]


def _quack(activation: str) -> list[Implementation]:
    """Return QuACK's fused matrix product if it is installed and the GPU is Hopper or newer."""
    name = {"gelu": "gelu_erf", "gelu_tanh": "gelu_tanh_approx", "relu": "relu", "tanh": "tanh"}.get(activation)
    hopper = torch.cuda.get_device_capability() >= (9, 0)
    if name is None or not hopper or importlib.util.find_spec("quack") is None:
        return []

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        from quack.gemm_interface import gemm_act

        return gemm_act(rows_of(x), weight.t(), bias=bias, activation=name, store_preact=False)[1]

    return [Implementation("QuACK", each(call))]


class _Layer(nn.Module):
    """Rows of x to the activation of a linear layer, whose weights a compiler may take for constants."""

    def __init__(self, weight: Tensor, bias: Tensor, activation: str) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return reference.linear_act(rows_of(x), self.weight, self.bias, self.activation)


def _layers(compiler: Callable[[nn.Module], Callable[..., Any]], activation: str) -> Callable[..., list[Call]]:
    """Return the calls of a compiled layer for each set's weights."""
    return lambda sets: [functools.partial(compiler(_Layer(w, b, activation)), x) for x, w, b in sets]


def _one_static_set(function: Callable[..., Any]) -> Callable[[Sequence[Inputs]], list[Call]]:
    """Return calls that all take the first set of inputs, at fixed addresses.

    Otherwise the compiler would copy its CUDA graphs' inputs, and record another graph for each set of weights.
    """

    def calls(sets: Sequence[Inputs]) -> list[Call]:
        for tensor in sets[0]:
            torch._dynamo.mark_static_address(tensor, guard=False)
        return [functools.partial(function, *sets[0])] * len(sets)

    return calls


def check(case: Case, rival: Implementation, function: Callable[..., Tensor], inputs: Inputs) -> dict[str, float]:
    return accuracy.check(function, rival.computes or case.activation, *inputs)


def check_gradients(
    case: Case, rival: Implementation, function: Callable[..., tuple[Tensor, ...]], inputs: Inputs
) -> dict[str, float]:
    """Check the output as ``check`` does, and each gradient's RMS error against eager's."""
    activation = rival.computes or case.activation
    x, weight, bias, d_out = inputs

    def forward(*inputs: Tensor) -> Tensor:
        return function(*(tensor.detach().requires_grad_() for tensor in inputs), d_out)[0].detach()

    errors = accuracy.check(forward, activation, x.detach(), weight.detach(), bias.detach())
    eager = with_backward(lambda x, weight, bias: reference.linear_act(x, weight, bias, activation))
    exact = eager(*(tensor.detach().double().requires_grad_(i < 3) for i, tensor in enumerate(inputs)))
    results, of_eager = function(*inputs), eager(*inputs)
    for name, index in (("d_x", 1), ("d_weight", 2), ("d_bias", 3)):
        errors[f"{name}_rms"], bar = (rms_error(of[index], exact[index]) for of in (results, of_eager))
        # fp32 errors are small enough for a different order of the same sums to make a difference.
        floor = 1e-6 * exact[index].square().mean().sqrt().item()
        if not errors[f"{name}_rms"] <= max(GRADIENT_RATIO * bar, floor):
            raise ValueError(f"wrong result: RMS error of {name} {errors[f'{name}_rms']:.3g}, eager's {bar:.3g}")
    return errors
