"""torch.compile on models with fused encoders: results, graph breaks and recompiles (docs/design/encoder.md)."""

import copy

import pytest
import torch
from encoders import build, difference, inputs_of, mask_of

from bert_fused import fuse

BATCHES = ("right", "single", "interior", "none", "right")


@pytest.fixture(autouse=True)
def _plain_kernels(monkeypatch):
    monkeypatch.setenv("BERT_FUSED_DISABLE", "1")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counter:
    """A backend that counts the graphs it is given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


def run(name: str, **options):
    """A compiled fused model on several batches against Hugging Face's; graphs after each batch."""
    theirs = build(name)
    ours = copy.deepcopy(theirs)
    fuse(ours, **options)
    counter = Counter()
    compiled = torch.compile(ours, backend=counter)
    graphs = []
    for pattern in BATCHES:
        batch, keep = inputs_of(name, mask_of(pattern)), mask_of(pattern).bool()
        with torch.no_grad():
            mine, other = compiled(**batch)[0], theirs(**batch)[0]
        if mine.shape[:2] == keep.shape:
            mine, other = mine[keep], other[keep]
        assert difference(mine, other) <= 1e-5, pattern
        graphs.append(counter.graphs)
    return graphs


def test_cls_only_is_one_graph() -> None:
    assert run("BertForSequenceClassification", cls_only="auto") == [1] * 5


@pytest.mark.parametrize(("name", "most"), [("BertModel", 24), ("BertForSequenceClassification", 26)])
def test_unpadding_breaks_the_graph_and_soon_stops_compiling(name, most) -> None:
    """Broken where tokens are counted, and in each layer's attention on a CPU; other lengths are compiled for once.

    A batch without padding is compiled for once as well, or finds torch's limit of recompilations reached.
    """
    first, second, third, without_padding, last = run(name, unpad=True, cls_only="auto")
    assert 3 < first < second == third <= without_padding == last <= most


def test_whole_graphs_are_to_be_had_without_unpadding_only() -> None:
    model = build("BertModel")
    fuse(model, unpad=True)
    batch = inputs_of("BertModel", mask_of("right"))
    with torch.no_grad(), pytest.raises(torch._dynamo.exc.Unsupported, match="disable"):
        torch.compile(model, backend="eager", fullgraph=True)(**batch)
    torch._dynamo.reset()
    fuse(model)
    with torch.no_grad():
        torch.compile(model, backend="eager", fullgraph=True)(**batch)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, where it resumes after a graph break
def test_gradients_of_a_compiled_model() -> None:
    theirs = build("BertForSequenceClassification").train()
    ours = copy.deepcopy(theirs)
    fuse(ours, unpad=True)
    compiled = torch.compile(ours, backend="aot_eager")
    batch = inputs_of("BertForSequenceClassification", mask_of("right"))
    for model in (compiled, theirs):
        model(**batch).logits.square().sum().backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)
