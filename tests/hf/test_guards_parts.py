"""A part of a fused block that changes: the block runs Hugging Face's code for as long as it has that part."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from blocks import (
    KERNELS,
    PYTORCH,
    act,
    act_of,
    assert_runs,
    change_both,
    doubled,
    every_kind,
    fused_twins,
    hidden_states,
    linear,
    linear_name,
    step,
    twins,
    when_fused,
)
from models import make
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm
from transformers.activations import ACT2FN, GELUActivation
from transformers.models.bert.modeling_bert import BertIntermediate, BertPooler
from transformers.models.vit.modeling_vit import ViTMLP

from bert_fused import fuse
from bert_fused.hf.checks import activation_name


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
def test_a_changed_part_runs_hugging_faces_code(kind: str, when: str, change: str, launches: list[str]) -> None:
    apply, reason = CHANGES[change]
    ours, theirs = twins(kind)
    untouched = step(theirs, hidden_states())
    if when == "after":
        assert fuse(ours).fused == ("",)
    change_both(ours, theirs, apply)
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
def test_a_block_runs_kernels_again_once_its_hook_is_removed(kind: str, launches: list[str]) -> None:
    ours, theirs = fused_twins(kind)
    assert_runs(KERNELS, ours, theirs, launches)
    handles = [linear(block).register_forward_hook(doubled) for block in (ours, theirs)]
    assert_runs(PYTORCH, ours, theirs, launches)
    for handle in handles:
        handle.remove()
    assert_runs(KERNELS, ours, theirs, launches)


@every_kind
def test_hooks_on_the_block_itself_run_around_its_kernel(kind: str, launches: list[str]) -> None:
    ours, theirs = fused_twins(kind)
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
def test_a_global_hook_runs_hugging_faces_code(kind: str, part: str, which: str, launches: list[str]) -> None:
    ours, theirs = fused_twins(kind)
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
def test_a_forward_replaced_on_a_class_runs(
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


def test_a_bare_function_as_activation_is_fused(launches: list[str]) -> None:
    ours, theirs = twins("pooler")
    for block in (ours, theirs):
        del block.activation
        block.activation = torch.tanh
    assert fuse(ours).fused == ("",)
    assert_runs(KERNELS, ours, theirs, launches)


def test_a_block_without_its_dense_layer_is_skipped() -> None:
    model = make()
    del model.pooler.dense
    report = fuse(model)
    assert "NoneType" in report.skipped["pooler"]
    assert len(report.fused) == 2


@every_kind
def test_an_activation_set_after_fusing_is_used(kind: str, launches: list[str]) -> None:
    ours, theirs = fused_twins(kind)
    for name, path in (("relu", KERNELS), ("mish", PYTORCH), ("gelu_new", KERNELS), ("sigmoid", PYTORCH)):
        change_both(ours, theirs, lambda block, name=name: setattr(block, act_of(block), ACT2FN[name]))
        assert_runs(path, ours, theirs, launches)
    for block in (ours, theirs):
        activation = act_of(block)
        del block._modules[activation]
        setattr(block, activation, lambda z: z.clamp(-1, 1))
    assert_runs(PYTORCH, ours, theirs, launches)


def clipped(z: Tensor) -> Tensor:
    return z.clamp(-1, 1)


def test_an_activation_whose_insides_were_replaced_runs_them(launches: list[str]) -> None:
    ours, theirs = fused_twins("intermediate")
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
