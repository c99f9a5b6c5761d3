"""Every guard: what makes a fused module step aside, and what must not. Against Hugging Face's own module each time.

Each test also says which path ran, kernels or PyTorch, so that a guard that is gone is seen where the two happen to
agree. What a *kept* call has to look out for besides is in test_launch.py, input checks are in test_ops.py.

=====================================  ==============================================================================
forward, pre- and backward hooks       test_a_changed_part, test_a_global_hook, test_hooks_on_the_block_itself_are_kept
forward replaced                       test_a_changed_part (instance), test_forward_replaced_on_a_class
accelerate                             test_a_changed_part (_hf_hook), test_accelerate_offload
parametrize, weight_norm, prune        test_a_changed_part
PEFT LoRA                              test_real_lora
tensor-subclass weights                test_a_changed_part (our own), test_quantised (torchao)
quantised Linear                       test_a_changed_part (our own), test_quantised (torch.ao)
weights on another device              test_weights_on_another_device, test_a_model_on_meta
weights changed, tied, cast, loaded    test_weights_changed_after_the_first_call, test_tied_weights, test_half_and_to,
                                       test_load_state_dict
activation changed after fusing        test_an_activation_set_after_fusing, test_an_activation_whose_insides_...
forward AD, function transforms        test_forward_mode_differentiation, test_function_transforms_of_a_module
TorchDispatchMode, torch.fx            test_a_dispatch_mode_sees_every_operation, test_symbolic_tracing
replicas of DataParallel               test_replicas_of_data_parallel
memory that runs out                   test_memory_that_runs_out
threads                                test_threads_fuse_unfuse_and_call_at_once, test_a_call_that_was_unfused_meanwhile
=====================================  ==============================================================================
"""

import copy
import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import SIZES, assert_same, blocks, inputs, make
from torch import Tensor, nn
from torch.nn.parallel import replicate
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel, DistilBertConfig, ViTConfig
from transformers.activations import ACT2FN, GELUActivation
from transformers.models.bert.modeling_bert import BertIntermediate, BertPooler
from transformers.models.distilbert.modeling_distilbert import FFN
from transformers.models.vit.modeling_vit import ViTMLP

from bert_fused import FusedBertIntermediate, FusedBertPooler, fuse, unfuse
from bert_fused.hf.checks import activation_name

KERNELS = ["linear_act_fwd", "act_bwd"]
PYTORCH: list[str] = []

# Of BERT, of ViT and of DistilBERT, whose method is not its forward.
KINDS = ("intermediate", "pooler", "mlp", "ffn")
every_kind = pytest.mark.parametrize("kind", KINDS)
when_fused = pytest.mark.parametrize("when", ["before", "after"])


def twins(kind: str) -> tuple[nn.Module, nn.Module]:
    """Two equal blocks of Hugging Face's: the one to be fused, and the one that says what is right."""
    if kind in ("mlp", "ffn"):
        torch.manual_seed(0)
        settings = DistilBertConfig(dim=32, hidden_dim=37, dropout=0.0, n_heads=4)
        block = FFN(settings) if kind == "ffn" else ViTMLP(ViTConfig(hidden_size=32, intermediate_size=37))
        return block, copy.deepcopy(block)
    ours, theirs = make(), make()
    return (ours.pooler, theirs.pooler) if kind == "pooler" else (blocks(ours)[0], blocks(theirs)[0])


def hidden_states(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1)).to(dtype)


def act_of(block: nn.Module) -> str:
    return next(name for name in ("activation", "intermediate_act_fn", "activation_fn") if hasattr(block, name))


def linear_name(block: nn.Module) -> str:
    return next(name for name in ("dense", "fc1", "lin1") if hasattr(block, name))


def linear(block: nn.Module) -> nn.Linear:
    return getattr(block, linear_name(block))


def step(block: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    """The output and every gradient of one step."""
    block.zero_grad()
    leaf = x.clone().requires_grad_()
    out = block(leaf)
    out.backward(torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype))
    gradients = {name: p.grad for name, p in block.named_parameters()}
    return {"out": out.detach(), "hidden_states": leaf.grad} | gradients


def assert_runs(
    path: list[str], ours: nn.Module, theirs: nn.Module, launches: list[str], x: Tensor | None = None
) -> None:
    """One step of ``ours`` launches the kernels of ``path`` and gives what ``theirs`` gives."""
    x = hidden_states() if x is None else x
    expected = step(theirs, x)
    launches.clear()
    found = step(ours, x)
    assert launches == path
    assert found.keys() == expected.keys()
    tolerance = 2e-3 if x.dtype == torch.float16 else 0.02 if x.dtype == torch.bfloat16 else 2e-5
    for name, other in expected.items():
        mine = found[name]
        assert (mine is None) == (other is None), name
        if mine is not None and other is not None:
            assert mine.dtype == other.dtype
            assert float((mine - other).abs().max()) <= tolerance * max(1.0, float(other.abs().max())), name


# ---------------------------------------------------------------------------------------------------- parts that change


class Adapter(nn.Module):
    """What PEFT puts in the place of a Linear: the base layer's weight is visible, but is not all that is computed."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.update = nn.Linear(base.in_features, base.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.update(x)


class QuantisedLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.round(decimals=1), self.bias)


class Rounded(Tensor):
    """Its memory holds other numbers than a linear layer gets to see."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            args = tuple(t.as_subclass(Tensor).round(decimals=1) if isinstance(t, cls) else t for t in args)
        return super().__torch_function__(func, types, args, kwargs or {})


def doubled(*arguments: Any) -> Tensor:
    """A forward hook's or pre-hook's result: its last argument, doubled."""
    value = arguments[-1][0] if isinstance(arguments[-1], tuple) else arguments[-1]
    return value * 2


def replace_dense(block: nn.Module, dense: nn.Module) -> None:
    setattr(block, linear_name(block), dense)


def quantise(block: nn.Module) -> None:
    layer = QuantisedLinear(linear(block).in_features, linear(block).out_features)
    layer.load_state_dict(linear(block).state_dict())
    setattr(block, linear_name(block), layer)


def round_parameter(name: str) -> Callable[[nn.Module], None]:
    def apply(block: nn.Module) -> None:
        parameter = nn.Parameter(getattr(linear(block), name).detach().as_subclass(Rounded))
        assert type(parameter) is Rounded
        setattr(linear(block), name, parameter)

    return apply


def patch_forward(module: nn.Module) -> None:
    original = module.forward
    module.forward = lambda *a: original(*a) * 2


def accelerate_hook(block: nn.Module) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Doubling(ModelHook):
        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return output * 2

    add_hook_to_module(linear(block), Doubling())


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def act(block: nn.Module) -> nn.Module:
    return getattr(block, act_of(block))


# Name -> what is done to a block, and what the report says of it.
CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "forward hook": (lambda b: linear(b).register_forward_hook(doubled), "layer has hooks"),
    "forward pre-hook": (lambda b: linear(b).register_forward_pre_hook(doubled), "layer has hooks"),
    "backward hook": (lambda b: linear(b).register_full_backward_hook(lambda m, i, o: (i[0] * 2,)), "has hooks"),
    "backward pre-hook": (lambda b: linear(b).register_full_backward_pre_hook(lambda m, o: (o[0] * 2,)), "has hooks"),
    "patched forward": (lambda b: patch_forward(linear(b)), "a forward of its own"),
    "accelerate hook": (accelerate_hook, "a forward of its own"),
    # Accelerate hooks a GraphModule by its class, so that only this attribute tells.
    "_hf_hook": (lambda b: setattr(linear(b), "_hf_hook", object()), "a forward of its own"),
    "adapter": (lambda b: replace_dense(b, Adapter(linear(b))), "Adapter, not a plain nn.Linear"),
    "quantised": (quantise, "QuantisedLinear, not a plain nn.Linear"),
    "weight subclass": (round_parameter("weight"), "Rounded is a tensor subclass"),
    "bias subclass": (round_parameter("bias"), "Rounded is a tensor subclass"),
    "parametrize": (lambda b: parametrize.register_parametrization(linear(b), "weight", Halved()), "not a plain"),
    "weight norm": (lambda b: parametrizations.weight_norm(linear(b)), "not a plain nn.Linear"),
    "weight norm of old": (lambda b: weight_norm(linear(b)), "layer has hooks"),
    "prune": (lambda b: prune.l1_unstructured(linear(b), "weight", 0.5), "layer has hooks"),
    "activation": (lambda b: setattr(b, act_of(b), nn.Softplus()), "Softplus, has no kernel"),
    "activation hook": (lambda b: act(b).register_forward_hook(doubled), "has no kernel"),
    "activation pre-hook": (lambda b: act(b).register_forward_pre_hook(doubled), "has no kernel"),
    "activation backward hook": (
        lambda b: act(b).register_full_backward_hook(lambda m, i, o: (i[0] * 2,)),
        "has no kernel",
    ),
    "patched activation": (lambda b: patch_forward(act(b)), "has no kernel"),
    "patched block": (patch_forward, "its forward was replaced on the instance"),
}
CHANGES_NOTHING = ("_hf_hook", "weight norm", "weight norm of old")


@pytest.mark.parametrize("change", CHANGES)
@when_fused
@every_kind
def test_a_changed_part(kind: str, when: str, change: str, launches: list[str]) -> None:
    apply, reason = CHANGES[change]
    ours, theirs = twins(kind)
    untouched = step(theirs, hidden_states())
    if when == "after":
        assert fuse(ours).fused == ("",)
    for block in (ours, theirs):
        torch.manual_seed(2)
        apply(block)
    report = fuse(ours)
    assert reason in report.skipped[""]
    assert report.fused == ()
    # A forward that is put around the fused one calls it.
    assert_runs(KERNELS if (change, when) == ("patched block", "after") else PYTORCH, ours, theirs, launches)
    if change not in CHANGES_NOTHING:
        changed = step(theirs, hidden_states())
        same = all(torch.equal(changed[name], untouched[name]) for name in ("out", "hidden_states"))
        assert not same, "the change under test changes nothing"


@every_kind
def test_a_plain_block_and_a_hook_that_is_gone_again(kind: str, launches: list[str]) -> None:
    ours, theirs = twins(kind)
    fuse(ours)
    assert_runs(KERNELS, ours, theirs, launches)
    handles = [linear(block).register_forward_hook(doubled) for block in (ours, theirs)]
    assert_runs(PYTORCH, ours, theirs, launches)
    for handle in handles:
        handle.remove()
    assert_runs(KERNELS, ours, theirs, launches)


@every_kind
def test_hooks_on_the_block_itself_are_kept(kind: str, launches: list[str]) -> None:
    ours, theirs = twins(kind)
    fuse(ours)
    for block in (ours, theirs):
        block.register_forward_hook(doubled)
        block.register_forward_pre_hook(doubled)
        block.register_full_backward_hook(lambda m, i, o: (i[0] * 2,))
    assert_runs(KERNELS, ours, theirs, launches)
    assert fuse(ours).fused == ("",)


GLOBAL_HOOKS = {
    "forward": lambda kind: lambda m, i, o: o * 2 if type(m) is kind else None,
    "forward_pre": lambda kind: lambda m, i: (i[0] * 2,) if type(m) is kind else None,
    "full_backward": lambda kind: lambda m, i, o: (i[0] * 2,) if type(m) is kind else None,
    "full_backward_pre": lambda kind: lambda m, o: (o[0] * 2,) if type(m) is kind else None,
}


@pytest.mark.parametrize("which", GLOBAL_HOOKS)
@pytest.mark.parametrize("part", ["linear", "activation"])
@every_kind
def test_a_global_hook(kind: str, part: str, which: str, launches: list[str]) -> None:
    ours, theirs = twins(kind)
    fuse(ours)
    hook = GLOBAL_HOOKS[which](nn.Linear if part == "linear" else type(act(theirs)))
    handle = getattr(nn.modules.module, f"register_module_{which}_hook")(hook)
    try:
        assert "hooks" in fuse(ours).skipped[""]
        assert_runs(PYTORCH, ours, theirs, launches)
    finally:
        handle.remove()
    assert_runs(KERNELS, ours, theirs, launches)


@pytest.mark.parametrize(
    ("kind", "patched"),
    [
        ("intermediate", nn.Linear),
        ("intermediate", BertIntermediate),
        ("intermediate", GELUActivation),
        ("pooler", nn.Linear),
        ("pooler", BertPooler),
        ("pooler", nn.Tanh),
        ("mlp", nn.Linear),
        ("mlp", ViTMLP),
        ("ffn", GELUActivation),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
@when_fused
def test_forward_replaced_on_a_class(
    when: str, kind: str, patched: type[nn.Module], launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = twins(kind)
    if when == "after":
        fuse(ours)
        assert_runs(KERNELS, ours, theirs, launches)  # what was found to be genuine is remembered
    original = patched.forward
    monkeypatch.setattr(patched, "forward", functools.wraps(original)(lambda *a: original(*a) * 2))
    assert "" in fuse(ours).skipped
    assert_runs(PYTORCH, ours, theirs, launches)


def test_a_bare_function_as_activation(launches: list[str]) -> None:
    ours, theirs = twins("pooler")
    for block in (ours, theirs):
        del block.activation
        block.activation = torch.tanh
    assert fuse(ours).fused == ("",)
    assert_runs(KERNELS, ours, theirs, launches)


def test_a_block_without_its_dense_layer() -> None:
    model = make()
    del model.pooler.dense
    report = fuse(model)
    assert "NoneType" in report.skipped["pooler"]
    assert len(report.fused) == 2


# ------------------------------------------------------------------------------------------ what others' libraries do


@pytest.mark.parametrize("targets", ["intermediate.dense", r".*(intermediate|pooler)\.dense"], ids=["one", "both"])
@when_fused
def test_real_lora(when: str, targets: str, launches: list[str]) -> None:
    import peft

    def adapted(model: BertModel) -> nn.Module:
        torch.manual_seed(3)
        chosen = targets if "*" in targets else [targets]
        settings = peft.LoraConfig(r=2, target_modules=chosen, init_lora_weights=False)
        return peft.get_peft_model(model, settings).eval()

    plain = make()(**inputs())
    theirs = adapted(make())
    expected = theirs(**inputs())
    assert float((expected[0] - plain[0]).detach().abs().max()) > 0.01
    model = make()
    if when == "after":
        fuse(model)
    ours = adapted(model)
    report = fuse(ours)
    left = 1 if targets == "intermediate.dense" else 0
    assert len(report.fused) == left
    assert len(report.skipped) == 3 - left
    assert all("peft" in reason for reason in report.skipped.values())
    launches.clear()
    out = ours(**inputs())
    assert_same(out, expected)
    assert launches == left * ["linear_act_fwd"]
    for m, result in ((ours, out), (theirs, expected)):
        (result[0].square().sum() + result[1].sum()).backward()
        assert any("lora" in name and p.grad is not None for name, p in m.named_parameters())
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")

    launches.clear()
    with ours.disable_adapter(), torch.no_grad():
        assert_same(ours(**inputs()), plain)
    assert launches == left * ["linear_act_fwd"]
    merged = ours.merge_and_unload()
    fuse(merged)
    launches.clear()
    assert_same(merged(**inputs()), expected, tolerance=1e-4)
    assert launches == 3 * ["linear_act_fwd"]


def quantise_by_torchao(block: nn.Module) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(block, Int8WeightOnlyConfig())


def quantise_by_torch(block: nn.Module) -> None:
    from torch.ao.quantization import quantize_dynamic

    quantize_dynamic(block, {nn.Linear}, dtype=torch.qint8, inplace=True)


@pytest.mark.filterwarnings("ignore")  # of what is deprecated in them, and of parts of torchao that want a GPU
@pytest.mark.parametrize(
    ("quantise", "reason"),
    [
        (quantise_by_torchao, "Int8Tensor is a tensor subclass"),
        (quantise_by_torch, "torch.ao.nn.quantized.dynamic.modules.linear.Linear, not a plain nn.Linear"),
    ],
    ids=["torchao int8 weights", "torch.ao dynamic int8"],
)
@when_fused
@every_kind
@torch.no_grad()
def test_quantised(
    kind: str, when: str, quantise: Callable[[nn.Module], None], reason: str, launches: list[str]
) -> None:
    ours, theirs = twins(kind)
    plain = theirs(hidden_states())
    if when == "after":
        fuse(ours)
    for block in (ours, theirs):
        quantise(block)
    assert reason in fuse(ours).skipped[""]
    expected = theirs(hidden_states())
    assert not torch.equal(expected, plain)
    assert torch.equal(ours(hidden_states()), expected)
    assert launches == PYTORCH


@when_fused
@torch.no_grad()
def test_accelerate_offload(when: str, launches: list[str]) -> None:
    """Between calls the weights are on the meta device."""
    import accelerate

    model = make()
    expected = model(**inputs())
    if when == "after":
        fuse(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    report = fuse(model)
    assert report.fused == ()
    assert len(report.skipped) == 3
    assert_same(model(**inputs()), expected)
    assert launches == PYTORCH


@every_kind
def test_replicas_of_data_parallel(kind: str, launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own ``replicate``, without a second device: a replica's weights are plain attributes."""
    code = replicate.__globals__
    monkeypatch.setitem(code, "_get_device_index", lambda device, optional: device)
    monkeypatch.setitem(
        code,
        "_broadcast_coalesced_reshape",
        lambda tensors, devices, detach: [[t * d for t in tensors] for d in devices],
    )
    ours, theirs = twins(kind)
    fuse(ours)
    x = hidden_states()
    results = []
    for block in (theirs, ours):
        launches.clear()
        block.zero_grad()
        replicas = replicate(block, [1, 2])
        outs = [replica(x) for replica in replicas]
        torch.stack(outs).square().sum().backward()
        results.append([*outs, *(p.grad for p in block.parameters())])
        assert all(replica.forward.__self__ is replica for replica in replicas)
        assert not linear(replicas[1])._parameters
    assert sorted(launches) == sorted(2 * KERNELS)
    for other, mine in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(results[0][0], results[0][1])


# -------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("name", ["weight", "bias"])
@every_kind
def test_weights_on_another_device(kind: str, name: str, launches: list[str]) -> None:
    """PyTorch returns memory that nobody wrote here."""
    ours, _ = twins(kind)
    fused = copy.deepcopy(ours)
    fuse(fused)
    for block in (ours, fused):
        setattr(linear(block), name, nn.Parameter(getattr(linear(block), name).to("meta")))
        assert "it is on the meta device" in fuse(block).skipped[""]
    with pytest.raises(ValueError, match=f"{name} is on meta, but x is on cpu"):
        fused(hidden_states())
    assert launches == PYTORCH


def test_a_model_on_meta(launches: list[str]) -> None:
    ids = torch.ones(1, 3, dtype=torch.long, device="meta")
    with torch.device("meta"):
        born = BertModel(BertConfig(**SIZES)).eval()
    assert "it is on the meta device" in fuse(born).skipped["pooler"]
    moved = make()
    fuse(moved)
    moved.to("meta")
    for model in (born, moved):
        out = model(input_ids=ids)
        assert out[0].shape == (1, 3, 32)
        assert out[0].is_meta
    assert launches == PYTORCH
    born.to_empty(device="cpu").load_state_dict(make().state_dict())
    for name, buffer in make().named_buffers():  # some are in no state_dict
        born.get_buffer(name).copy_(buffer)
    assert len(fuse(born).fused) == 3
    assert_same(born(**inputs()), make()(**inputs()))
    assert launches == 3 * ["linear_act_fwd"]


@every_kind
def test_weights_changed_after_the_first_call(kind: str, launches: list[str]) -> None:
    ours, theirs = twins(kind)
    fuse(ours)
    assert_runs(KERNELS, ours, theirs, launches)
    for block in (ours, theirs):
        linear(block).weight.data.mul_(2)
    assert_runs(KERNELS, ours, theirs, launches)
    for block in (ours, theirs):
        with torch.no_grad():
            linear(block).bias.add_(1)
    assert_runs(KERNELS, ours, theirs, launches)
    for block in (ours, theirs):
        linear(block).weight.data = linear(block).weight.data.flip(0)
    assert_runs(KERNELS, ours, theirs, launches)
    for block in (ours, theirs):
        linear(block).weight = nn.Parameter(linear(block).weight.detach().t().contiguous().t() / 3)
    assert_runs(KERNELS, ours, theirs, launches)
    for block in (ours, theirs):
        step(block, hidden_states())
        torch.optim.SGD(block.parameters(), lr=0.1).step()
    assert_runs(KERNELS, ours, theirs, launches)
    for block in (ours, theirs):
        linear(block).bias = None
    assert_runs(KERNELS, ours, theirs, launches)


def test_tied_weights(launches: list[str]) -> None:
    eager, model = make(), make()
    for m in (eager, model):
        m.encoder.layer[1].intermediate.dense.weight = m.encoder.layer[0].intermediate.dense.weight
    fuse(model)
    for _ in range(2):
        results = []
        for m in (eager, model):
            m.zero_grad()
            launches.clear()
            out = m(**inputs())
            out[0].square().sum().backward()
            results.append((out, m.encoder.layer[0].intermediate.dense.weight.grad))
        assert launches == [*3 * ["linear_act_fwd"], *2 * ["act_bwd"]]
        (theirs, expected), (ours, gradient) = results
        assert_same(ours, theirs)
        assert float((gradient - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
        for m in (eager, model):
            m.encoder.layer[0].intermediate.dense.weight.data.mul_(2)


@every_kind
def test_half_and_to(kind: str, launches: list[str]) -> None:
    ours, theirs = twins(kind)
    fuse(ours)
    casts: list[tuple[Callable[[nn.Module], nn.Module], list[str]]] = [
        (lambda m: m, KERNELS),
        (lambda m: m.half(), KERNELS),
        (lambda m: m.to(torch.bfloat16), KERNELS),
        (lambda m: m.double(), PYTORCH),
        (lambda m: m.float(), KERNELS),
    ]
    for cast, path in casts:
        for block in (ours, theirs):
            cast(block)
        assert_runs(path, ours, theirs, launches, hidden_states(linear(theirs).weight.dtype))


@pytest.mark.parametrize("assign", [False, True])
@every_kind
def test_load_state_dict(kind: str, assign: bool, launches: list[str]) -> None:
    ours, theirs = twins(kind)
    fuse(ours)
    assert_runs(KERNELS, ours, theirs, launches)
    other = {name: tensor.flip(0) * 2 for name, tensor in theirs.state_dict().items()}
    for block in (ours, theirs):
        block.load_state_dict(other, assign=assign)
    assert_runs(KERNELS, ours, theirs, launches)


# ---------------------------------------------------------------------------------------------------------- activations


@every_kind
def test_an_activation_set_after_fusing(kind: str, launches: list[str]) -> None:
    ours, theirs = twins(kind)
    fuse(ours)
    for name, path in (("relu", KERNELS), ("mish", PYTORCH), ("gelu_new", KERNELS), ("sigmoid", PYTORCH)):
        for block in (ours, theirs):
            setattr(block, act_of(block), ACT2FN[name])
        assert_runs(path, ours, theirs, launches)
    for block in (ours, theirs):
        activation = act_of(block)
        del block._modules[activation]
        setattr(block, activation, lambda z: z.clamp(-1, 1))
    assert_runs(PYTORCH, ours, theirs, launches)


def clipped(z: Tensor) -> Tensor:
    return z.clamp(-1, 1)


def test_an_activation_whose_insides_were_replaced(launches: list[str]) -> None:
    ours, theirs = twins("intermediate")
    fuse(ours)
    assert_runs(KERNELS, ours, theirs, launches)  # from here on its classes are known, and the short way is taken
    for block in (ours, theirs):
        block.intermediate_act_fn.act = clipped
    assert_runs(PYTORCH, ours, theirs, launches)
    for inside in (clipped, functools.partial(F.gelu), functools.partial(F.gelu, approximate="none")):
        for block in (ours, theirs):
            block.intermediate_act_fn = ACT2FN["gelu_pytorch_tanh"]
            block.intermediate_act_fn.act = inside
        assert activation_name(ours.intermediate_act_fn) is None
        assert_runs(PYTORCH, ours, theirs, launches)


# ------------------------------------------------------------------------------------------------- what watches PyTorch


@pytest.mark.parametrize("seeded", ["hidden_states", "weight", "bias"])
@every_kind
def test_forward_mode_differentiation(kind: str, seeded: str, launches: list[str]) -> None:
    ours, theirs = twins(kind)
    fuse(ours)
    tangents = []
    for block in (theirs, ours):
        values = {name: p.detach() for name, p in block.named_parameters()} | {"hidden_states": hidden_states()}
        seed = seeded if seeded in values else f"{linear_name(block)}.{seeded}"
        with torch.autograd.forward_ad.dual_level():
            direction = torch.linspace(-1, 1, values[seed].numel()).view_as(values[seed])
            values[seed] = torch.autograd.forward_ad.make_dual(values[seed], direction)
            out = torch.func.functional_call(block, values, values.pop("hidden_states"))
            tangents.append(torch.autograd.forward_ad.unpack_dual(out))
    (primal, tangent), (our_primal, our_tangent) = tangents
    assert tangent.abs().max() > 0
    torch.testing.assert_close(our_primal, primal)
    torch.testing.assert_close(our_tangent, tangent)
    assert launches == PYTORCH


TRANSFORMS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "vmap": lambda m, x: torch.func.vmap(m)(x[:, None]),
    "grad": lambda m, x: torch.func.grad(lambda v: m(v).square().sum())(x),
    "jvp": lambda m, x: torch.func.jvp(m, (x,), (torch.ones_like(x),))[1],
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@every_kind
@torch.no_grad()
def test_function_transforms_of_a_module(kind: str, transform: str, launches: list[str]) -> None:
    ours, theirs = twins(kind)
    fuse(ours)
    expected = TRANSFORMS[transform](theirs, hidden_states())
    torch.testing.assert_close(TRANSFORMS[transform](ours, hidden_states()), expected, rtol=1e-5, atol=1e-5)
    assert launches == PYTORCH


@every_kind
def test_symbolic_tracing(kind: str, launches: list[str]) -> None:
    """What torch.fx passes is no tensor, and what it records are Hugging Face's operations."""
    ours, theirs = twins(kind)
    fuse(ours)
    traced = torch.fx.symbolic_trace(ours)
    assert linear_name(theirs) in traced.code
    assert_runs(PYTORCH, traced, theirs, launches)


class Doubling(TorchDispatchMode):
    """Results of matrix products, doubled."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out * 2 if func in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default) else out


@every_kind
def test_a_dispatch_mode_sees_every_operation(kind: str, launches: list[str]) -> None:
    ours, theirs = twins(kind)
    fuse(ours)
    plain = theirs(hidden_states())
    flops, results = [], []
    for block in (theirs, ours):
        with FlopCounterMode(display=False) as counter:
            block(hidden_states())
        flops.append(counter.get_total_flops())
        with Doubling():
            results.append(step(block, hidden_states())["out"])
    assert flops[0] == flops[1] > 0
    assert not torch.allclose(results[0], plain)
    torch.testing.assert_close(results[1], results[0])
    assert launches == PYTORCH
    assert_runs(KERNELS, ours, theirs, launches)


# --------------------------------------------------------------------------------------------------- memory and threads


@every_kind
def test_memory_that_runs_out(kind: str, launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever allocation of a step fails, the next step is as good as ever."""
    ours, theirs = twins(kind)
    fuse(ours)
    honest = {name: getattr(*name) for name in ((Tensor, "new_empty"), (torch, "empty_like"), (torch, "empty"))}
    failures = 0
    for failing in range(20):
        made = 0

        def allocate(*args: Any, _allocate: Callable[..., Tensor], **kwargs: Any) -> Tensor:
            nonlocal made
            made += 1
            if made == failing + 1:  # noqa: B023
                raise torch.OutOfMemoryError("out of memory")
            return _allocate(*args, **kwargs)

        with monkeypatch.context() as patch:
            for (owner, name), function in honest.items():
                patch.setattr(
                    owner,
                    name,
                    functools.partialmethod(allocate, _allocate=function)
                    if owner is Tensor
                    else functools.partial(allocate, _allocate=function),
                )
            try:
                step(ours, hidden_states())
            except torch.OutOfMemoryError:
                failures += 1
            else:
                break
        assert_runs(KERNELS, ours, theirs, launches)
    assert failures >= 3, "output, its gradient and the bias's"


def test_threads_fuse_unfuse_and_call_at_once(launches: list[str]) -> None:
    model = make()
    expected = model(**inputs())[0]
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for turn in range(6):
                if (seed + turn) % 3 == 0:
                    fuse(model)
                elif (seed + turn) % 3 == 1:
                    unfuse(model)
                with torch.no_grad():
                    out = model(**inputs())[0]
                assert float((out - expected).detach().abs().max()) < 1e-4
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert 0 < len(launches) < 8 * 6 * 3
    fuse(model)
    assert {type(m) for m in blocks(model)} == {FusedBertIntermediate, FusedBertPooler}


def test_threads_train_their_own_models_at_once(launches: list[str]) -> None:
    """Eight models, fused while others run: what a thread records of a call must not reach another's."""
    truth = step(twins("intermediate")[1], hidden_states())
    start, results = threading.Barrier(8), {}

    def work(seed: int) -> None:
        block = BertIntermediate(BertConfig(**SIZES))
        block.load_state_dict(state)
        start.wait()
        fuse(block)
        results[seed] = step(block, hidden_states())

    state = twins("intermediate")[1].state_dict()
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(launches) == sorted(8 * KERNELS)
    for seed in range(8):
        for name, other in truth.items():
            torch.testing.assert_close(results[seed][name], other, rtol=1e-4, atol=1e-4)


def test_a_call_that_was_unfused_meanwhile(launches: list[str]) -> None:
    """The call began with the fused class's forward; another thread has unfused the module since."""
    block, theirs = twins("intermediate")
    for b in (block, theirs):
        b.intermediate_act_fn = nn.Softplus()
    torch.testing.assert_close(FusedBertIntermediate.forward(block, hidden_states()), theirs(hidden_states()))
    assert launches == PYTORCH
