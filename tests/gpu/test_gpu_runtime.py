"""Fused calls in CUDA graphs, on streams and in models on an NVIDIA GPU. ``make gpu-test`` runs this."""

import re
from pathlib import Path

import pytest
import torch
from gpu import DEVICE, HAS_GPU, MARKS, gradients, inputs, needs_gpu
from models import inputs as text
from models import make
from reference64 import Inputs, assert_forward, rms
from torch import Tensor
from transformers import BertForSequenceClassification

import bert_fused
from bert_fused import linear_act
from bert_fused.__main__ import main
from bert_fused.kernels import lookup
from bert_fused.kernels.runtime import arch_of, name_of
from bert_fused.reference import linear_act as eager

pytestmark = MARKS


@needs_gpu
@pytest.mark.parametrize("N", [256, 250], ids=["kernel", "library"])
@pytest.mark.parametrize("M", [64, 4096])
def test_a_graph_replays_with_new_data_and_new_weights(M: int, N: int) -> None:
    data = inputs("unit", M, N, 192, torch.bfloat16)
    linear_act(data.x, data.weight, data.bias, "gelu")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = linear_act(data.x, data.weight, data.bias, "gelu")
    for seed in (1, 2):
        fresh = inputs("trained", M, N, 192, torch.bfloat16, seed)
        data.x.copy_(fresh.x)
        data.weight.copy_(fresh.weight)
        data.bias.copy_(fresh.bias)
        graph.replay()
        assert_forward(out, fresh.x, fresh.weight, fresh.bias, "gelu", f"replay {seed}")


@needs_gpu
@pytest.mark.parametrize("N", [256, 250], ids=["kernel", "library"])
def test_a_side_stream_waits_for_its_own_producer(N: int) -> None:
    data = inputs("unit", 300, N, 192, torch.bfloat16)
    d_out = torch.ones(300, N, dtype=torch.bfloat16, device=DEVICE)
    on_time = gradients(linear_act, data, "gelu", d_out)  # compiles: nothing may load a module in the race below
    late = Inputs(torch.zeros_like(data.x), data.weight, data.bias)
    linear_act(late.x, late.weight, late.bias)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.x.copy_(data.x)
        out = linear_act(late.x, late.weight, late.bias)
        delayed = gradients(linear_act, late, "gelu", d_out)
    stream.synchronize()
    assert_forward(out, data.x, data.weight, data.bias, "gelu")
    for mine, other in zip(delayed, on_time, strict=True):
        assert rms(mine - other) <= 1e-2 * rms(other)  # cuBLAS may choose another kernel on another stream


@pytest.mark.parametrize("M", [77, 1000] if HAS_GPU else [20])
def test_the_same_call_gives_the_same_bits(M: int) -> None:
    data = inputs("unit", M, 768 if HAS_GPU else 32, 384 if HAS_GPU else 32, torch.bfloat16)
    d_out = torch.ones_like(eager(data.x, data.weight, data.bias, "none"))
    out, first = linear_act(data.x, data.weight, data.bias), gradients(linear_act, data, "gelu", d_out)
    for _ in range(200 if HAS_GPU else 2):
        assert torch.equal(linear_act(data.x, data.weight, data.bias), out)
        assert all(torch.equal(a, b) for a, b in zip(gradients(linear_act, data, "gelu", d_out), first, strict=True))


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_call_on_a_device_other_than_the_current_one_stays_there() -> None:
    """In turns with the current one: a call kept for one device must not serve another."""
    data = inputs("unit", 300, 256, 192, torch.bfloat16)
    d_out = torch.ones(300, 256, dtype=torch.bfloat16, device=DEVICE)
    there = Inputs(*(tensor.to("cuda:1") for tensor in (data.x, data.weight, data.bias)))
    for _ in range(3):
        for where in (data, there):
            assert torch.cuda.current_device() == 0
            out = linear_act(where.x, where.weight, where.bias)
            assert out.device == where.x.device
            assert_forward(out, where.x, where.weight, where.bias, "gelu")
            for mine, other in zip(
                gradients(linear_act, where, "gelu", d_out.to(out.device)),
                gradients(eager, where, "gelu", d_out.to(out.device)),
                strict=True,
            ):
                assert mine.device == out.device
                assert rms(mine - other) <= 2e-2 * rms(other)


def test_a_fused_bf16_model_gives_the_unfused_results() -> None:
    model = make(hidden_size=64, intermediate_size=128).to(DEVICE, torch.bfloat16)
    batch = {name: tensor.to(DEVICE) for name, tensor in text().items()}
    report = bert_fused.fuse(model)
    assert len(report.fused) == 3
    assert set(report.paths.values()) == {"Triton"}
    result = bert_fused.verify(model, **batch)
    assert result.cosine > 0.999
    assert result.max_abs_error < 0.15


def test_an_unpadded_classifier_gives_the_unfused_results_and_gradients() -> None:
    """Of every batch a new call and a kept one, each with another number of rows."""
    model = make(BertForSequenceClassification, hidden_size=64, intermediate_size=128).to(DEVICE, torch.bfloat16)
    batches = [{name: tensor.to(DEVICE) for name, tensor in text(*size).items()} for size in ((3, 7), (5, 13), (3, 7))]

    def run() -> list[Tensor]:
        outputs = []
        for batch in batches:
            model.zero_grad()
            logits = model(**batch).logits
            logits.float().square().sum().backward()
            outputs += [logits.detach(), model.bert.encoder.layer[0].intermediate.dense.weight.grad.clone()]
        return outputs

    theirs = run()
    with bert_fused.fused(model, unpad=True, cls_only=True) as report:
        assert "bert.encoder" in report.fused
        ours = run()
    for mine, other in zip(ours, theirs, strict=True):
        assert rms(mine - other) <= 3e-2 * rms(other)


def test_an_autocast_training_step_is_as_good_as_eagers() -> None:
    model = make(hidden_size=64, intermediate_size=128).to(DEVICE)
    batch = {name: tensor.to(DEVICE) for name, tensor in text(rows=8, length=30).items()}

    def step(autocast: bool) -> Tensor:
        model.zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            output = model(**batch)
        (output.last_hidden_state.float().square().mean() + output.pooler_output.float().square().mean()).backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).double()

    truth, theirs = step(autocast=False), step(autocast=True)
    with bert_fused.fused(model) as report:
        assert len(report.fused) == 3
        ours = step(autocast=True)
    assert rms(ours - truth) <= 1.2 * rms(theirs - truth)


@needs_gpu
def test_recomputing_takes_less_memory(capsys: pytest.CaptureFixture[str]) -> None:
    """Compares and prints the memory peaks of one training step of four blocks."""
    M, N, K, blocks = 8192, 3072, 768, 4
    x = torch.randn(M, K, device=DEVICE).bfloat16().requires_grad_()
    weights = [(0.02 * torch.randn(N, K, device=DEVICE)).bfloat16().requires_grad_() for _ in range(blocks)]
    projections = [(0.02 * torch.randn(K, N, device=DEVICE)).bfloat16() for _ in range(blocks)]

    def step(recompute: bool) -> tuple[Tensor, int]:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        hidden = x
        for weight, projection in zip(weights, projections, strict=True):
            hidden = hidden + linear_act(hidden, weight, recompute_preact=recompute) @ projection.t()
        (d_x,) = torch.autograd.grad(hidden.float().square().mean(), x)
        torch.cuda.synchronize()
        return d_x, torch.cuda.max_memory_allocated() - before

    step(False)
    (kept, peak), (recomputed, lower) = step(False), step(True)
    assert torch.equal(kept, recomputed)
    with capsys.disabled():
        print(f"\npeak of a training step: {peak / 2**20:.0f} MiB, recomputing {lower / 2**20:.0f} MiB")
    # One block's pre-activation lives during its backward pass either way.
    assert peak - lower >= 0.9 * (blocks - 1) * M * N * 2


@needs_gpu
def test_tune_measures_this_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("BERT_FUSED_TABLES", str(tmp_path))
    lookup.forget_tables()
    try:
        shapes = ["--shapes", "512x3072x768", "--dtypes", "bfloat16"]
        assert main(["tune", "--budget", "60", *shapes, "--export", str(tmp_path / "exported.json")]) == 0
        with capsys.disabled():
            print(f"\n{capsys.readouterr().out}")
        (entry,) = lookup.load_user_table(arch_of(DEVICE), name_of(DEVICE))
        data = inputs("unit", 512, 3072, 768, torch.bfloat16)
        assert_forward(linear_act(data.x, data.weight, data.bias), data.x, data.weight, data.bias, "gelu")
        assert main(["info", *shapes[:2]]) == 0
        assert re.search(rf"bfloat16 .*{re.escape(str(entry.config))} +measured here on", capsys.readouterr().out)
    finally:
        monkeypatch.undo()
        lookup.forget_tables()
