"""What the code of a class says: which chain of steps it is, and what the report says of a class that is none."""

import ast
import importlib
import textwrap

import families
import pytest
import transformers
from torch import nn
from transformers import (
    BartConfig,
    BertConfig,
    TimesformerConfig,
)
from transformers.models.bart.modeling_bart import BartEncoderLayer
from transformers.models.bert_generation.modeling_bert_generation import BertGenerationIntermediate
from transformers.models.timesformer.modeling_timesformer import TimesformerIntermediate

from bert_fused import fuse
from bert_fused.hf.modules import fused_class
from bert_fused.hf.recognize import block_of, read_chain

# Their code is something else: quantised, dropout, a norm before, conditions, an argument's attributes, gates.
OTHERS = {
    "ibert": ["IBertIntermediate"],
    "timesformer": ["TimesformerIntermediate"],
    "mobilebert": ["MobileBertPooler"],
    "cvt": ["CvtIntermediate"],
    "roberta_prelayernorm": ["RobertaPreLayerNormIntermediate"],
    "deberta": ["ContextPooler"],
    "beit": ["BeitPooler"],
    "mt5": ["MT5DenseGatedActDense"],
    "seed_oss": ["SeedOssMLP"],
    "bert": ["BertLayer", "BertSelfOutput", "BertOutput"],
    "albert": ["AlbertModel"],
}


@pytest.mark.parametrize("folder", OTHERS)
def test_classes_with_other_code_are_no_block(folder: str) -> None:
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
def test_one_chain_is_read_in_many_spellings(code: str) -> None:
    assert chain(code) == ("dense", "act")


def test_pooling_and_functions_are_steps() -> None:
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
def test_other_statements_are_no_chain(body: str) -> None:
    assert chain(f"def forward(self, x):\n  {body}") is None


def test_a_product_with_another_layer_is_a_step() -> None:
    body = "self.down(self.act(self.gate(x)) * self.up(x))"
    assert chain(f"def f(self, x):\n  return {body}") == ("gate", "act", "*up", "down")
    for other in (
        "self.down(self.up(x) * self.act(self.gate(x)))",
        "self.down(self.act(self.gate(x)) * self.up(y))",
        "self.down(self.act(self.gate(x)) * self.up(self.up(x)))",
        "self.down(self.act(self.gate(x)) * x)",
        "self.down(self.act(self.gate(x)) * gelu(x))",
        "self.down(self.act(self.gate(x)) * x[:, 0])",
        "self.down(self.act(self.gate(x)) * 2)",
        "self.down(self.act(self.gate(x)) + self.up(x))",
    ):
        assert chain(f"def f(self, x):\n  return {other}") is None


@pytest.mark.parametrize(
    ("body", "step"),
    [
        ("a, b = self.Wi(x).chunk(2, dim=-1); return self.Wo(self.act(a) * b)", "act(a)*b"),
        ("x = self.Wi(x); b, a = x.chunk(2, -1); x = b * self.act(a); return self.Wo(x)", "a*act(b)"),
        ("x = self.Wi(x); y = x.chunk(2, dim=-1); x = self.act(y[0]) * y[1]; return self.Wo(x)", "act(a)*b"),
        ("x = self.Wi(x); x = x.chunk(2, dim=-1); x = self.act(x[1]) * x[0]; x = self.Wo(x); return x", "a*act(b)"),
    ],
)
def test_a_gate_is_one_step_and_names_its_activated_half(body: str, step: str) -> None:
    assert chain(f"def forward(self, x):\n  {body}") == ("Wi", step, "Wo")


@pytest.mark.parametrize(
    "body",
    [
        "a, b = self.Wi(x).chunk(3, dim=-1); return self.Wo(self.act(a) * b)",
        "a, b, c = self.Wi(x).chunk(2, dim=-1); return self.Wo(self.act(a) * b)",
        "a, b = self.Wi(x).chunk(2, dim=1); return self.Wo(self.act(a) * b)",
        "a, b = self.Wi(x).chunk(2); return self.Wo(self.act(a) * b)",
        "a, b = self.Wi(x).split(2, dim=-1); return self.Wo(self.act(a) * b)",
        "a, a = self.Wi(x).chunk(2, dim=-1); return self.Wo(self.act(a) * a)",
        "a, self.b = self.Wi(x).chunk(2, dim=-1); return self.Wo(self.act(a) * self.b)",
        "self, b = self.Wi(x).chunk(2, dim=-1); return self.Wo(self.act(self) * b)",
        "a, b = self.Wi(x).chunk(2, dim=-1); return self.Wo(self.act(a) * a)",
        "a, b = self.Wi(x).chunk(2, dim=-1); return self.Wo(self.act(a) + b)",
        "a, b = self.Wi(x).chunk(2, dim=-1); return self.Wo(self.act(a) * b * 2)",
        "a, b = self.Wi(x).chunk(2, dim=-1); return self.Wo(self.act(a) * self.act(b))",
        "a, b = self.Wi(x).chunk(2, dim=-1); return self.Wo(self.act(a, 2) * b)",
        "a, b = self.Wi(x).chunk(2, dim=-1); return self.Wo(other.act(a) * b)",
        "a, b = self.Wi(x).chunk(2, dim=-1); a = self.act(a); return self.Wo(a * b)",
        "a, b = self.Wi(x).chunk(2, dim=-1); return self.Wo(self.act(x) * b)",
        "y = self.Wi(x).chunk(2, dim=-1); return self.Wo(self.act(y[0]) * y[0])",
        "y = self.Wi(x).chunk(2, dim=-1); return self.Wo(self.act(y[0]) * y[-1])",
        "y = self.Wi(x).chunk(2, dim=-1); return self.Wo(y)",
        "a, b = self.Wi(x); return self.Wo(self.act(a) * b)",
        "x = self.Wi(x); return self.Wo(self.act(x) * x)",
    ],
)
def test_what_only_looks_like_a_gate_is_no_chain(body: str) -> None:
    assert chain(f"def forward(self, x):\n  {body}") is None


@pytest.mark.parametrize("head", ["self", "self, x, y", "self, x=0", "self, *x", "self, x, *, y", "self, x, *y"])
def test_other_arguments_are_no_chain(head: str) -> None:
    assert chain(f"def forward({head}):\n  return self.act(self.dense(x))") is None


def test_a_decorated_method_is_no_chain() -> None:
    assert chain("@doubled\ndef forward(self, x):\n  return self.act(self.dense(x))") is None


def test_a_call_of_another_modules_part_is_no_step() -> None:
    assert chain("def f(self, x):\n  return self.act(self.layer.dense(x))") != ("dense", "act")
    assert chain("def f(self, x):\n  return self.act(other.dense(x))") != ("dense", "act")


def test_report_says_why_a_lookalike_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    intermediate = TimesformerIntermediate(TimesformerConfig(hidden_size=32, intermediate_size=37))
    chain = "dense > intermediate_act_fn > dropout"
    assert fuse(intermediate).skipped == {
        "": f"TimesformerIntermediate.forward ({chain}) is not among those that can be fused"
    }
    layer = BartEncoderLayer(BartConfig(d_model=32))
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
    block = BertGenerationIntermediate(BertConfig(hidden_size=32))
    monkeypatch.setattr(BertGenerationIntermediate, "forward", lambda self, x: x)
    assert fuse(block).skipped == {"": "its class's forward was replaced"}
    monkeypatch.undo()
    assert fuse(block).fused == ("",)
    assert "holds no module of transformers" in fuse(nn.Linear(2, 2)).skipped[""]
