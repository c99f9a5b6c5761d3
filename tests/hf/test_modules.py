"""The fused modules against Hugging Face's: constructor, keys, outputs, gradients, for every activation there is."""

import copy
import functools
import importlib
import io
import pickle
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from blocks import hidden_states, step
from models import FAMILIES, assert_same, inputs, make
from torch import nn
from transformers import BertConfig, BertModel
from transformers.activations import ACT2CLS, ACT2FN
from transformers.models.bert.modeling_bert import BertIntermediate, BertPooler

import bert_fused
from bert_fused import FusedBertIntermediate, FusedBertPooler
from bert_fused.hf import modules
from bert_fused.hf.checks import activation_name
from bert_fused.hf.modules import fused_class, original_class

KERNEL_OF_NAME = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "linear": "none",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}


def config(activation: object = "gelu") -> BertConfig | SimpleNamespace:
    """BertConfig takes names of activations only, but the modules take any configuration."""
    make = BertConfig if isinstance(activation, str) else SimpleNamespace
    return make(hidden_size=32, intermediate_size=37, hidden_act=activation)


def pair(
    fused: type[nn.Module] = FusedBertIntermediate,
    original: type[nn.Module] = BertIntermediate,
    activation: object = "gelu",
) -> tuple[nn.Module, nn.Module]:
    """A fused module and Hugging Face's with the same weights, biases not zero."""
    torch.manual_seed(0)
    ours, theirs = fused(config(activation)), original(config(activation))
    nn.init.normal_(ours.dense.bias)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def assert_parity(ours: nn.Module, theirs: nn.Module) -> None:
    """Same output and same gradients on one random batch."""
    torch.testing.assert_close(step(ours, hidden_states()), step(theirs, hidden_states()), rtol=2e-5, atol=2e-5)


each_module = pytest.mark.parametrize(
    ("fused", "original"), [(FusedBertIntermediate, BertIntermediate), (FusedBertPooler, BertPooler)]
)


@each_module
def test_a_fused_module_has_hugging_faces_keys_outputs_and_gradients(fused, original) -> None:
    ours, theirs = pair(fused, original)
    assert isinstance(ours, original)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
    assert_parity(ours, theirs)


def test_the_table_of_activations_is_complete() -> None:
    without = set(ACT2CLS) - set(KERNEL_OF_NAME)
    assert {name: activation_name(ACT2FN[name]) for name in KERNEL_OF_NAME} == KERNEL_OF_NAME
    assert {activation_name(ACT2FN[name]) for name in without} == {None}


@pytest.mark.parametrize("name", sorted(ACT2CLS))
def test_every_activation_gives_hugging_faces_output(name) -> None:
    ours, theirs = pair(activation=name)
    assert_parity(ours, theirs)
    model = nn.Sequential(BertIntermediate(config(name)))
    report = bert_fused.fuse(model)
    if name in KERNEL_OF_NAME:
        assert report.fused == ("0",)
        assert type(model[0]) is FusedBertIntermediate
    else:
        assert type(ACT2FN[name]).__name__ in report.skipped["0"]
        assert type(model[0]) is BertIntermediate


def clipped(z: torch.Tensor) -> torch.Tensor:
    return z.clamp(-1, 1)


@pytest.mark.parametrize(
    ("function", "kernel"),
    [
        (F.gelu, "gelu"),
        (torch.tanh, "tanh"),
        (F.relu, "relu"),
        (F.silu, "silu"),
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (nn.ReLU(inplace=True), "relu"),
        (nn.Identity(), "none"),
        (clipped, None),
        (functools.partial(F.gelu, approximate="tanh"), None),
        (nn.Sequential(nn.GELU()), None),
        (nn.Softplus(), None),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__) if callable(value) else str(value),
)
def test_any_callable_as_activation_gives_hugging_faces_output(function, kernel) -> None:
    assert activation_name(function) == kernel
    ours, theirs = pair(activation=function)
    assert_parity(ours, theirs)
    report = bert_fused.fuse(ours)
    assert bool(report.fused) == (kernel is not None)


@pytest.mark.parametrize("name", ["gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "mish"])
def test_autocast_gives_hugging_faces_dtype(name) -> None:
    ours, theirs = pair(activation=name)
    hidden = torch.randn(2, 5, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine, other = ours(hidden), theirs(hidden)
    assert mine.dtype == other.dtype
    torch.testing.assert_close(mine, other, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_gelus_that_autocast_runs_in_fp32_have_no_kernel_under_it(device) -> None:
    """CUDA's autocast promotes their torch.pow; the CPU's does not, so that no dtype would show it here."""
    torch.set_autocast_enabled(device, True)  # torch.autocast would not, where there is no GPU
    try:
        found = {name: activation_name(ACT2FN[name]) for name in KERNEL_OF_NAME}
    finally:
        torch.set_autocast_enabled(device, False)
    assert [name for name in found if found[name] is None] == ["gelu_new", "gelu_python_tanh", "gelu_accurate"]
    assert all(found[name] in (None, kernel) for name, kernel in KERNEL_OF_NAME.items())


@each_module
@pytest.mark.parametrize("shape", [(1, 5, 32), (0, 5, 32), (2, 1, 32), (2, 3, 4, 32)])
def test_batches_of_any_size_and_rank_give_hugging_faces_output(shape, fused, original) -> None:
    ours, theirs = pair(fused, original)
    hidden = torch.randn(shape)
    exact = fused is FusedBertPooler and len(shape) == 4  # not one of its shapes: Hugging Face's code runs
    tolerance = 0.0 if exact else 1e-5
    torch.testing.assert_close(ours(hidden), theirs(hidden), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", FAMILIES, ids=lambda kind: kind.__name__)
def test_families_give_hugging_faces_outputs_and_gradients(kind) -> None:
    _, intermediates, poolers = FAMILIES[kind]
    eager, model = make(kind), make(kind)
    report = bert_fused.fuse(model)
    assert sum(name.endswith("intermediate") for name in report.fused) == intermediates
    assert sum(name.endswith("pooler") for name in report.fused) == poolers
    assert not report.skipped
    assert all(path.startswith("Triton") for path in report.paths.values())

    batch = inputs()
    ours, theirs = model(**batch), eager(**batch)
    assert_same(ours, theirs)
    ours[0].square().mean().backward()
    theirs[0].square().mean().backward()
    gradients = {name: p.grad for name, p in eager.named_parameters()}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (gradients[name] is None), name
        if parameter.grad is not None:
            largest = float(gradients[name].abs().max())
            assert float((parameter.grad - gradients[name]).abs().max()) <= 1e-4 * max(largest, 1e-3), name


@pytest.mark.parametrize(
    "name", ["BertIntermediate", "BertPooler", "RobertaPooler", "ElectraIntermediate", "EsmIntermediate"]
)
def test_fused_classes_are_picklable_subclasses(name) -> None:
    family = re.match("[A-Z][a-z]+", name)[0].lower()
    original = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)
    fused = fused_class(original)
    assert fused.__name__ == f"Fused{name}"
    assert issubclass(fused, original)
    assert fused is fused_class(original)
    module = fused.__new__(fused)
    nn.Module.__init__(module)
    assert type(pickle.loads(pickle.dumps(module))) is fused
    mine = type(name, (original,), {"__module__": original.__module__})
    assert fused_class(mine) is None


def test_a_fused_model_pickled_by_cloudpickle_is_fused_in_another_process(tmp_path) -> None:
    """As Ray and joblib send it. A class that has no name to be found by arrives as a copy unknown to `unfuse`."""
    cloudpickle = pytest.importorskip("cloudpickle")
    from transformers import ViTConfig, ViTModel

    model = ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40))
    assert bert_fused.fuse(model).fused == ("layers.0.mlp", "pooler")
    (tmp_path / "model").write_bytes(cloudpickle.dumps(model))
    script = """
        import pickle, sys
        from pathlib import Path
        import bert_fused
        from bert_fused.hf.modules import fused_class, original_class
        model = pickle.loads(Path(sys.argv[1]).read_bytes())
        kinds = [type(module) for module in model.modules()]
        originals = [original for module in model.modules() if (original := original_class(module))]
        print([original.__name__ for original in originals], all(fused_class(o) in kinds for o in originals))
        bert_fused.unfuse(model)
        print([original for module in model.modules() if (original := original_class(module))])
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "model")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["['ViTMLP', 'ViTPooler'] True", "[]"]


def test_unknown_name_is_an_attribute_error() -> None:
    for name in ("FusedNothing", "Nothing"):
        with pytest.raises(AttributeError, match=name):
            getattr(modules, name)
    with pytest.raises(AttributeError, match="Nothing"):
        bert_fused.Nothing  # noqa: B018


@pytest.mark.parametrize("kind", [BertModel, *[k for k in FAMILIES if "Roberta" in k.__name__][:1]])
def test_copies_are_fused_and_saved_files_are_not(kind, tmp_path) -> None:
    model = make(kind)
    before = model(**inputs())
    bert_fused.fuse(model)
    keys = list(model.state_dict())

    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    copies.append(torch.load(stream, weights_only=False))
    for duplicate in copies:
        assert original_class(duplicate.encoder.layer[0].intermediate) is not None
        assert list(duplicate.state_dict()) == keys
        assert_same(duplicate(**inputs()), before)

    model.save_pretrained(tmp_path)
    reloaded = kind.from_pretrained(tmp_path).eval()
    assert original_class(reloaded.encoder.layer[0].intermediate) is None
    assert torch.equal(reloaded(**inputs())[0], before[0])
    fresh = make(kind)
    fresh.load_state_dict(model.state_dict())
    model.load_state_dict(fresh.state_dict())
