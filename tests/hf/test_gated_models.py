"""Whole models whose MLPs are gated: fused, they are Hugging Face's, forward and backward, and run the kernels."""

import copy
import pickle

import pytest
import torch
import transformers
from models import assert_same, drawn, gradients
from transformers import ModernBertConfig, ModernBertForMaskedLM, PreTrainedModel

from bert_fused import fuse, unfuse

LAYERS = 3
SIZES = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": LAYERS}
SIZES |= {"num_attention_heads": 4, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1}
MODELS = {
    "modernbert": lambda: ModernBertForMaskedLM(ModernBertConfig(**SIZES, eos_token_id=2, mlp_dropout=0.3)),
}
if hasattr(transformers, "NomicBertModel"):  # not in every version that we support
    # Two weights: the activated layer runs in the kernel, and the product with the other one's result in PyTorch.
    MODELS["nomic_bert"] = lambda: transformers.NomicBertModel(transformers.NomicBertConfig(**SIZES))

# fp32, of the largest element of each output and each gradient.
OUTPUTS, GRADIENTS = 1e-5, 1e-4

every_model = pytest.mark.parametrize("name", MODELS)


def twins(name: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    torch.manual_seed(0)
    model = drawn(MODELS[name]()).eval()
    return copy.deepcopy(model), model


def step(model: PreTrainedModel) -> torch.Tensor:
    """The first output of a padded batch, whose gradients are left on the parameters. Dropout draws the same."""
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    torch.manual_seed(2)
    out = model(input_ids=ids * mask, attention_mask=mask)[0]
    out[mask.bool()].square().mean().backward()
    return out.detach()[mask.bool()]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@every_model
def test_a_fused_model_is_hugging_faces(name: str, training: bool, launches: list[str]) -> None:
    ours, theirs = (model.train(training) for model in twins(name))
    report = fuse(ours)
    mlps = [module for module, _ in ours.named_modules() if module.endswith(".mlp")]
    assert len(mlps) == LAYERS
    assert set(mlps) <= set(report.fused)
    expected = step(theirs)
    assert launches == []
    found = step(ours)
    assert launches.count("linear_act_fwd") == launches.count("act_bwd") == len(report.fused) >= LAYERS
    assert_same((found,), (expected,), OUTPUTS)
    others = gradients(theirs)
    for parameter, mine in gradients(ours).items():
        other = others[parameter]
        assert mine is not None
        assert other is not None
        assert float((mine - other).abs().max()) <= GRADIENTS * float(other.abs().max()), parameter
    unfuse(ours)
    assert [type(module) for module in ours.modules()] == [type(module) for module in theirs.modules()]


@every_model
def test_a_fused_model_can_be_pickled_and_recomputes(name: str, launches: list[str]) -> None:
    ours, theirs = twins(name)
    fuse(ours, recompute_preact=True)
    ours = pickle.loads(pickle.dumps(ours))
    expected = step(theirs)
    assert_same((step(ours),), (expected,), OUTPUTS)
    assert launches.count("linear_act_fwd") == 2 * launches.count("act_bwd") >= 2 * LAYERS


@every_model
def test_a_hook_or_another_activation_runs_hugging_faces_code(name: str, launches: list[str]) -> None:
    ours, theirs = twins(name)
    fused = len(fuse(ours).fused)
    for model in (ours, theirs):
        mlp = model.get_submodule(next(each for each, _ in model.named_modules() if each.endswith(".mlp")))
        first = next(module for module in mlp.modules() if isinstance(module, torch.nn.Linear))
        first.register_forward_hook(lambda module, args, out: 2 * out)
    expected = step(theirs)
    assert_same((step(ours),), (expected,), OUTPUTS)
    assert launches.count("linear_act_fwd") == fused - 1


def test_the_report_names_the_path_of_a_gated_module() -> None:
    ours, _ = twins("modernbert")
    report = fuse(ours)
    assert report.paths["model.layers.0.mlp"] == "Triton"
