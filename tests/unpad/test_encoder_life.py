"""What fusing an encoder leaves as it was, what is reported, and that copies of a fused model are fused models."""

import copy
import functools
import io
import pickle
import types

import pytest
import torch
import transformers
from encoders import FAMILIES, MODELS, build, difference, inputs_of, mask_of, watched
from models import SIZES
from torch import nn

from bert_fused import fuse, fused, unfuse, verify
from bert_fused.hf.modules import original_class
from bert_fused.unpad.encoder import FusedEncoder
from bert_fused.unpad.hooks import sentence_transformer_pre_hook
from bert_fused.unpad.packing import Packing

NAME = "BertForSequenceClassification"
MASK = mask_of("right")
RAN = [(int(MASK.sum()),), (4,)]


@pytest.fixture(autouse=True)
def _plain_kernels(monkeypatch) -> None:
    monkeypatch.setenv("BERT_FUSED_DISABLE", "1")


def made(name: str = NAME, **options):
    model = build(name)
    fuse(model, **(options or {"unpad": True, "cls_only": "auto"}))
    return model


def assert_works(model: nn.Module, theirs: nn.Module, name: str = NAME, expected=RAN) -> None:
    batch = inputs_of(name, MASK)
    with watched() as shapes:
        mine = model(**batch)[0]
    assert shapes == expected
    assert difference(mine, theirs(**batch)[0]) <= 1e-5


def state_of(model: nn.Module) -> list:
    """All that fusing might touch."""
    hooks = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks")
    return [
        (type(m), sorted(m.__dict__), [list(getattr(m, h).values()) for h in hooks], list(m._parameters.values()))
        for m in model.modules()
    ]


@pytest.mark.parametrize("name", MODELS)
def test_unfuse_restores_everything(name) -> None:
    model = build(name)
    before, keys, batch = state_of(model), list(model.state_dict()), inputs_of(name, MASK)
    expected = model(**batch)[0]
    options = {"unpad": True, "cls_only": "auto", "skip_pooler": True, "recompute_preact": True}
    fuse(model, **options)
    assert list(model.state_dict()) == keys
    model(**batch)
    unfuse(model)
    assert state_of(model) == before
    assert torch.equal(model(**batch)[0], expected)
    with fused(model, **options):
        assert state_of(model) != before
    assert state_of(model) == before


def test_fusing_again_changes_options_and_fused_leaves_them() -> None:
    model, theirs = made(), build(NAME)
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    report = fuse(model, unpad=True, cls_only="auto")
    assert "bert.encoder" in report.fused
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks
    with fused(model) as report:
        assert_works(model, theirs)
    with fused(model, unpad=True):
        assert_works(model, theirs)
    assert_works(model, theirs)
    fuse(model, unpad=True)
    assert_works(model, theirs, expected=[RAN[0]] * 2)
    fuse(model)
    assert not isinstance(model.bert.encoder, FusedEncoder)
    assert_works(model, theirs, expected=[])


def test_plain_fuse_leaves_the_encoder_alone() -> None:
    model = build(NAME)
    hooks = [dict(m._forward_pre_hooks) for m in model.modules()]
    assert "bert.encoder" not in fuse(model).fused
    assert type(model.bert.encoder).__name__ == "BertEncoder"
    assert [dict(m._forward_pre_hooks) for m in model.modules()] == hooks


def test_verify_compares_real_tokens_and_restores_options() -> None:
    for name in ("BertModel", "BertForTokenClassification", "BertForSequenceClassification"):
        model = made(name)
        before = state_of(model)
        with watched() as shapes:
            assert verify(model, **inputs_of(name, MASK)).max_abs_error < 1e-5
        assert len(shapes) == 2
        assert verify(model, *inputs_of(name, MASK).values()).max_abs_error < 1e-5
        assert state_of(model) == before


def test_verify_sees_an_error_at_a_real_token(monkeypatch) -> None:
    restore = Packing.restore
    monkeypatch.setattr(Packing, "restore", lambda packing, rows: restore(packing, rows.roll(1, 0)))
    assert verify(made("BertModel"), **inputs_of("BertModel", MASK)).max_abs_error > 0.1


def test_copies_and_pickles() -> None:
    model, theirs = made(), build(NAME)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert isinstance(other.bert.encoder, FusedEncoder)
        assert_works(other, theirs)
        unfuse(other)
        assert state_of_classes(other) == state_of_classes(theirs)
        assert not any(m._forward_pre_hooks for m in other.modules())
    assert_works(model, theirs)


def state_of_classes(model: nn.Module) -> list[type]:
    return [type(m) for m in model.modules()]


def test_save_pretrained(tmp_path) -> None:
    model = made()
    model.save_pretrained(tmp_path)
    loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    assert type(loaded.bert.encoder).__name__ == "BertEncoder"
    assert_works(model, loaded)


def test_data_parallel_replicas_use_their_own_weights() -> None:
    model = made("ElectraModel")
    replica = model._replicate_for_data_parallel()
    replica.encoder = model.encoder._replicate_for_data_parallel()
    replica.encoder.layer = copy.deepcopy(model.encoder.layer)
    theirs = build("ElectraModel")
    with torch.no_grad():
        for m in (replica, theirs):
            for parameter in m.encoder.layer.parameters():
                parameter.mul_(1.5)
    keep = MASK.bool()
    with watched() as shapes:
        mine = replica(**inputs_of("ElectraModel", MASK))[0][keep]
    assert shapes == [RAN[0]] * 2
    assert difference(mine, theirs(**inputs_of("ElectraModel", MASK))[0][keep]) <= 1e-5
    wrapped = nn.DataParallel(made())
    assert_works(wrapped, build(NAME))


def test_an_encoder_unfused_alone() -> None:
    model, theirs = made(), build(NAME)
    unfuse(model.bert.encoder)
    assert_works(model, theirs, expected=[])


def reason(model: nn.Module, name: str, **options) -> str:
    report = fuse(model, **(options or {"unpad": True}))
    assert name not in report.fused
    return report.skipped[name]


def test_report_of_what_cannot_be_done() -> None:
    assert "reads padded positions" in reason(build("RobertaForQuestionAnswering"), "roberta.encoder")
    assert "it is a decoder" in reason(build("BertModel", is_decoder=True), "encoder")
    decoder = build("BertModel", is_decoder=True, add_cross_attention=True)
    assert "it is a decoder" in reason(decoder, "encoder")
    biased = build("BertModel", position_embedding_type="relative_key")
    assert "relative_key position embeddings" in reason(biased, "encoder")
    mean = build("ElectraForMultipleChoice", summary_type="mean")
    assert "reads padded positions" in reason(mean, "electra.encoder")
    hooked = build("BertModel")
    hooked.encoder.layer[1].register_forward_hook(lambda m, i, o: None)
    assert reason(hooked, "encoder") == "layer 1 has hooks"
    nothing = fuse(build("BertModel"), cls_only="auto")
    assert "who reads it is not known" in nothing.skipped["encoder"]
    with pytest.raises(ValueError, match="cls_only must be"):
        fuse(build("BertModel"), cls_only="yes")


def test_report_says_when_a_batch_runs_dense() -> None:
    said = "dense where position 0 of a sequence is padding"
    assert said in fuse(build("BertModel"), unpad=True).paths["encoder"]
    assert said in fuse(build("RobertaForSequenceClassification"), unpad=True).paths["roberta.encoder"]
    assert said not in fuse(build("BertForTokenClassification"), unpad=True).paths["bert.encoder"]
    assert said not in fuse(build("ElectraModel"), unpad=True).paths["encoder"]
    assert said not in fuse(build("BertModel"), unpad=True, skip_pooler=True).paths["encoder"]


def test_other_families_keep_the_fused_modules_they_had() -> None:
    config = transformers.MPNetConfig(**(SIZES | {"pad_token_id": 1}))
    model = transformers.MPNetModel(config)
    report = fuse(model, unpad=True)
    assert report.fused == ("encoder.layer.0.intermediate", "encoder.layer.1.intermediate", "pooler")
    assert "holds no whole model of the families" in report.skipped[""]
    alone = fuse(build("BertModel").encoder, unpad=True)
    assert "holds no whole model of the families" in alone.skipped[""]
    assert len(alone.fused) == 2


class Reranker(transformers.BertPreTrainedModel):
    """A user's own head, which reads padding."""

    def __init__(self, config):
        super().__init__(config)
        self.bert = transformers.BertModel(config)
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        return self.bert(input_ids, attention_mask=attention_mask).last_hidden_state.mean(1)


def test_heads_that_are_not_known_are_left_alone_unless_told() -> None:
    model = Reranker(transformers.BertConfig(**SIZES)).eval()
    batch = inputs_of("BertModel", MASK)
    expected = model(**batch)
    assert reason(model, "bert.encoder") == "what Reranker reads of it is not known"
    assert torch.equal(model(**batch), expected)
    assert "encoder" in fuse(model.bert, unpad=True).fused

    class Mean(transformers.BertForSequenceClassification):
        def forward(self, input_ids, attention_mask=None):
            return self.bert(input_ids, attention_mask=attention_mask).last_hidden_state.mean(1)

    assert "Mean reads of it is not known" in reason(Mean(model.config), "bert.encoder", cls_only="auto")


class MeanPooler(nn.Module):
    def forward(self, hidden_states):
        return hidden_states.mean(1)


class MeanClassifier(nn.Module):
    def forward(self, features):
        return features.mean(1)[:, :2]


def set_pooler(model):
    model.base_model.pooler = MeanPooler()


def set_classifier(model):
    model.classifier = MeanClassifier()


def patch_pooler(model):
    model.base_model.pooler.forward = lambda hidden: hidden.mean(1)


CHANGES = {
    "pooler": (NAME, set_pooler),
    "patched pooler": (NAME, patch_pooler),
    "classifier": ("RobertaForSequenceClassification", set_classifier),
    "pooler of the model itself": ("BertModel", set_pooler),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_parts_that_read_more_than_position_0(change, when) -> None:
    name, apply = CHANGES[change]
    theirs, ours = build(name), build(name)
    apply(theirs)
    if when == "before":
        apply(ours)
    report = fuse(ours, unpad=True, cls_only="auto")
    assert any(where.endswith("encoder") for where in report.skipped) == (when == "before")
    if when == "after":
        apply(ours)
    batch = inputs_of(name, MASK)
    with watched() as shapes:
        mine = ours(**batch)
    assert shapes == []
    for a, b in zip(mine.values(), theirs(**batch).values(), strict=True):
        assert difference(a, b) <= 1e-5


@pytest.mark.parametrize("part", ["BertLayer", "BertAttention", "BertSelfAttention", NAME, "BertModel"])
def test_a_forward_replaced_on_a_class(part, monkeypatch) -> None:
    from transformers.models.bert import modeling_bert

    ours, theirs = made(), build(NAME)
    kind = getattr(modeling_bert, part)
    original = kind.forward
    calls = []

    @functools.wraps(original)
    def replaced(self, *args, **kwargs):
        calls.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", replaced)
    with watched() as shapes:
        ours(**inputs_of(NAME, MASK))
    assert shapes == []
    assert calls
    assert_works(ours, theirs, expected=[])


def mean_instead(model: nn.Module) -> None:
    """What is at padding has a say in the logits."""

    def forward(self, input_ids, attention_mask=None, **kwargs):
        hidden = self.bert(input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state
        return (self.classifier(hidden.mean(1)),)

    model.forward = types.MethodType(forward, model)


def another_mask(module: nn.Module) -> None:
    """More tokens than the caller said, for what runs below."""
    theirs = type(module).forward

    def forward(self, *args, attention_mask=None, **kwargs):
        if attention_mask is not None:
            attention_mask = torch.ones_like(attention_mask)
        return theirs(self, *args, attention_mask=attention_mask, **kwargs)

    module.forward = types.MethodType(forward, module)


def no_mask(module: nn.Module) -> None:
    theirs = type(module).forward

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        return theirs(self, hidden_states, None, **kwargs)

    module.forward = types.MethodType(forward, module)


REPLACED = {
    "head": ("", mean_instead, "what BertForSequenceClassification reads of it is not known"),
    "base": ("bert", another_mask, "BertModel has a forward of its own"),
    "encoder": ("bert.encoder", no_mask, "BertEncoder has a forward of its own"),
}


@pytest.mark.parametrize("part", REPLACED)
@pytest.mark.parametrize("cls_only", [False, "auto"])
def test_a_forward_replaced_on_an_instance(part, cls_only) -> None:
    where, replace, said = REPLACED[part]
    ours, theirs = made(NAME, unpad=True, cls_only=cls_only), build(NAME)
    for model in (ours, theirs):
        replace(model.get_submodule(where))
    assert_works(ours, theirs, expected=[])
    unfuse(ours)
    assert said in reason(ours, "bert.encoder", unpad=True, cls_only=cls_only)
    assert_works(ours, theirs, expected=[])
    del ours.get_submodule(where).forward
    fuse(ours, unpad=True, cls_only="auto")
    assert_works(ours, build(NAME))


def test_accelerates_hooks_run_dense() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    ours, theirs = made(), build(NAME)
    hooks.add_hook_to_module(ours, hooks.ModelHook())
    assert_works(ours, theirs, expected=[])


def test_a_layer_of_another_kind() -> None:
    class Quiet(nn.Module):
        def forward(self, hidden):
            return hidden - hidden.mean((0, 1), keepdim=True)

    ours, theirs = made("BertModel"), build("BertModel")
    for model in (ours, theirs):
        model.encoder.layer[0].output.dropout = Quiet()
    with watched() as shapes:
        mine = ours(**inputs_of("BertModel", MASK))
    assert shapes == []
    assert torch.equal(mine[0], theirs(**inputs_of("BertModel", MASK))[0])


class Neighbours(nn.LSTM):
    """As wide as its input, and its output alone."""

    __module__ = nn.LSTM.__module__

    def __init__(self, width=32):
        super().__init__(32, width // 2, bidirectional=True, batch_first=True)

    def forward(self, hidden):
        return super().forward(hidden)[0]


# Modules of torch that take a layer's hidden states and mix tokens, and sequences, or take other dimensions for them.
MIXING = {
    "LSTM": Neighbours,
    "convolution": lambda: nn.Conv1d(7, 7, 3, padding=1),
    "pooling": lambda: nn.AvgPool2d((3, 1), 1, (1, 0)),
    "softmax": lambda: nn.Softmax(-2),
    "group norm": lambda: nn.GroupNorm(1, 7),
    "channels of an activation": lambda: nn.PReLU(7),
    "channels of dropout": lambda: nn.Dropout1d(0.0),
}


@pytest.mark.parametrize("part", MIXING)
def test_modules_of_torch_that_mix_tokens_in_a_layer(part) -> None:
    ours, theirs = made("BertModel"), build("BertModel")
    torch.manual_seed(0)
    mixing = MIXING[part]()
    for model in (ours, theirs):
        model.encoder.layer[0].output.dropout = mixing
    assert_works(ours, theirs, "BertModel", expected=[])
    assert type(mixing).__name__ in reason(ours, "encoder")


READERS = {
    "BertForTokenClassification": ("classifier", 2),
    "ElectraForTokenClassification": ("dropout", 32),
    "BertForMaskedLM": ("cls.predictions.transform", 32),
    "RobertaForMaskedLM": ("lm_head.layer_norm", 32),
    "ElectraForPreTraining": ("discriminator_predictions.dense", 32),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_heads_over_tokens_that_mix_them(name, when) -> None:
    ours, theirs = build(name), build(name)
    where, width = READERS[name]
    torch.manual_seed(0)
    mixing = Neighbours(width)
    theirs.set_submodule(where, mixing)
    if when == "before":
        ours.set_submodule(where, mixing)
    report = fuse(ours, unpad=True)
    said = report.skipped.get(f"{ours.base_model_prefix}.encoder", "")
    assert ("reads padded positions" in said) == (when == "before")
    ours.set_submodule(where, mixing)
    keep = MASK.bool()
    batch = inputs_of(name, MASK)
    with watched() as shapes:
        mine = ours(**batch)[0][keep]
    assert shapes == []
    assert difference(mine, theirs(**batch)[0][keep]) <= 1e-5


def test_skipped_pooler() -> None:
    for family in FAMILIES[:4]:
        name = f"{family}Model"
        model, theirs = made(name, skip_pooler=True, unpad=True), build(name)
        for pattern in ("right", "left"):
            batch, keep = inputs_of(name, mask_of(pattern)), mask_of(pattern).bool()
            with watched() as shapes:
                mine = model(**batch)
            assert len(shapes) == 2
            assert mine.pooler_output is None
            assert difference(mine.last_hidden_state[keep], theirs(**batch).last_hidden_state[keep]) <= 1e-5
        unfuse(model)
        assert model(**batch).pooler_output is not None
    model = build(NAME)
    assert "skipped" not in fuse(model, skip_pooler=True).paths["bert.pooler"]
    assert_works(model, build(NAME), expected=[])


def test_export_and_jit_trace_run_dense() -> None:
    model = made("BertModel")
    batch = inputs_of("BertModel", MASK)
    expected = build("BertModel")(**batch)[0]
    with torch.no_grad():
        exported = torch.export.export(model, (), batch).module()
        assert difference(exported(**batch)[0], expected) <= 1e-5


def test_meta_device() -> None:
    model = made("BertModel").to("meta")
    ids = torch.zeros(4, 7, dtype=torch.long, device="meta")
    mask = torch.zeros(4, 1, 7, 7, dtype=torch.bool, device="meta")
    assert model(ids, mask)[0].shape == (4, 7, 32)


def test_threads_share_a_model() -> None:
    import threading

    model, theirs = made("BertModel"), build("BertModel")
    failures = []

    def work(pattern: str) -> None:
        try:
            batch, keep = inputs_of("BertModel", mask_of(pattern)), mask_of(pattern).bool()
            with torch.no_grad():
                expected = theirs(**batch)[0][keep]
                for turn in range(20):
                    if pattern == "right":
                        [fuse, unfuse][turn % 2](model, **[{"unpad": True}, {}][turn % 2])
                    assert difference(model(**batch)[0][keep], expected) <= 1e-5
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(p,)) for p in ("right", "left", "single", "interior")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("where", ["", "bert", "bert.embeddings"])
def test_unfused_during_a_call(where, attention) -> None:
    """As another thread would, between any two steps of the call."""
    model, theirs = build(NAME, attention), build(NAME, attention)
    calls = []

    def interrupt(module, args):
        calls.append(module)
        unfuse(model)

    model.get_submodule(where).register_forward_pre_hook(interrupt)
    fuse(model, unpad=True, cls_only="auto")
    assert_works(model, theirs, expected=[])
    assert len(calls) == 1


@pytest.mark.parametrize("where", ["", "bert"])
def test_a_hook_asked_after_all_hooks_were_taken(where) -> None:
    """The hook was looked up before ``unfuse`` in another thread, which has not come to the encoder's class yet."""
    model = made()
    module = model.get_submodule(where)
    (hook,) = module._forward_pre_hooks.values()
    unfuse(model)
    model.bert.encoder.__class__ = FusedEncoder
    assert hook(module, (), inputs_of(NAME, MASK)) is None
    assert hook(module, ()) is None


def test_fused_during_a_call() -> None:
    """``fuse`` enters a hook before it is known that the hook takes keyword arguments."""
    model, theirs = made(), build(NAME)
    for module in (model, model.bert):
        module._forward_pre_hooks_with_kwargs.clear()
    assert_works(model, theirs, expected=[])


def test_sentence_transformers_hook_without_keyword_arguments() -> None:
    assert sentence_transformer_pre_hook(nn.Identity(), ({},)) is None


def test_original_class_of_an_encoder() -> None:
    assert original_class(made().bert.encoder).__name__ == "BertEncoder"
