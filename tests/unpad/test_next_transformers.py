"""The next transformers, made of the installed one: arguments renamed, added and made keyword-only on the way down.

Results stay the unfused model's. Where the encoder runs dense for it, the report or the log says what was not known.
"""

import ast
import copy
import importlib.util
import logging
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from encoders import (
    TOLERANCE,
    difference,
    inputs_of,
    mask_of,
    watched,
)
from models import SIZES, drawn
from transformers import BertConfig
from transformers.models.bert import modeling_bert

from bert_fused import fuse
from bert_fused.unpad import encoder

# Class -> how its instances are called in the file.
CALLED = {
    "BertEncoder": "self.encoder",
    "BertLayer": "layer_module",
    "BertAttention": "self.attention",
    "BertSelfAttention": "self.self",
}
CHANGES = (
    "hidden_states renamed",
    "attention_mask renamed",
    "cache renamed",
    "added",
    "added and given",
    "keyword-only",
)


@pytest.fixture(autouse=True)
def _plain_kernels(monkeypatch) -> None:
    monkeypatch.setenv("BERT_FUSED_DISABLE", "1")
    encoder._log_dense.cache_clear()


class Change(ast.NodeTransformer):
    """A change of one class's ``forward`` and of all its calls."""

    def __init__(self, kind: str, change: str, positional: list[str]) -> None:
        self.kind, self.change, self.positional = kind, change, positional
        old = change.removesuffix(" renamed")
        if old == "cache":
            old = next(name for name in positional if name in ("cache", "past_key_values"))
        self.renamed = (old, f"next_{old}") if "renamed" in change else ("", "")

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        if node.name == self.kind:
            (forward,) = [child for child in node.body if getattr(child, "name", "") == "forward"]
            self.change_forward(forward)
        self.generic_visit(node)
        return node

    def change_forward(self, forward: ast.FunctionDef) -> None:
        old, new = self.renamed
        for inner in ast.walk(forward):
            if isinstance(inner, ast.Name) and inner.id == old:
                inner.id = new
            elif isinstance(inner, ast.arg) and inner.arg == old:
                inner.arg = new
        if old:
            # An old name's deprecation refers to the new one, which is gone.
            forward.decorator_list = []
        arguments = forward.args
        if self.change.startswith("added"):
            arguments.args.insert(2, ast.arg("scale"))
            arguments.defaults.insert(0, ast.Constant(1.0))
            forward.body.insert(0, ast.parse("hidden_states = hidden_states * scale").body[0])
        elif self.change == "keyword-only":
            arguments.kwonlyargs = arguments.args[2:]
            arguments.kw_defaults = [ast.Constant(None) for _ in arguments.kwonlyargs]
            arguments.args, arguments.defaults = arguments.args[:2], []

    def visit_Call(self, node: ast.Call) -> ast.Call:
        self.generic_visit(node)
        if ast.unparse(node.func) != CALLED[self.kind]:
            return node
        old, new = self.renamed
        for keyword in node.keywords:
            if keyword.arg == old:
                keyword.arg = new
        if self.change == "added and given":
            node.args.insert(1, ast.Constant(1.5))
        elif self.change == "added" and len(node.args) > 1:
            node.args.insert(1, ast.Constant(1.0))
        elif self.change == "keyword-only":
            moved = zip(self.positional[1:], node.args[1:], strict=False)
            node.keywords[:0] = [ast.keyword(name, value) for name, value in moved]
            del node.args[1:]
        return node


def next_release(kind: str, change: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """transformers' file of BERT with a change, imported in the place of the installed one."""
    tree = ast.parse(Path(modeling_bert.__file__).read_text())
    code = getattr(modeling_bert, kind).forward
    while hasattr(code, "__wrapped__"):
        code = code.__wrapped__
    names = list(code.__code__.co_varnames[1 : code.__code__.co_argcount])
    path = folder / "modeling_bert.py"
    path.write_text(ast.unparse(ast.fix_missing_locations(Change(kind, change, names).visit(tree))))
    spec = importlib.util.spec_from_file_location(modeling_bert.__name__, path)
    assert spec is not None and spec.loader is not None  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, modeling_bert.__name__, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", CALLED)
def test_a_changed_argument_leaves_results_right(kind, change, tmp_path, monkeypatch, caplog) -> None:
    release = next_release(kind, change, tmp_path, monkeypatch)
    for name in ("BertModel", "BertForSequenceClassification", "BertForTokenClassification"):
        torch.manual_seed(0)
        theirs = drawn(getattr(release, name)(BertConfig(**SIZES))).eval()
        ours = copy.deepcopy(theirs)
        with caplog.at_level(logging.WARNING, "bert_fused"):
            report = fuse(ours, unpad=True, cls_only="auto")
            packed = 0
            for pattern in ("right", "none", "left"):
                for training in (False, True):
                    for options in ({}, {"output_hidden_states": True}):
                        inputs, keep = inputs_of(name, mask_of(pattern)) | options, mask_of(pattern).bool()
                        with watched() as shapes:
                            mine = ours.train(training)(**inputs)
                        packed += len(shapes)
                        other = theirs.train(training)(**inputs)
                        for key in ("last_hidden_state", "pooler_output", "logits"):
                            if key in other:
                                a, b = mine[key], other[key]
                                a, b = (a[keep], b[keep]) if a.shape[:2] == keep.shape else (a, b)
                                assert difference(a, b) <= TOLERANCE, (name, pattern, training, options)
        if (kind, change) == ("BertEncoder", "added and given"):
            assert packed == 0  # it may be per token, and rows are packed by the time that the layers run
        if not packed or "does not know" in caplog.text:
            said = " ".join(report.skipped.values()) + caplog.text
            assert kind in said, (name, said)
            assert any(word in said for word in ("scale", "hidden_states", "attention_mask")), said
