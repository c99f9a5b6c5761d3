"""Calls on a GPU after other calls: kept launches, threads, replicas, memory that ran out (``make gpu-test``)."""

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu import DEVICE, EMULATED, HAS_GPU, MARKS, gradients, inputs, needs_gpu
from models import blocks, make
from models import inputs as text
from reference64 import assert_forward, linear64, rms, with_layout
from torch import Tensor, nn
from torch.nn.parallel import parallel_apply, replicate

import bert_fused
from bert_fused import linear_act
from bert_fused.fallback import interpreted
from bert_fused.kernels import lookup
from bert_fused.kernels.configs import TMA_ARCHS, Config, Entry, Measured
from bert_fused.kernels.elementwise import act_bwd, act_fwd
from bert_fused.kernels.linear_act import linear_act_fwd
from bert_fused.kernels.lookup import get_config
from bert_fused.kernels.plan import _encoded_at, key_of, plans
from bert_fused.kernels.runtime import arch_of, name_of

pytestmark = MARKS

POINTER = Config("pointer", "bfloat16", 64, 64, 64, 4, 3)
PERSISTENT = Config("tma", "bfloat16", 128, 128, 64, 4, 3, persistent=2, subtiles=2)
VARIANTS = pytest.mark.parametrize("config", [POINTER, PERSISTENT], ids=["pointer", "persistent"])


def skip_without_tma(config: Config) -> None:
    if (HAS_GPU or EMULATED) and config.kernel == "tma" and arch_of(DEVICE) not in TMA_ARCHS:
        pytest.skip("this GPU has no tensor memory accelerator")


@pytest.mark.parametrize("which", ["x", "weight", "bias"])
@pytest.mark.parametrize("offset", [1, 3, 5])
def test_a_misaligned_call_is_exact_after_an_aligned_one_was_kept(offset: int, which: str) -> None:
    """Shape and strides agree, so that only the address tells the two calls apart."""
    data = inputs("integers", 70, 80, 96, torch.bfloat16)
    expected = linear64(data.x, data.weight, data.bias).clamp_min(0)
    moved = vars(data).copy()
    row = moved[which] if which != "bias" else moved[which][None]
    shifted = with_layout(row, f"offset{offset}")
    moved[which] = shifted if which != "bias" else shifted[0]
    assert moved[which].data_ptr() % 16
    for arguments in (vars(data), moved, vars(data), moved, vars(data)):
        assert torch.equal(linear_act(*arguments.values(), "relu").double(), expected)
        if HAS_GPU or EMULATED:
            assert key_of(data.x, data.weight, data.bias, "relu", False) in plans


@VARIANTS
def test_variants_give_the_same_bits_every_time(config: Config) -> None:
    skip_without_tma(config)
    M, N, K = (300, 768, 1024) if HAS_GPU else (200, 272, 192) if EMULATED else (20, 64, 64)
    x, weight, bias = vars(inputs("unit", M, N, K, torch.bfloat16)).values()
    first, _ = linear_act_fwd(x, weight, bias, activation="gelu", save_preact=False, config=config)
    assert_forward(first, x, weight, bias, "gelu")
    for _ in range(200 if HAS_GPU else 2):
        again, _ = linear_act_fwd(x, weight, bias, activation="gelu", save_preact=False, config=config)
        assert torch.equal(again, first)


@pytest.mark.skipif(interpreted(), reason="the interpreter has no tables")
@VARIANTS
def test_a_configuration_of_this_gpus_table_serves_new_and_kept_calls(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_without_tma(config)
    N, K, (arch, name) = 272, 192, (arch_of(DEVICE), name_of(DEVICE))
    monkeypatch.setenv("BERT_FUSED_TABLES", str(tmp_path))
    lookup.remember([Entry(256, N, K, config, Measured(1.0, 2.0, 3.0, "2026-11-25", "none"))], arch, name, "a test")
    for M in (200, 131, 200):
        assert get_config(M, N, K, config.dtype, arch, aligned=True, device=name) == config
        for seed in (1, 2):
            data = inputs("unit", M, N, K, torch.bfloat16, seed)
            out = linear_act(data.x, data.weight, data.bias, "gelu")
            assert_forward(out, data.x, data.weight, data.bias, "gelu")
    monkeypatch.undo()
    lookup.forget_tables()


@needs_gpu
@VARIANTS
def test_a_graph_of_a_variant_replays(config: Config) -> None:
    skip_without_tma(config)
    data = inputs("integers", 300, 256, 512, torch.bfloat16)
    arguments: dict[str, Any] = {"activation": "relu", "save_preact": False, "config": config}
    linear_act_fwd(data.x, data.weight, data.bias, **arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = linear_act_fwd(data.x, data.weight, data.bias, **arguments)
    for seed in range(1, 6):
        fresh = inputs("integers", 300, 256, 512, torch.bfloat16, seed)
        for tensor, new in zip(vars(data).values(), vars(fresh).values(), strict=True):
            tensor.copy_(new)
        graph.replay()
        expected = linear64(fresh.x, fresh.weight, fresh.bias).clamp_min(0)
        assert torch.equal(out.double(), expected), f"replay {seed}"


@needs_gpu
def test_a_graph_of_a_training_step_replays() -> None:
    data = inputs("unit", 300, 256, 192, torch.bfloat16)
    d_out = torch.randn(300, 256, device=DEVICE).bfloat16()
    leaves = [tensor.requires_grad_() for tensor in (data.x, data.weight, data.bias)]

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(linear_act(*leaves, "gelu"), leaves, d_out)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for seed in (1, 2):
        fresh = inputs("trained", 300, 256, 192, torch.bfloat16, seed)
        with torch.no_grad():
            for leaf, new in zip(leaves, vars(fresh).values(), strict=True):
                leaf.copy_(new)
        graph.replay()
        for mine, other in zip(found, gradients(linear_act, fresh, "gelu", d_out), strict=True):
            assert rms(mine - other) <= 1e-2 * rms(other)  # cuBLAS may choose another kernel while capturing


def test_threads_on_streams_of_their_own_give_the_same_results() -> None:
    """Four threads share the kept calls."""
    work = [inputs("integers", 64 + 16 * (i % 2), 128, 64, torch.bfloat16, seed=i) for i in range(4)]
    d_outs = [torch.ones(len(data.x), 128, dtype=torch.bfloat16, device=DEVICE) for data in work]
    outs = [linear64(data.x, data.weight, data.bias).clamp_min(0) for data in work]
    grads = [gradients(linear_act, data, "relu", d_out) for data, d_out in zip(work, d_outs, strict=True)]
    if HAS_GPU:
        torch.cuda.synchronize()

    def run(i: int) -> None:
        stream = torch.cuda.Stream() if HAS_GPU else None
        with torch.cuda.stream(stream) if HAS_GPU else contextlib.nullcontext():
            for _ in range(50 if HAS_GPU else 3):
                out = linear_act(work[i].x, work[i].weight, work[i].bias, "relu")
                found = gradients(linear_act, work[i], "relu", d_outs[i])
                assert torch.equal(out.double(), outs[i])
                for mine, other in zip(found, grads[i], strict=True):
                    assert rms(mine - other) <= 1e-2 * rms(other)

    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(run, range(4)):
            pass


@needs_gpu
def test_a_kept_call_is_right_as_a_threads_first_cuda_work() -> None:
    """The size goes through TMA where there is one. The output's memory is reused, so the allocator asks the driver for
    nothing."""
    data = inputs("integers", 2048, 256, 64, torch.bfloat16)
    expected = linear64(data.x, data.weight, data.bias).clamp_min(0)
    for _ in range(2):
        out = linear_act(data.x, data.weight, data.bias, "relu")
    del out
    torch.cuda.synchronize()
    _encoded_at.cache_clear()  # an address seen before would need no driver
    with ThreadPoolExecutor(1) as pool:
        out = pool.submit(linear_act, data.x, data.weight, data.bias, "relu").result()
    assert torch.equal(out.double(), expected)


def test_fused_replicas_of_data_parallel_train_as_unfused_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica's weights are plain attributes; here both replicas are on one GPU, with weights times 1 and 2."""
    code = replicate.__globals__
    monkeypatch.setitem(code, "_get_device_index", lambda device, optional: device)
    monkeypatch.setitem(code, "_broadcast_coalesced_reshape", lambda ts, ds, detach: [[t * d for t in ts] for d in ds])
    block = blocks(make(hidden_size=64, intermediate_size=128))[0].to(DEVICE, torch.bfloat16)
    x = torch.randn(4, 16, 64, device=DEVICE).bfloat16()
    results = []
    for fuse in (bert_fused.unfuse, bert_fused.fuse):
        fuse(block)
        block.zero_grad()
        replicas = replicate(block, [1, 2])
        if HAS_GPU:
            outs = parallel_apply(replicas, [(x,), (x,)], devices=[DEVICE.index, DEVICE.index])
        else:
            outs = [replica(x) for replica in replicas]
        torch.stack(outs).float().square().sum().backward()
        results.append([*outs, *(parameter.grad for parameter in block.parameters())])
    for other, mine in zip(*results, strict=True):
        assert rms(mine.float() - other.float()) <= 2e-2 * rms(other.float())
    assert rms(results[1][1].float()) > 1.5 * rms(results[1][0].float())


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_data_parallel_on_two_devices_gives_the_unfused_results() -> None:
    model = make(hidden_size=64, intermediate_size=128).to(DEVICE)
    batch = {name: tensor.to(DEVICE) for name, tensor in text(rows=8).items()}
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
        bert_fused.fuse(model)
        for _ in range(3):
            out = nn.DataParallel(model, [0, 1])(**batch)["last_hidden_state"]
            assert (out - expected).abs().max() < 1e-3


@contextlib.contextmanager
def no_more_memory() -> Iterator[None]:
    """Empty the allocator's cache and let it take one more MiB from the device."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**20) / total, DEVICE)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)


@needs_gpu
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_running_out_of_memory_leaves_everything_usable(activation: str) -> None:
    """After new calls and kept ones, forward and backward, the next call gives the right result."""
    data = inputs("integers", 4096, 4096, 64, torch.bfloat16)
    leaves = [tensor.requires_grad_() for tensor in vars(data).values()]
    d_out = torch.ones(4096, 4096, dtype=torch.bfloat16, device=DEVICE)
    plans.clear()
    with no_more_memory(), pytest.raises(torch.OutOfMemoryError):
        _ = [linear_act(*leaves, activation) for _ in range(64)]
    first = linear_act(*leaves, activation)
    assert_forward(first.detach(), *(leaf.detach() for leaf in leaves), activation)
    expected = torch.autograd.grad(first, leaves, d_out, retain_graph=True)
    with no_more_memory(), pytest.raises(torch.OutOfMemoryError):
        _ = [linear_act(*leaves, activation) for _ in range(64)]
    with no_more_memory(), pytest.raises(torch.OutOfMemoryError):
        _ = [torch.autograd.grad(first, leaves, d_out, retain_graph=True)[0] for _ in range(1024)]
    for out in (first, linear_act(*leaves, activation)):
        assert torch.equal(out, first)
        for mine, other in zip(torch.autograd.grad(out, leaves, d_out, retain_graph=True), expected, strict=True):
            assert rms(mine - other) <= 1e-2 * rms(other)


@needs_gpu
@pytest.mark.usefixtures("poisoned_empty")
def test_backward_and_one_pass_of_more_than_2_to_the_31_elements_are_exact() -> None:
    N = 4096
    M = 2**31 // N + 300
    if torch.cuda.mem_get_info(DEVICE)[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    tail = torch.randint(-2, 3, (512, N), generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)
    d_out = torch.zeros(M, N, dtype=torch.bfloat16, device=DEVICE)
    d_out[-512:] = tail
    saved = torch.ones_like(d_out)
    d_preact, d_bias = act_bwd(d_out, saved, activation="relu", bias_grad=True)
    assert torch.equal(d_preact[-512:], tail)
    assert not d_preact[:-512].any()
    assert d_bias is not None
    assert torch.equal(d_bias, tail.double().sum(0).bfloat16())
    del d_preact, saved
    act_fwd(d_out.numel(), "relu")(d_out, d_out)
    assert torch.equal(d_out[-512:], tail.clamp_min(0))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_model_follows_its_data_and_weights(mode: str) -> None:
    model = make(hidden_size=64, intermediate_size=128, num_hidden_layers=1).to(DEVICE)
    batch = {name: tensor.to(DEVICE) for name, tensor in text().items()}
    torch.compiler.reset()
    with torch.no_grad(), bert_fused.fused(model):
        options: dict[str, Any] = {"mode": mode} if HAS_GPU else {"backend": "aot_eager"}
        compiled = torch.compile(model, fullgraph=True, **options)
        for turn in range(5):  # reduce-overhead warms up, records, and replays
            batch["input_ids"].copy_(batch["input_ids"].roll(1, 0))
            blocks(model)[0].dense.weight.mul_(1.1)
            torch.compiler.cudagraph_mark_step_begin()
            out = {name: tensor.clone() for name, tensor in compiled(**batch).items()}
            for name, expected in model(**batch).items():
                assert (out[name] - expected).abs().max() < 1e-3, f"turn {turn}: {name}"


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_gradients_of_a_compiled_call_are_the_uncompiled_ones(mode: str) -> None:
    torch.compiler.reset()
    options: dict[str, Any] = {"mode": mode} if HAS_GPU else {"backend": "aot_eager"}
    compiled = torch.compile(lambda x, w, b: linear_act(x, w, b).float().square().mean(), fullgraph=True, **options)
    for seed in range(4):
        data = inputs("unit", 96, 64, 64, torch.bfloat16, seed=seed)
        grads = []
        for function in (compiled, lambda x, w, b: linear_act(x, w, b).float().square().mean()):
            torch.compiler.cudagraph_mark_step_begin()
            leaves = [tensor.clone().requires_grad_() for tensor in vars(data).values()]
            function(*leaves).backward()
            grads.append([leaf.grad.clone() for leaf in leaves])
        for mine, other in zip(*grads, strict=True):
            assert rms(mine - other) <= 1e-2 * rms(other), f"seed {seed}"
