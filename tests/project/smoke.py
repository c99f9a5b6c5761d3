"""Use an installed bert_fused as a newcomer would, in Triton's interpreter: ``TRITON_INTERPRET=1 python smoke.py``.

test_packaging.py and release.py run this with the Python of an environment in which the wheel is installed. It prints
the versions that it ran on as JSON; an exception is a failure.
"""

import json
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch
import transformers
import triton
from transformers import BertConfig, BertForSequenceClassification

import bert_fused
from bert_fused.reference import error_bound

HERE = Path(sysconfig.get_path("purelib"))
assert Path(bert_fused.__file__).is_relative_to(HERE), bert_fused.__file__
# Hugging Face's package has this name; the wheel must not take it.
assert not (HERE / "kernels").exists() or "bert_fused" not in (HERE / "kernels" / "__init__.py").read_text()

torch.manual_seed(0)
config = BertConfig(
    vocab_size=50, hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_labels=3
)
model = BertForSequenceClassification(config).eval()
inputs = {"input_ids": torch.randint(1, 50, (3, 7)), "attention_mask": torch.ones(3, 7, dtype=torch.long)}
inputs["attention_mask"][1, 4:] = 0
before = model(**inputs).logits

report = bert_fused.fuse(model)
assert len(report.fused) == 3, report
assert set(report.paths.values()) == {"Triton"}, report
verified = bert_fused.verify(model, **inputs)
assert 0 < verified.max_abs_error < 1e-6, verified
model(**inputs).logits.square().sum().backward()
assert all(parameter.grad is not None for parameter in model.parameters())
with bert_fused.fused(model, unpad=True, cls_only="auto") as of_encoder:
    assert "bert.encoder" in of_encoder.fused, of_encoder
    assert bert_fused.verify(model, **inputs).max_abs_error < 1e-6
bert_fused.unfuse(model)
assert torch.equal(model(**inputs).logits, before)

for dtype in (torch.float32, torch.float16):
    x, weight, bias = (torch.randn(shape).to(dtype).requires_grad_() for shape in ((5, 48), (24, 48), (24,)))
    y = bert_fused.linear_act(x, weight, bias)
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in (x, weight, bias)]
    exact = torch.nn.functional.gelu(torch.nn.functional.linear(*exact_inputs))
    bound = error_bound(x.detach(), weight.detach(), bias.detach(), "gelu", exact.detach(), dtype)
    assert bool(((y.double() - exact).abs() <= bound).all())
    y.sum().backward()
    exact.sum().backward()
    for ours, theirs in zip((x, weight, bias), exact_inputs, strict=True):
        error = (ours.grad.double() - theirs.grad).abs().max() / theirs.grad.abs().max()
        assert float(error) < 4 * torch.finfo(dtype).eps + 1e-5, error


with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    command = [sysconfig.get_path("scripts") + "/bert-fused", "check", folder, "--seconds=0", "--tokens=9", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["verified"] is True
versions = {module.__name__: module.__version__ for module in (torch, triton, transformers, bert_fused)}
print(json.dumps(versions | {"python": sys.version.split()[0]}))
