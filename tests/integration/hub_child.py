"""Layers in the Kernel Hub's layout, put into a model by Hugging Face's own ``kernelize``; run by test_hub.py.

``TRITON_INTERPRET=1 python hub_child.py FOLDER alone|beside``; beside: bert_fused is imported as well.
"""

import copy
import sys
from pathlib import Path

import torch
from transformers import BertConfig, BertModel
from transformers.models.bert.modeling_bert import BertIntermediate, BertPooler

import kernels
from kernels import LocalLayerRepository, Mode, kernelize, replace_kernel_forward_from_hub, use_kernel_mapping

folder, company = Path(sys.argv[1]), sys.argv[2]
assert kernels.__file__ is not None, "the folder kernels/ of a checkout, not Hugging Face's package"
assert "bert_fused" not in sys.modules
if company == "beside":
    import bert_fused

torch.manual_seed(0)
config = BertConfig(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
plain = BertModel(config)
model = copy.deepcopy(plain)
inputs = {"input_ids": torch.randint(1, 50, (2, 5))}

for kind in (BertIntermediate, BertPooler):
    replace_kernel_forward_from_hub(kind, kind.__name__)
names = ("BertIntermediate", "BertPooler")
mapping = {name: {"cpu": LocalLayerRepository(repo_path=folder, layer_name=name)} for name in names}
with use_kernel_mapping(mapping, inherit_mapping=False):
    model = kernelize(model, mode=Mode.TRAINING | Mode.TORCH_COMPILE, device="cpu", use_fallback=False)

(loaded,) = kernels.get_loaded_kernels()
ours = loaded.metadata.id
assert model.pooler.forward.__func__.__module__ == f"{ours}.layers"
assert (company == "beside") == ("bert_fused" in sys.modules), "the layers need nothing that is installed"

__import__(f"{ours}.kernels.plan")
Launch = sys.modules[f"{ours}.kernels.plan"].Launch
launch, launches = Launch.__call__, []


def counted(self, *tensors):
    launches.append(self.constants["ACTIVATION"])
    launch(self, *tensors)


Launch.__call__ = counted
outputs, expected = model(**inputs), plain(**inputs)
assert launches == ["gelu", "gelu", "tanh"], launches
for mine, theirs in zip(outputs.values(), expected.values(), strict=True):
    error = float((mine - theirs).detach().abs().max())
    assert 0 < error < 2e-6, error
(outputs.last_hidden_state.square().sum() + outputs.pooler_output.sum()).backward()
(expected.last_hidden_state.square().sum() + expected.pooler_output.sum()).backward()
for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
    error = float((mine.grad - theirs.grad).abs().max() / theirs.grad.abs().max().clamp_min(1e-3))
    assert error < 2e-5, (name, error)

compiled = torch.compile(model.encoder.layer[0].intermediate, backend="aot_eager", fullgraph=True)
x = torch.randn(2, 5, 32)
torch.testing.assert_close(compiled(x), plain.encoder.layer[0].intermediate(x))

# What is not a plain linear layer with exact GELU computes what it would without us.
launches.clear()
model.encoder.layer[0].intermediate.dense.register_forward_hook(lambda module, args, out: out * 2)
model.encoder.layer[1].intermediate.intermediate_act_fn = torch.nn.GELU(approximate="tanh")
model.pooler.activation = torch.nn.ReLU()
pooled = model(**inputs).pooler_output
assert launches == []
assert bool((pooled >= 0).all())

if company == "beside":
    report = bert_fused.fuse(BertModel(config))
    assert len(report.fused) == 3
    refused = bert_fused.fuse(model)
    assert refused.skipped["pooler"] == "its forward was replaced on the instance"
