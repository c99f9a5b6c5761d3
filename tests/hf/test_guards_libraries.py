"""Fused models under PEFT, torchao, torch.ao, accelerate and DataParallel."""

from collections.abc import Callable

import pytest
import torch
from blocks import KERNELS, PYTORCH, every_kind, fused_twins, hidden_states, linear, twins, when_fused
from models import assert_same, gradients, inputs, make
from torch import nn
from torch.nn.parallel import replicate
from transformers import BertModel

from bert_fused import fuse


@pytest.mark.parametrize("targets", ["intermediate.dense", r".*(intermediate|pooler)\.dense"], ids=["one", "both"])
@when_fused
def test_lora_runs_pefts_code_until_merged(when: str, targets: str, launches: list[str]) -> None:
    import peft

    def adapted(model: BertModel) -> nn.Module:
        torch.manual_seed(3)
        chosen = targets if "*" in targets else [targets]
        settings = peft.LoraConfig(r=2, target_modules=chosen, init_lora_weights=False)
        return peft.get_peft_model(model, settings).eval()

    plain = make()(**inputs())
    theirs = adapted(make())
    expected = theirs(**inputs())
    assert float((expected[0] - plain[0]).detach().abs().max()) > 0.01
    model = make()
    if when == "after":
        fuse(model)
    ours = adapted(model)
    report = fuse(ours)
    left = 1 if targets == "intermediate.dense" else 0
    assert len(report.fused) == left
    assert len(report.skipped) == 3 - left
    assert all("peft" in reason for reason in report.skipped.values())
    launches.clear()
    out = ours(**inputs())
    assert_same(out, expected)
    assert launches == left * ["linear_act_fwd"]
    for m, result in ((ours, out), (theirs, expected)):
        (result[0].square().sum() + result[1].sum()).backward()
        assert any("lora" in name and p.grad is not None for name, p in m.named_parameters())
    torch.testing.assert_close(gradients(ours), gradients(theirs), rtol=1e-3, atol=1e-3)

    launches.clear()
    with ours.disable_adapter(), torch.no_grad():
        assert_same(ours(**inputs()), plain)
    assert launches == left * ["linear_act_fwd"]
    merged = ours.merge_and_unload()
    fuse(merged)
    launches.clear()
    assert_same(merged(**inputs()), expected, tolerance=1e-4)
    assert launches == 3 * ["linear_act_fwd"]


def quantise_by_torchao(block: nn.Module) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(block, Int8WeightOnlyConfig())


def quantise_by_torch(block: nn.Module) -> None:
    from torch.ao.quantization import quantize_dynamic

    quantize_dynamic(block, {nn.Linear}, dtype=torch.qint8, inplace=True)


@pytest.mark.filterwarnings("ignore")  # of what is deprecated in them, and of parts of torchao that want a GPU
@pytest.mark.parametrize(
    ("quantise", "reason"),
    [
        (quantise_by_torchao, "Int8Tensor is a tensor subclass"),
        (quantise_by_torch, "torch.ao.nn.quantized.dynamic.modules.linear.Linear, not a plain nn.Linear"),
    ],
    ids=["torchao int8 weights", "torch.ao dynamic int8"],
)
@when_fused
@every_kind
@torch.no_grad()
def test_a_quantised_block_runs_its_librarys_code(
    kind: str, when: str, quantise: Callable[[nn.Module], None], reason: str, launches: list[str]
) -> None:
    ours, theirs = twins(kind)
    plain = theirs(hidden_states())
    if when == "after":
        fuse(ours)
    for block in (ours, theirs):
        quantise(block)
    assert reason in fuse(ours).skipped[""]
    expected = theirs(hidden_states())
    assert not torch.equal(expected, plain)
    assert torch.equal(ours(hidden_states()), expected)
    assert launches == PYTORCH


@when_fused
@torch.no_grad()
def test_a_model_offloaded_by_accelerate_runs_hugging_faces_code(when: str, launches: list[str]) -> None:
    """Between calls the weights are on the meta device."""
    import accelerate

    model = make()
    expected = model(**inputs())
    if when == "after":
        fuse(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    report = fuse(model)
    assert report.fused == ()
    assert len(report.skipped) == 3
    assert_same(model(**inputs()), expected)
    assert launches == PYTORCH


@every_kind
def test_replicas_of_data_parallel_run_kernels(kind: str, launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own ``replicate``, without a second device: a replica's weights are plain attributes."""
    code = replicate.__globals__
    monkeypatch.setitem(code, "_get_device_index", lambda device, optional: device)
    monkeypatch.setitem(
        code,
        "_broadcast_coalesced_reshape",
        lambda tensors, devices, detach: [[t * d for t in tensors] for d in devices],
    )
    ours, theirs = fused_twins(kind)
    x = hidden_states()
    results = []
    for block in (theirs, ours):
        launches.clear()
        block.zero_grad()
        replicas = replicate(block, [1, 2])
        outs = [replica(x) for replica in replicas]
        torch.stack(outs).square().sum().backward()
        results.append([*outs, *(p.grad for p in block.parameters())])
        assert all(replica.forward.__self__ is replica for replica in replicas)
        assert not linear(replicas[1])._parameters
    assert sorted(launches) == sorted(2 * KERNELS)
    for other, mine in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(results[0][0], results[0][1])
