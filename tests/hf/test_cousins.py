"""Each known block, fused, is Hugging Face's, forward and backward; and the check behind ``docs/models.md``."""

import copy
import importlib
import pickle
from types import ModuleType

import families
import pytest
import torch
from blocks import KERNELS, PYTORCH, assert_runs, doubled
from models import assert_same, drawn
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BertConfig,
    ClvpEncoderConfig,
    DistilBertConfig,
    ElectraConfig,
    EsmConfig,
    GraniteMoeSharedConfig,
    GteConfig,
    ModernBertConfig,
    MoonshineConfig,
    NomicBertConfig,
    Phi3Config,
    RobertaConfig,
    Wav2Vec2Config,
)
from transformers.models.albert.modeling_albert import AlbertLayer
from transformers.models.distilbert.modeling_distilbert import FFN
from transformers.models.esm import modeling_esm
from transformers.models.roberta import modeling_roberta

from bert_fused import cls_pool, fuse, linear_act, unfuse
from bert_fused.hf import modules
from bert_fused.hf.recognize import _BLOCKS, INTERMEDIATE, POOLER, block_of

SIZES = {"hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4, "vocab_size": 40, "pad_token_id": 0}
MOONSHINE = {key: size for key, size in SIZES.items() if key != "num_attention_heads"}
ALBERT = AlbertConfig(**SIZES, embedding_size=32)

# One class of each block but BertIntermediate's and BertPooler's, and what to make it of.
COUSINS = {
    "bert.BertPredictionHeadTransform": (BertConfig(**SIZES),),
    "vit.ViTMLP": (BertConfig(**SIZES),),
    "esm.EsmIntermediate": (EsmConfig(**SIZES),),
    "distilbert.FFN": (DistilBertConfig(dim=32, hidden_dim=37, n_heads=4, dropout=0.5),),
    "albert.AlbertLayer": (ALBERT,),
    "albert.AlbertMLMHead": (ALBERT,),
    "wav2vec2.Wav2Vec2FeedForward": (
        Wav2Vec2Config(hidden_size=32, intermediate_size=37, activation_dropout=0.5, hidden_dropout=0.5),
    ),
    "electra.ElectraGeneratorPredictions": (ElectraConfig(**SIZES, embedding_size=32),),
    "electra.ElectraClassificationHead": (ElectraConfig(**SIZES, hidden_dropout_prob=0.5),),
    "roberta.RobertaLMHead": (RobertaConfig(**SIZES),),
    "roberta.RobertaClassificationHead": (RobertaConfig(**SIZES, hidden_dropout_prob=0.5),),
    "bart.BartClassificationHead": (32, 32, 3, 0.5),
    "modernbert.ModernBertMLP": (ModernBertConfig(**SIZES, mlp_bias=True, mlp_dropout=0.5),),
    "phi3.Phi3MLP": (Phi3Config(**SIZES),),
    "granitemoeshared.GraniteMoeSharedMLP": (GraniteMoeSharedConfig(**SIZES, shared_intermediate_size=37),),
    "moonshine.MoonshineDecoderMLP": (MoonshineConfig(**MOONSHINE), "silu"),
    "nomic_bert.NomicBertMLP": (NomicBertConfig(**SIZES),),
    "gte.GteMLP": (GteConfig(**SIZES, hidden_dropout_prob=0.5),),
    "clvp.ClvpGatedLinearUnit": (ClvpEncoderConfig(hidden_size=32, intermediate_size=37),),
}

HEADS = [name for name in COUSINS if name.endswith("ClassificationHead")]


class Seeded(nn.Module):
    """A module whose dropout draws the same in every call."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        # A layer of ALBERT needs a mask.
        return self.module(*args, *([None] if isinstance(self.module, AlbertLayer) else []))


def twins(name: str) -> tuple[Seeded, Seeded]:
    folder, kind = name.split(".")
    home = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    torch.manual_seed(0)
    module = Seeded(drawn(vars(home)[kind](*COUSINS[name]))).eval()
    return module, copy.deepcopy(module)


def test_each_block_has_a_cousin() -> None:
    blocks = {block_of(type(twins(name)[0].module)) for name in COUSINS}
    assert blocks | {INTERMEDIATE, POOLER} == set(_BLOCKS.values())


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", COUSINS)
def test_cousins_give_hugging_faces_outputs_and_gradients(name: str, training: bool, launches: list[str]) -> None:
    ours, theirs = twins(name)
    report = fuse(ours)
    assert report.fused == ("module",)
    assert report.paths["module"].endswith("in eval mode, since dropout comes first") == (name in HEADS)
    for module in (ours, theirs):
        module.train(training)
    assert_runs(PYTORCH if training and name in HEADS else KERNELS, ours, theirs, launches)
    unfuse(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]


@pytest.mark.parametrize("name", HEADS)
def test_active_dropout_before_the_linear_layer_runs_hugging_faces_code(name: str, launches: list[str]) -> None:
    ours, theirs = twins(name)
    fuse(ours)
    for module in (ours.train(), theirs.train()):
        module.module.dropout.p = 0.0
    assert_runs(KERNELS, ours, theirs, launches)
    for module in (ours.eval(), theirs.eval()):
        module.module.dropout.register_forward_hook(doubled)
    assert_runs(PYTORCH, ours, theirs, launches)
    for module in (ours, theirs):
        module.module.dropout = nn.Tanh()
    assert_runs(PYTORCH, ours, theirs, launches)


@pytest.mark.parametrize("name", ["distilbert.FFN", "albert.AlbertLayer"])
def test_chunks_of_a_feed_forward_run_one_kernel_each(name: str, launches: list[str]) -> None:
    ours, theirs = twins(name)
    for module in (ours, theirs):
        module.module.chunk_size_feed_forward = 2
    fuse(ours)
    x = torch.randn(2, 6, 32)
    assert_runs([*3 * ["linear_act_fwd"], *3 * ["act_bwd"]], ours, theirs, launches, x)


def test_a_method_replaced_on_its_class_or_an_instance_runs(
    launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = twins("distilbert.FFN")
    fuse(ours)
    original = FFN.ff_chunk
    with monkeypatch.context() as patch:
        patch.setattr(FFN, "ff_chunk", lambda self, x: original(self, x) * 2)
        assert fuse(ours).skipped == {"module": "its class's forward was replaced"}
        assert_runs(PYTORCH, ours, theirs, launches)
    assert_runs(KERNELS, ours, theirs, launches)
    for module in (ours.module, theirs.module):
        module.ff_chunk = module.lin1.forward
    assert fuse(ours).skipped == {"module": "its ff_chunk was replaced on the instance"}
    assert_runs(PYTORCH, ours, theirs, launches)


@pytest.mark.parametrize(
    ("name", "home", "function"),
    [
        ("esm.EsmIntermediate", modeling_esm, "gelu"),
        ("roberta.RobertaLMHead", modeling_roberta, "gelu"),
        ("roberta.RobertaClassificationHead", torch, "tanh"),
    ],
)
def test_a_replaced_activation_function_of_a_models_file_runs(
    name: str, home: ModuleType, function: str, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = twins(name)
    fuse(ours)
    assert_runs(KERNELS, ours, theirs, launches)
    monkeypatch.setattr(home, function, lambda x: x.clamp(-1, 1))
    assert_runs(PYTORCH, ours, theirs, launches)
    assert "has no kernel" in fuse(ours).skipped["module"]


def test_an_argument_passed_by_name_runs_hugging_faces_code(launches: list[str]) -> None:
    ours, theirs = twins("vit.ViTMLP")
    fuse(ours)
    x = torch.randn(2, 5, 32)
    assert torch.equal(ours.module(hidden_states=x), theirs.module(hidden_states=x))
    with pytest.raises(TypeError):
        ours.module(x, x)
    assert launches == PYTORCH


def test_recompute_preact_launches_the_forward_kernel_twice(launches: list[str]) -> None:
    ours, theirs = twins("vit.ViTMLP")
    fuse(ours, recompute_preact=True)
    assert_runs(["linear_act_fwd", *KERNELS], ours, theirs, launches)


@pytest.mark.parametrize(
    "name",
    ["distilbert.FFN", "esm.EsmIntermediate", "roberta.RobertaClassificationHead", "modernbert.ModernBertMLP"],
)
def test_compiled_cousins_are_one_graph(name: str) -> None:
    torch._dynamo.reset()
    ours, theirs = twins(name)
    fuse(ours)
    x = torch.randn(2, 5, 32)
    compiled = torch.compile(ours.module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), theirs.module(x), rtol=2e-5, atol=2e-5)


def test_a_fused_class_is_still_recorded_by_transformers() -> None:
    """transformers finds what it records by class: an ``AlbertLayer`` that is fused is still one."""
    config = AlbertConfig(**SIZES, embedding_size=32, num_hidden_layers=3)
    torch.manual_seed(0)
    eager = drawn(AlbertForMaskedLM(config)).eval()
    model = pickle.loads(pickle.dumps(eager))
    assert len(fuse(model).fused) == 2
    model = pickle.loads(pickle.dumps(model))
    ids = torch.arange(12).view(2, 6)
    ours, theirs = (m(ids, output_hidden_states=True) for m in (model, eager))
    assert len(ours.hidden_states) == len(theirs.hidden_states) == 4
    assert_same(ours, theirs)


def wrong_row(x: torch.Tensor, *args: object, **_: object) -> torch.Tensor:
    return cls_pool(x.roll(1, 1), *args)


@pytest.mark.parametrize(
    ("name", "function", "fault"),
    [
        ("vit.ViTMLP", "linear_act", lambda x, weight, bias, act, **_: linear_act(x, weight, bias, "gelu_tanh")),
        ("vit.ViTMLP", "linear_act", lambda x, weight, bias, act, **_: linear_act(x, weight, None, act)),
        ("vit.ViTMLP", "linear_act", lambda x, weight, bias, act, **_: linear_act(x, weight.detach(), bias, act)),
        ("roberta.RobertaClassificationHead", "cls_pool", wrong_row),
    ],
    ids=["tanh form", "no bias", "no gradient", "another row"],
)
def test_check_alone_finds_a_planted_fault(
    name: str, function: str, fault: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = twins(name)[0].module
    assert families.check_alone(module, block_of(type(module))) == "alone"
    fused = copy.deepcopy(modules._counterparts)
    monkeypatch.setattr(modules, function, fault)
    # The method of a class made on demand has the honest function.
    monkeypatch.setattr(modules, "_counterparts", {k: v for k, v in fused.items() if k is not type(module)})
    assert families.check_alone(module, block_of(type(module))).startswith("DIFFERS")
