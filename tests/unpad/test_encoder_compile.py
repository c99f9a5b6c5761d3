"""torch.compile on models with fused encoders: results, graph breaks and recompiles (docs/design/encoder.md)."""

import pytest
import torch
from encoders import BATCH, difference, inputs_of, mask_of, pair
from models import gradients

from bert_fused import fuse

BATCHES = ("right", "single", "interior", "none", "right")


@pytest.fixture(autouse=True)
def fresh_compiler():
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
    ours, theirs = pair(name, **options)
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


@pytest.mark.slow
@pytest.mark.parametrize(("name", "most"), [("BertModel", 24), ("BertForSequenceClassification", 26)])
def test_unpadding_breaks_the_graph_and_soon_stops_compiling(name, most) -> None:
    """Broken where tokens are counted, and in each layer's attention on a CPU; other lengths are compiled for once.

    A batch without padding is compiled for once as well, or finds torch's limit of recompilations reached.
    """
    first, second, third, without_padding, last = run(name, unpad=True, cls_only="auto")
    assert 3 < first < second == third <= without_padding == last <= most


def test_a_whole_graph_needs_unpad_off() -> None:
    model, _ = pair(config={"num_hidden_layers": 1}, unpad=True)
    with torch.no_grad(), pytest.raises(torch._dynamo.exc.Unsupported, match="disable"):
        torch.compile(model, backend="eager", fullgraph=True)(**BATCH)
    torch._dynamo.reset()
    fuse(model)
    with torch.no_grad():
        torch.compile(model, backend="eager", fullgraph=True)(**BATCH)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, where it resumes after a graph break
def test_a_compiled_model_gives_the_same_gradients() -> None:
    ours, theirs = pair("BertForSequenceClassification", config={"num_hidden_layers": 1}, unpad=True)
    ours.train(), theirs.train()
    compiled = torch.compile(ours, backend="aot_eager")
    for model in (compiled, theirs):
        model(**BATCH).logits.square().sum().backward()
    torch.testing.assert_close(gradients(ours), gradients(theirs), rtol=1e-4, atol=1e-5)
