"""What is told of a class by its code, and that each known block, fused, is Hugging Face's, forward and backward."""

import ast
import copy
import importlib
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import families
import pytest
import torch
import transformers
from models import assert_same, drawn
from test_guards import KERNELS, PYTORCH, assert_runs, doubled
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BartConfig,
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    EsmConfig,
    RobertaConfig,
    TimesformerConfig,
    Wav2Vec2Config,
)
from transformers.models.albert.modeling_albert import AlbertLayer
from transformers.models.bart.modeling_bart import BartEncoderLayer
from transformers.models.bert_generation.modeling_bert_generation import BertGenerationIntermediate
from transformers.models.distilbert.modeling_distilbert import FFN
from transformers.models.esm import modeling_esm
from transformers.models.roberta import modeling_roberta
from transformers.models.timesformer.modeling_timesformer import TimesformerIntermediate

from bert_fused import cls_pool, fuse, linear_act, unfuse
from bert_fused.hf import modules
from bert_fused.hf.modules import fused_class
from bert_fused.hf.recognize import _BLOCKS, INTERMEDIATE, POOLER, block_of, read_chain

# Their code is something else: quantised, dropout, a norm before, conditions, an argument's attributes, gates.
OTHERS = {
    "ibert": ["IBertIntermediate"],
    "timesformer": ["TimesformerIntermediate"],
    "mobilebert": ["MobileBertPooler"],
    "cvt": ["CvtIntermediate"],
    "roberta_prelayernorm": ["RobertaPreLayerNormIntermediate"],
    "deberta": ["ContextPooler"],
    "beit": ["BeitPooler"],
    "modernbert": ["ModernBertMLP"],
    "nomic_bert": ["NomicBertMLP"],
    "llama": ["LlamaMLP"],
    "bert": ["BertLayer", "BertSelfOutput", "BertOutput"],
    "albert": ["AlbertModel"],
}


@pytest.mark.parametrize("folder", OTHERS)
def test_classes_that_deviate(folder: str) -> None:
    if not (families.MODELS / folder).exists():
        pytest.skip(f"this transformers has no {folder}")
    home = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    there = [name for name in OTHERS[folder] if hasattr(home, name)]
    assert there
    for name in there:
        assert name not in families.read(folder).blocks
        assert block_of(getattr(home, name)) is None
        assert fused_class(getattr(home, name)) is None


def chain(code: str) -> tuple[str, ...] | None:
    (definition,) = ast.parse(textwrap.dedent(code)).body
    return read_chain(definition)


@pytest.mark.parametrize(
    "code",
    [
        "def forward(self, x):\n  x = self.dense(x)\n  x = self.act(x)\n  return x",
        "def forward(self, x):\n  return self.act(self.dense(x))",
        "def forward(self, a: int, **kwargs) -> int:\n  '''Text.'''\n  b = self.dense(a)\n  return self.act(b)",
        "def forward(me, x, /):\n  y = me.dense(x)\n  x = me.act(y)\n  return x",
    ],
)
def test_one_chain_in_many_words(code: str) -> None:
    assert chain(code) == ("dense", "act")


def test_other_steps() -> None:
    assert chain("def f(self, x):\n return torch.tanh(self.dense(x[:, 0]))") == ("[:,0]", "dense", "torch.tanh()")
    assert chain("def f(self, x):\n return gelu(x[:, 0, :])") == ("[:,0]", "gelu()")
    assert chain("def f(self, x):\n return x") == ()


@pytest.mark.parametrize(
    "body",
    [
        "x = self.dense(x); y = self.act(x); return x",  # a result that is dropped
        "y = self.dense(x); y = self.act(x); return y",  # what was there before
        "y = self.dense(x); y = self.act(y); return x",
        "x = self.dense(x); x = self.act(x) + 0; return x",
        "x = self.dense(x); x += x; x = self.act(x); return x",
        "x = self.dense(x); x: int = self.act(x); return x",
        "x = self.dense(x); x = z = self.act(x); return x",
        "x = self.dense(x); self.seen = self.act(x); return x",
        "x = self.dense(x); self = self.act(x); return self",
        "x = self.dense(x); print(x); x = self.act(x); return x",
        "x = self.dense(x); x = self.act(x)",
        "x = self.dense(x, x); x = self.act(x); return x",
        "x = self.dense(x, scale=2); x = self.act(x); return x",
        "x = self.dense(*x); x = self.act(x); return x",
        "x = self.dense(x); x = self.act(x); return (x,)",
        "x = self.dense(x); x = self.act(x); return",
        "x = self.dense(x[0]); x = self.act(x); return x",
        "x = self.dense(x[:, 1]); x = self.act(x); return x",
        "x = self.dense(x[:, -1]); x = self.act(x); return x",
        "x = self.dense(x[:, 0:1]); x = self.act(x); return x",
        "x = self.dense(x[:, 0, 0]); x = self.act(x); return x",
        "x = self.dense(x[1:, 0]); x = self.act(x); return x",
        "x = self.dense(y); x = self.act(x); return x",
        '"nothing but a docstring"',
    ],
)
def test_no_chain(body: str) -> None:
    assert chain(f"def forward(self, x):\n  {body}") is None


@pytest.mark.parametrize("head", ["self", "self, x, y", "self, x=0", "self, *x", "self, x, *, y", "self, x, *y"])
def test_other_arguments_are_no_chain(head: str) -> None:
    assert chain(f"def forward({head}):\n  return self.act(self.dense(x))") is None


def test_a_decorated_method_is_no_chain() -> None:
    assert chain("@doubled\ndef forward(self, x):\n  return self.act(self.dense(x))") is None


def test_only_what_the_module_itself_has_is_a_step() -> None:
    assert chain("def f(self, x):\n  return self.act(self.layer.dense(x))") != ("dense", "act")
    assert chain("def f(self, x):\n  return self.act(other.dense(x))") != ("dense", "act")


# ------------------------------------------------------------------------------------------------------ fused cousins

SIZES = {"hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4, "vocab_size": 40, "pad_token_id": 0}
DISTILBERT = DistilBertConfig(dim=32, hidden_dim=37, n_heads=4, dropout=0.5)
ALBERT = AlbertConfig(**SIZES, embedding_size=32)
WAV2VEC2 = Wav2Vec2Config(hidden_size=32, intermediate_size=37, activation_dropout=0.5, hidden_dropout=0.5)
BART = BartConfig(d_model=32, classifier_dropout=0.5)

# One class of each block but BertIntermediate's and BertPooler's, and what to make it of.
COUSINS = {
    "bert.BertPredictionHeadTransform": (BertConfig(**SIZES),),
    "vit.ViTMLP": (BertConfig(**SIZES),),
    "esm.EsmIntermediate": (EsmConfig(**SIZES),),
    "distilbert.FFN": (DISTILBERT,),
    "albert.AlbertLayer": (ALBERT,),
    "albert.AlbertMLMHead": (ALBERT,),
    "wav2vec2.Wav2Vec2FeedForward": (WAV2VEC2,),
    "electra.ElectraGeneratorPredictions": (ElectraConfig(**SIZES, embedding_size=32),),
    "electra.ElectraClassificationHead": (ElectraConfig(**SIZES, hidden_dropout_prob=0.5),),
    "roberta.RobertaLMHead": (RobertaConfig(**SIZES),),
    "roberta.RobertaClassificationHead": (RobertaConfig(**SIZES, hidden_dropout_prob=0.5),),
    "bart.BartClassificationHead": (32, 32, 3, 0.5),
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
def test_cousins_forward_and_backward(name: str, training: bool, launches: list[str]) -> None:
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
def test_dropout_before_the_linear_layer(name: str, launches: list[str]) -> None:
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
def test_chunks(name: str, launches: list[str]) -> None:
    ours, theirs = twins(name)
    for module in (ours, theirs):
        module.module.chunk_size_feed_forward = 2
    fuse(ours)
    x = torch.randn(2, 6, 32)
    assert_runs([*3 * ["linear_act_fwd"], *3 * ["act_bwd"]], ours, theirs, launches, x)


def test_a_method_replaced_on_its_class_or_an_instance(launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_a_function_replaced_in_its_file(
    name: str, home: ModuleType, function: str, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = twins(name)
    fuse(ours)
    assert_runs(KERNELS, ours, theirs, launches)
    monkeypatch.setattr(home, function, lambda x: x.clamp(-1, 1))
    assert_runs(PYTORCH, ours, theirs, launches)
    assert "has no kernel" in fuse(ours).skipped["module"]


def test_an_argument_by_name_is_hugging_faces_to_read(launches: list[str]) -> None:
    ours, theirs = twins("vit.ViTMLP")
    fuse(ours)
    x = torch.randn(2, 5, 32)
    assert torch.equal(ours.module(hidden_states=x), theirs.module(hidden_states=x))
    with pytest.raises(TypeError):
        ours.module(x, x)
    assert launches == PYTORCH


def test_recomputing(launches: list[str]) -> None:
    ours, theirs = twins("vit.ViTMLP")
    fuse(ours, recompute_preact=True)
    assert_runs(["linear_act_fwd", *KERNELS], ours, theirs, launches)


@pytest.mark.parametrize("name", ["distilbert.FFN", "esm.EsmIntermediate", "roberta.RobertaClassificationHead"])
def test_one_graph(name: str) -> None:
    torch._dynamo.reset()
    ours, theirs = twins(name)
    fuse(ours)
    x = torch.randn(2, 5, 32)
    compiled = torch.compile(ours.module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), theirs.module(x), rtol=2e-5, atol=2e-5)


def test_a_recorded_class_is_recorded() -> None:
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


def test_reports_on_what_only_looks_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    intermediate = TimesformerIntermediate(TimesformerConfig(hidden_size=32, intermediate_size=37))
    chain = "dense > intermediate_act_fn > dropout"
    assert fuse(intermediate).skipped == {
        "": f"TimesformerIntermediate.forward ({chain}) is not among those that can be fused"
    }
    layer = BartEncoderLayer(BART)
    assert fuse(layer).skipped == {"": "BartEncoderLayer.forward is not among those that can be fused"}
    four = {"vocab_size": 60, "num_attention_heads": 4, "num_hidden_layers": 1, "hidden_size": 32}
    for kind, config, name in (
        ("RoFormerForSequenceClassification", four, "classifier"),
        ("NystromformerForSequenceClassification", four, "classifier"),
        ("XLMModel", {"vocab_size": 60, "emb_dim": 32, "n_layers": 1, "n_heads": 4}, "ffns.0"),
        ("XLNetModel", {"vocab_size": 60, "d_model": 32, "d_inner": 37, "n_layer": 1, "n_head": 4}, "layer.0.ff"),
    ):
        model = getattr(transformers, kind)
        assert "is not among those that can be fused" in fuse(model(model.config_class(**config))).skipped[name]
    block = BertGenerationIntermediate(BertConfig(**SIZES))
    monkeypatch.setattr(BertGenerationIntermediate, "forward", lambda self, x: x)
    assert fuse(block).skipped == {"": "its class's forward was replaced"}
    monkeypatch.undo()
    assert fuse(block).fused == ("",)
    assert "holds no module of transformers" in fuse(nn.Linear(2, 2)).skipped[""]


# ------------------------------------------------------------------------------------------------------------ the page


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
def test_the_check_finds_faults(name: str, function: str, fault: object, monkeypatch: pytest.MonkeyPatch) -> None:
    module = twins(name)[0].module
    assert families.check_alone(module, block_of(type(module))) == "alone"
    fused = copy.deepcopy(modules._counterparts)
    monkeypatch.setattr(modules, function, fault)
    # The method of a class made on demand has the honest function.
    monkeypatch.setattr(modules, "_counterparts", {k: v for k, v in fused.items() if k is not type(module)})
    assert families.check_alone(module, block_of(type(module))).startswith("DIFFERS")


def test_a_folder_is_checked_inside_a_model() -> None:
    assert families.check(families.read("distilbert")) == {"FFN": "model"}


def test_the_installed_transformers_and_the_page() -> None:
    folders = list(families.folders())
    holders = {block: [f.name for f in folders if block in f.blocks.values()] for block in _BLOCKS.values()}
    assert len(holders[INTERMEDIATE]) >= 60
    assert len(holders[POOLER]) >= 44
    assert sum(bool(folder.blocks) for folder in folders) >= 126  # as in transformers 5.0; 166 in 5.23
    assert all(holders.values()), "a block that no class of transformers has"

    page = families.PAGE.read_text()
    if f"transformers {transformers.__version__}." not in page:
        return  # the rest is of another version
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")][1:]
    assert [row[:2] for row in rows] == [[folder.name, ", ".join(folder.types)] for folder in folders]
    for row, folder in zip(rows, folders, strict=True):
        model, alone = (cell.split(", ") if cell else [] for cell in row[2:4])
        left = row[4].split("; ") if row[4] else []
        named = [*model, *alone, *(entry.partition(":")[0] for entry in left)]
        assert sorted(named) == sorted([*folder.blocks, *folder.others])
        assert {f"{name}: {reason}" for name, reason in folder.others.items()} <= set(left)
    served = [row for row in rows if row[2] or row[3]]
    assert len(served) >= 62
    assert f"**{len(served)} of {len(rows)} model folders" in page
    assert "DIFFERS" not in page


@pytest.mark.slow
def test_the_page_is_what_the_command_writes(tmp_path: Path) -> None:
    command = [sys.executable, "tests/support/families.py", "--out", str(tmp_path / "page.md")]
    root = families.PAGE.parent.parent
    subprocess.run(command, cwd=root, env=os.environ | {"PYTHONPATH": "."}, check=True)
    assert (tmp_path / "page.md").read_text() == families.PAGE.read_text()
