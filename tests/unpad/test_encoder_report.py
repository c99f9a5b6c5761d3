"""What the report says of an encoder: why it is left alone, and when it will run dense."""

import torch
import transformers
from encoders import BATCH, build
from models import SIZES
from torch import nn

from bert_fused import fuse


def reason(model: nn.Module, name: str, **options) -> str:
    report = fuse(model, **(options or {"unpad": True}))
    assert name not in report.fused
    return report.skipped[name]


def test_report_says_why_an_encoder_is_left_alone() -> None:
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
    expected = model(**BATCH)
    assert reason(model, "bert.encoder") == "what Reranker reads of it is not known"
    assert torch.equal(model(**BATCH), expected)
    assert "encoder" in fuse(model.bert, unpad=True).fused

    class Mean(transformers.BertForSequenceClassification):
        def forward(self, input_ids, attention_mask=None):
            return self.bert(input_ids, attention_mask=attention_mask).last_hidden_state.mean(1)

    assert "Mean reads of it is not known" in reason(Mean(model.config), "bert.encoder", cls_only="auto")
