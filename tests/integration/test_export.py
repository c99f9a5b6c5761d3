"""Whole fused models under torch.compile, torch.export and AOTInductor. Packages load without bert_fused."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from models import assert_same, inputs, make
from torch import Tensor, nn
from transformers import BertForSequenceClassification, BertModel, PreTrainedModel

from bert_fused import fuse

# Loads a package in another process.
LOADER = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("bert_fused", "transformers", "triton"):
            raise ImportError(f"{{name}} is not here")

sys.meta_path.insert(0, Refuse())
import torch
batch, expected = torch.load({data!r})
{load}
for name in expected:
    error = float((out[name] - expected[name]).abs().max())
    assert error <= 2e-5 * max(1.0, float(expected[name].abs().max())), f"{{name}}: {{error}}"
assert "bert_fused" not in sys.modules
print("same", sorted(expected))
"""


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("grad", [False, True])
def test_a_compiled_model_is_one_graph_with_kernels(grad: bool, launches: list[str]) -> None:
    ours, theirs = make(BertForSequenceClassification), make(BertForSequenceClassification)
    assert len(fuse(ours).fused) == 3
    with torch.set_grad_enabled(grad):
        out = torch.compile(ours, fullgraph=True, backend="aot_eager")(**inputs())
        assert_same(out, theirs(**inputs()))
    assert launches == 3 * ["linear_act_fwd"]


@pytest.mark.slow
def test_gradients_by_inductor_are_eagers(launches: list[str]) -> None:
    ours, theirs = (make(BertForSequenceClassification).train() for _ in range(2))
    fuse(ours)
    compiled = torch.compile(ours, fullgraph=True)
    for model in (compiled, theirs):
        model(**inputs(), labels=torch.tensor([0, 1, 1])).loss.backward()
    assert launches == [*3 * ["linear_act_fwd"], *3 * ["act_bwd"]]
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


class Named(nn.Module):
    """Returns a plain dict: a class of transformers in a package's signature would make it ask for transformers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return dict(self.model(input_ids=input_ids, attention_mask=attention_mask))


def exported(kind: type[PreTrainedModel], **options: object) -> torch.export.ExportedProgram:
    """A fused model exported for batches of any size and length."""
    model = make(kind)
    assert len(fuse(model, **options).fused) >= 3
    shapes = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in inputs()}
    with torch.no_grad():
        return torch.export.export(Named(model), (), inputs(), dynamic_shapes=shapes)


def loads_elsewhere(folder: Path, kind: type[PreTrainedModel], load: str) -> None:
    """In a process with torch alone ``load`` computes ``out`` from ``batch``: it is the unfused model's output."""
    batch = inputs(rows=5, length=9)
    with torch.no_grad():
        expected = dict(make(kind)(**batch))
    data = folder / "data.pt"
    torch.save((batch, expected), data)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    done = subprocess.run(
        [sys.executable, "-c", LOADER.format(data=str(data), load=load)],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=folder,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"same {sorted(expected)}\n"


def test_an_exported_model_loads_without_bert_fused(tmp_path: Path) -> None:
    program = exported(BertForSequenceClassification, unpad=True, cls_only="auto")
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert {getattr(target, "namespace", "python") for target in targets} <= {"aten", "python"}
    package = str(tmp_path / "model.pt2")
    torch.export.save(program, package)
    load = f"out = torch.export.load({package!r}).module()(**batch)"
    loads_elsewhere(tmp_path, BertForSequenceClassification, load)


@pytest.mark.slow
def test_an_aotinductor_package_loads_without_bert_fused(tmp_path: Path) -> None:
    package = str(tmp_path / "model.pt2")
    torch._inductor.aoti_compile_and_package(exported(BertModel), package_path=package)
    loads_elsewhere(tmp_path, BertModel, f"out = torch._inductor.aoti_load_package({package!r})(**batch)")
