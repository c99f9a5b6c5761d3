"""The suite models: Hugging Face's encoders with random weights, from token ids to hidden states and pooled output, or
with a classification head to logits."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import bert_fused
from benchmarks.cases import GATED, Case
from benchmarks.compilers import COMPILERS
from benchmarks.linear import columns, torch_dtype
from benchmarks.measure import Implementation, Inputs, Problem, each, graphed
from bert_fused.reference import rms_error
from bert_fused.unpad.encoder import REQUEST, Request

LAYERS_AND_HEADS = {"BERT-base": (12, 12), "BERT-large": (24, 16), "MiniLM": (6, 12)}
LAYERS_AND_HEADS |= {"reveal": (1, 4), "ModernBERT-base": (22, 12), "ModernBERT-large": (28, 16)}
SETS = 4
# The standard deviation of the logarithm of a ragged batch's lengths.
RAGGED_SIGMA = 0.7

# The rounding errors of a whole model are chaotic: one element may be worse than eager's, their RMS may not.
RMS_RATIO = 1.05

Runner = Callable[[Tensor, Tensor | None], tuple[Tensor, ...]]


class Outputs(nn.Module):
    """Return a model's hidden states and, where it has a pooler, the pooled output.

    Without a mask it calls the model's parts one by one: while a CUDA graph is captured, transformers 5.17 makes a mask
    of ones if there is none, and attention with a mask has slower kernels. request: passed to a fused encoder, since
    the hooks that pass it do not run then.
    """

    def __init__(self, model: nn.Module, request: Request | None = None) -> None:
        super().__init__()
        self.model = model
        self.request = {REQUEST: request} if request is not None else {}

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        model: Any = self.model
        if not hasattr(model, "pooler"):
            return (model(ids, attention_mask=mask).last_hidden_state,)
        if mask is not None:
            outputs = model(ids, attention_mask=mask)
            return outputs.last_hidden_state, outputs.pooler_output
        hidden = model.encoder(model.embeddings(input_ids=ids), **self.request)[0]
        return hidden, model.pooler(hidden)


class Logits(nn.Module):
    """Return the logits of a model with a head, whose batches always have a mask."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor]:
        return (self.model(ids, attention_mask=mask).logits,)


def eager(model: nn.Module) -> Runner:
    return Outputs(model)


def ours(model: nn.Module) -> Runner:
    return Outputs(fused_copy(model))


def pooled(model: nn.Module) -> Runner:
    """Return a runner whose hidden states are ``[B, 1, H]``, for a caller that reads position 0 only."""
    return Outputs(fused_copy(model, unpad=True, cls_only=True), Request(None, needs_first=True, only_first=True))


def fused_copy(model: nn.Module, **options: Any) -> nn.Module:
    """Return a fused copy on the same weights: its own would be out of a CPU's cache when eager's are in it."""
    model = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    bert_fused.fuse(model, **options)
    return model


Builders = dict[str, Callable[[nn.Module], Runner]]
# Each function makes a runner of a model. The ratio of "eager" and "eager again" is the noise floor.
BUILDERS: Builders = {
    "ours": ours,
    "ours unpadded": lambda model: Outputs(fused_copy(model, unpad=True)),
    "ours unpadded, position 0 only": pooled,
    "eager": eager,
    "eager again": eager,
}
CLASSIFIERS: Builders = {
    "ours": lambda model: Logits(fused_copy(model)),
    "ours, position 0 only": lambda model: Logits(fused_copy(model, cls_only="auto")),
    "ours unpadded": lambda model: Logits(fused_copy(model, unpad=True)),
    "ours unpadded, position 0 only": lambda model: Logits(fused_copy(model, unpad=True, cls_only="auto")),
    "eager": Logits,
    "eager again": Logits,
}
# The names in both dictionaries whose implementations leave padding out.
PACKED = ("ours unpadded", "ours unpadded, position 0 only")
# Only on a GPU.
COMPILED: Builders = {
    "torch.compile": lambda model: torch.compile(Outputs(model), dynamic=False),
    "ours and torch.compile": lambda model: torch.compile(Outputs(fused_copy(model)), dynamic=False),
}
COMPILED_CLASSIFIERS: Builders = {"torch.compile": lambda model: torch.compile(Logits(model), dynamic=False)}
GRAPHED: Builders = {"eager in a CUDA graph": eager, "ours in a CUDA graph": ours}
TUNED: Builders = {
    "max-autotune": lambda model: torch.compile(Outputs(model), dynamic=False, mode="max-autotune"),
}


def problem(case: Case, device: str) -> Problem:
    model = make_model(case, device)
    sets = make_inputs(case, device)
    run = Logits if case.head else eager
    gated = case.model in GATED
    reference = functools.cache(lambda: _reference(run, model, sets[0]))

    def check(rival: Implementation, function: Runner, inputs: Inputs) -> dict[str, float]:
        errors = _compare(function(*inputs), inputs[1], *reference())
        if not case.head and not gated:
            errors["activation_rms_ratio"] = check_function(rival.name, case.dtype, device)
        return errors

    found = [
        Implementation(name, each(build(model)), packs=case.ragged and name in PACKED)
        for name, build in (CLASSIFIERS if case.head else BUILDERS).items()
        if not (gated and name in PACKED)  # ModernBERT's encoder cannot run on packed rows
    ]
    if case.rivals == "compilers":
        wrap = Logits if case.head else Outputs
        found += [Implementation(name, each(compiler(wrap(model)))) for name, compiler in COMPILERS.items()]
    if device == "cuda" and case.head:
        found += [Implementation(name, each(build(model))) for name, build in COMPILED_CLASSIFIERS.items()]
    elif device == "cuda":
        found += [Implementation(name, graphed(build(model), 2), graphs=True) for name, build in GRAPHED.items()]
        if case.rivals == "max-autotune":
            found += [Implementation(name, each(build(model)), graphs=True) for name, build in TUNED.items()]
        else:
            found += [Implementation(name, each(build(model))) for name, build in COMPILED.items()]
    lengths = [float(mask.sum()) if mask is not None else float(ids.numel()) for ids, mask in sets]
    tokens = sum(lengths) / len(lengths)
    layers = model.layers if gated else model.base_model.encoder
    weights = sum(parameter.numel() for parameter in layers.parameters())
    return Problem(
        found,
        sets,
        check,
        flops=2.0 * tokens * weights,
        bytes=float(weights * torch_dtype(case).itemsize),
        # Many short calls: the first of a sample finds the caches as another implementation left them.
        min_calls=8 if device == "cpu" and case.M <= 256 else 1,
        fill=tokens / case.M,
    )


def make_model(case: Case, device: str) -> Any:
    import transformers

    layers, heads = LAYERS_AND_HEADS[case.model]
    sizes = {"hidden_size": case.K, "num_hidden_layers": layers, "num_attention_heads": heads}
    if case.model in GATED:
        kind = transformers.ModernBertModel
        config = transformers.ModernBertConfig(**sizes, intermediate_size=columns(case))
    else:
        kind = transformers.BertForSequenceClassification if case.head else transformers.BertModel
        config = transformers.BertConfig(**sizes, intermediate_size=case.N)
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        return kind(config).eval().requires_grad_(False).to(torch_dtype(case))


def make_inputs(case: Case, device: str) -> list[Inputs]:
    """Return sets of token ids and mask. Without padding the mask is None, so that eager's attention is fastest."""
    assert case.batch is not None
    assert case.sequence is not None
    g = torch.Generator().manual_seed(0)
    sets: list[Inputs] = []
    for _ in range(SETS if device == "cuda" else 1):
        ids = torch.randint(1000, 30000, (case.batch, case.sequence), generator=g)
        mask = None
        if case.ragged:
            share = case.median * (RAGGED_SIGMA * torch.randn(case.batch, generator=g)).exp()
            lengths = (share * case.sequence).round().clamp(2, case.sequence)
            lengths[0] = case.sequence
            mask = (torch.arange(case.sequence) < lengths[:, None]).long()
            ids, mask = (ids * mask).to(device), mask.to(device)
        sets.append((ids.to(device), mask))
    return sets


def _reference(
    run: Callable[[nn.Module], Runner], model: Any, inputs: Inputs
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return the model's outputs in fp64, and eager's."""
    return run(copy.deepcopy(model).double())(*inputs), run(model)(*inputs)


def _compare(
    results: tuple[Tensor, ...],
    mask: Tensor | None,
    exact: tuple[Tensor, ...],
    of_eager: tuple[Tensor, ...],
) -> dict[str, float]:
    """Return RMS errors at real tokens; raises ValueError if one exceeds eager's."""
    errors = {}
    names = ("hidden", "pooled")[: len(results)] if results[0].dim() == 3 else ("logits",)
    for name, result, truth, bar in zip(names, results, exact, of_eager, strict=True):
        real = mask.bool() if mask is not None and name == "hidden" else ...
        if name == "hidden" and result.shape != truth.shape:  # position 0 only
            real, truth, bar = ..., truth[:, :1], bar[:, :1]
        mine, eagers = (rms_error(of[real], truth[real]) for of in (result, bar))
        errors |= {f"{name}_rms": mine, f"eager_{name}_rms": eagers}
        # fp32 errors are small enough for a different order of the same sums to make a difference.
        if not mine <= max(RMS_RATIO * eagers, 1e-6):
            raise ValueError(f"wrong result: RMS error of the {name} output {mine:.3g}, eager's {eagers:.3g}")
    return errors


@functools.cache
def check_function(name: str, dtype: str, device: str) -> float:
    """Return RMS error over eager's on one layer that reveals its activation; raises ValueError if that is not GELU.

    In a random model rounding hides the difference of erf and tanh GELU. Here the layer's intermediate values are
    spread over GELU's negative tail and magnified a hundredfold on their way to the output.
    """
    hidden = 64
    case = Case("models", "reveal", dtype, "gelu", 64, 4 * hidden, hidden, 4, 16)
    model = make_model(case, device)
    layer = model.encoder.layer[0]
    layer.intermediate.dense.weight.zero_()
    layer.intermediate.dense.bias.copy_(torch.linspace(-4, -2, 4 * hidden))
    layer.output.dense.weight.copy_(100 * torch.eye(hidden).repeat_interleave(4, 1) / 4)
    (inputs, *_) = make_inputs(case, device)
    on_cpu: Builders = {name: lambda model, make=make: make(Outputs(model)) for name, make in COMPILERS.items()}
    build = (BUILDERS | (on_cpu if device == "cpu" else COMPILED | GRAPHED | TUNED))[name]
    result, exact, of_eager = (
        run(*inputs)[0] for run in (build(model), eager(copy.deepcopy(model).double()), eager(model))
    )
    positions = result.shape[1]
    exact, of_eager = exact[:, :positions], of_eager[:, :positions]
    mine, bar = rms_error(result, exact), rms_error(of_eager, exact)
    if not mine <= max(RMS_RATIO * bar, 1e-6):
        raise ValueError(f"wrong result: not gelu, RMS error {mine:.3g} where it shows, eager's {bar:.3g}")
    return mine / bar
