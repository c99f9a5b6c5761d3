"""The benchmarks' rivals: a wrong one gets no figure, and each is timed in the way that suits it."""

import collections
import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from benchmarks import linear, measure, models
from benchmarks.cases import CUT_OFF, Case
from benchmarks.measure import Implementation, each
from bert_fused.timing import wall_sampler
from bert_fused.tune import accuracy
from bert_fused.unpad import encoder

SMALL = Case("modules", "MiniLM", "float32", "gelu", 48, 96, 64)
TINY = Case("models", "tiny", "float32", "gelu", 32, 128, 64, 2, 16, ragged=True)


@pytest.fixture(autouse=True)
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """These test the chain; interpreted kernels would take minutes to time."""
    monkeypatch.setenv("BERT_FUSED_DISABLE", "1")
    monkeypatch.setitem(models.LAYERS_AND_HEADS, "tiny", (2, 2))


def tanh_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def without_bias(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight))


def unwritten(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    out = F.gelu(F.linear(x, weight, bias))
    out[-1, -1] = math.nan
    return out


def raising(*_: Tensor) -> Tensor:
    raise RuntimeError("out of resources\nand more")


def refused(problem: Any, wrong: Implementation) -> str:
    """The error of the wrong one, which has no figure; the right ones beside it have theirs."""
    problem = dataclasses.replace(problem, implementations=[wrong, *problem.implementations])
    first, *rest = measure.measure(problem, device="cpu", rounds=2)
    assert first["implementation"] == wrong.name
    assert first["wall"] is first["gpu"] is first["tflops"] is None
    assert first["error"].count("\n") == 0
    for row in rest:
        assert row["error"] is None
        assert row["wall"]["ratio_to"]["eager"]["median"] > 0
    return str(first["error"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("wrong", [tanh_gelu, without_bias, unwritten, raising])
def test_a_wrong_module_gets_no_figure(wrong: Any, dtype: str) -> None:
    problem = linear.problem(dataclasses.replace(SMALL, dtype=dtype), "cpu")
    error = refused(problem, Implementation("wrong", each(wrong)))
    assert ("RuntimeError: out of resources" if wrong is raising else "wrong result") in error


@pytest.mark.parametrize("wrong", [tanh_gelu, without_bias])
def test_a_wrong_gradient_gets_no_figure(wrong: Any) -> None:
    """Its output is right: only the gradients are those of another function."""
    right = linear.with_backward(lambda *inputs: F.gelu(F.linear(*inputs)))
    other = linear.with_backward(wrong)

    def call(*inputs: Tensor) -> tuple[Tensor | None, ...]:
        gradients = other(*inputs)[1:] if wrong is tanh_gelu else (*right(*inputs)[1:3], torch.zeros(SMALL.N))
        return right(*inputs)[0], *gradients

    problem = linear.problem(dataclasses.replace(SMALL, suite="training"), "cpu")
    assert "wrong result: RMS error of d_" in refused(problem, Implementation("wrong", each(call)))


def measured(case: Case) -> dict[str, dict[str, Any]]:
    """The rows of a case of the suite models, by implementation."""
    with torch.no_grad():
        rows = measure.measure(models.problem(case, "cpu"), device="cpu", rounds=1)
    return {row["implementation"]: row for row in rows}


def tanh_model(model: nn.Module) -> Any:
    model = models.fused_copy(model)
    for module in model.modules():
        if hasattr(module, "intermediate_act_fn"):
            module.intermediate_act_fn = ACT2FN["gelu_pytorch_tanh"]
    return models.eager(model)


def shifted_model(model: nn.Module) -> Any:
    run = models.eager(model)
    return lambda *inputs: tuple(1.01 * output for output in run(*inputs))


@pytest.mark.parametrize("wrong", [tanh_model, shifted_model])
def test_a_wrong_model_gets_no_figure(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.BUILDERS, wrong.__name__, wrong)
    rows = measured(dataclasses.replace(TINY, dtype="bfloat16"))
    assert "wrong result" in rows[wrong.__name__]["error"]
    assert rows[wrong.__name__]["wall"] is None
    assert rows["ours"]["error"] is rows["eager"]["error"] is None


def test_check_refuses_unwritten_elements_and_errors_above_eagers() -> None:
    x, weight, bias = torch.randn(48, 64).half(), torch.randn(96, 64).half(), torch.randn(96).half()

    def mostly_written(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out = torch.empty(len(x), len(weight), dtype=x.dtype)
        out[:-1] = F.gelu(F.linear(x, weight, bias))[:-1]
        return out

    def rounded_once_more(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(F.linear(x, weight, bias)).bfloat16().half()

    assert accuracy.check(lambda *inputs: F.gelu(F.linear(*inputs)), "gelu", x, weight, bias)["rms_error"] > 0
    for wrong in (mostly_written, rounded_once_more):
        with pytest.raises(ValueError, match="wrong result"):
            accuracy.check(wrong, "gelu", x, weight, bias)
    # The sweep of the next two is right: only the error on the data gives them away.
    scale = torch.where(torch.arange(48) == 7, 1.01, 1.0)[:, None].half()
    exact = F.gelu(F.linear(x.double(), weight.double(), bias.double()))
    eagers = float((F.gelu(F.linear(x, weight, bias)) - exact).abs().max())
    off = exact.clone()
    off.view(-1)[exact.abs().argmin()] += 1.5 * eagers
    for wrong in (
        lambda x, w, b: F.gelu(F.linear(x, w, b)) * (scale if b.any() else 1),
        lambda x, w, b: off.half() if b.any() else F.gelu(F.linear(x, w, b)),
    ):
        with pytest.raises(ValueError, match="wrong result: max error"):
            accuracy.check(wrong, "gelu", x, weight, bias)


def test_only_a_sweep_tells_tanh_gelu_in_bfloat16() -> None:
    """At BERT's sizes and scale its difference from erf is less than a rounding."""
    problem = linear.problem(dataclasses.replace(SMALL, dtype="bfloat16", K=1024), "cpu")
    assert "not gelu, " in refused(problem, Implementation("tanh", each(tanh_gelu)))


def test_a_problem_counts_flops_and_bytes() -> None:
    module = linear.problem(dataclasses.replace(SMALL, dtype="bfloat16"), "cpu")
    assert module.flops == 2 * 48 * 96 * 64
    assert module.bytes == 2 * (48 * 64 + 96 * 64 + 48 * 96)
    training = linear.problem(dataclasses.replace(SMALL, suite="training"), "cpu")
    assert (training.flops, training.bytes) == (3 * module.flops, 3 * 2 * module.bytes)
    for sets in (module.sets, training.sets):
        assert len({tensor.data_ptr() for inputs in sets for tensor in inputs}) == sum(map(len, sets))
        assert len(sets) >= 4
        assert min(inputs[0].float().std() for inputs in sets) > 0.5


def test_a_model_counts_and_compares_only_real_tokens() -> None:
    problem = models.problem(TINY, "cpu")
    weights = 2 * (4 * (64 * 64 + 64) + 2 * 64 * 128 + 128 + 64 + 2 * 2 * 64)
    real = sum(int(mask.sum()) for _, mask in problem.sets) / len(problem.sets)
    assert problem.flops == 2 * real * weights
    assert problem.fill == real / 32 < 1
    # Padding may differ, a real token may not.
    ids, mask = problem.sets[0]
    hidden, pooled = models.eager(models.make_model(TINY, "cpu"))(ids, mask)
    exact = (hidden.double(), pooled.double())
    noisy = (hidden + 1e-3 * (mask == 0)[..., None], pooled)
    assert models._compare(noisy, mask, exact, (hidden, pooled))["hidden_rms"] == 0
    with pytest.raises(ValueError, match="hidden"):
        models._compare((hidden + 1e-3 * mask[..., None], pooled), mask, exact, (hidden, pooled))
    full = models.problem(dataclasses.replace(TINY, median=CUT_OFF), "cpu")
    assert full.fill == 1
    assert full.sets[0][1].all()


def test_a_classifier_is_compared_by_its_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.CLASSIFIERS, "shifted", lambda model: lambda *i: (1.01 * models.Logits(model)(*i)[0],))
    rows = measured(dataclasses.replace(TINY, head=True))
    assert list(rows) == list(models.CLASSIFIERS)
    assert "wrong result: RMS error of the logits" in rows.pop("shifted")["error"]
    assert {row["error"] for row in rows.values()} == {None}
    assert 0 < rows["ours unpadded, position 0 only"]["accuracy"]["logits_rms"] < 1e-6


def test_without_padding_no_mask_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even while a CUDA graph is captured, when transformers 5.17 makes one."""
    case = dataclasses.replace(TINY, ragged=False)
    model = models.make_model(case, "cpu")
    (ids, mask), *_ = models.make_inputs(case, "cpu")
    assert mask is None
    masks: list[Any] = []
    attention = F.scaled_dot_product_attention

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        masks.append(kwargs.get("attn_mask"))
        return attention(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    direct = model(ids)
    masks.clear()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    # Newer versions make none: what makes it in 5.17 must not be called.
    monkeypatch.setattr(type(model), "forward", None)
    hidden, pooled = models.eager(model)(ids, None)
    assert masks == [None] * 2
    assert torch.equal(hidden, direct.last_hidden_state)
    assert torch.equal(pooled, direct.pooler_output)


def test_ceilings_are_rates_of_product_and_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_microseconds", lambda device, call: 2.0)
    monkeypatch.setattr(measure, "matmul_tflops", measure.matmul_tflops.__wrapped__)
    monkeypatch.setattr(measure, "copy_tb_per_s", measure.copy_tb_per_s.__wrapped__)
    tflops, tb_per_s = measure.matmul_tflops("cpu", "float32"), measure.copy_tb_per_s("cpu")
    assert tflops == pytest.approx(2 * 256**3 / 2e-6 / 1e12)
    assert tb_per_s == pytest.approx(2 * 2**24 / 2e-6 / 1e12)
    assert measure.roofline_us("cpu", "float32", 1e12, 1.0) == pytest.approx(1e6 / tflops)
    assert measure.roofline_us("cpu", "float32", 1.0, 1e12) == pytest.approx(1e6 / tb_per_s)


def test_measure_leaves_all_rivals_out_after_the_deadline() -> None:
    rows = measure.measure(linear.problem(SMALL, "cpu"), device="cpu", rounds=3, deadline=-math.inf)
    assert {row["error"] for row in rows} == {"out of time"}
    assert not any(row["complete"] for row in rows)


@pytest.fixture
def played_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The branch of a GPU: the CPU's clock plays its events, and its memory counters are made up."""
    monkeypatch.setattr(measure, "event_sampler", lambda calls: wall_sampler(calls, lambda: None))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 350)


@pytest.mark.usefixtures("played_gpu")
@pytest.mark.parametrize("head", [False, True], ids=["model", "classifier"])
def test_unpadded_rivals_leave_padding_out_while_timed(head: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder runs dense while a CUDA graph is captured, so a graph would time the wrong path."""
    timed, packings = [""], collections.Counter[str]()
    honest = encoder.packing_of

    def counted(*arguments: Any, **options: Any) -> Any:
        packing = honest(*arguments, **options)
        packings[timed[0]] += packing is not None
        return packing

    def pretended(calls: Any) -> Any:
        """What a replay would do: whatever the calls do while they are captured."""

        def sample() -> float:
            with monkeypatch.context() as capturing:
                capturing.setattr(encoder, "reading_reason", lambda tensor: "a CUDA graph is being captured")
                return wall_sampler(calls, lambda: None)()

        return sample

    def watched(samplers: dict[str, Any], rounds: int, deadline: float) -> dict[str, list[float]]:
        taken = {}
        for timed[0], sampler in samplers.items():
            taken[timed[0]] = [sampler() for _ in range(rounds)]
        return taken

    monkeypatch.setattr(encoder, "packing_of", counted)
    monkeypatch.setattr(measure, "graph_sampler", pretended)
    monkeypatch.setattr(measure, "interleave", watched)
    case = dataclasses.replace(TINY, M=64, batch=4, head=head)
    with torch.no_grad():
        rows = measure.measure(models.problem(case, "cpu"), device="cuda", rounds=3)
    # Each of three rounds on each of two clocks, in samples of eight calls.
    del packings[""]
    assert {name: count for name, count in packings.items() if count} == dict.fromkeys(models.PACKED, 6 * 8)
    methods = {row["implementation"]: row["gpu"]["method"] for row in rows}
    assert {name for name, method in methods.items() if method == "events"} == set(models.PACKED)


@pytest.mark.usefixtures("played_gpu")
def test_a_rival_that_cannot_be_captured_is_timed_with_events(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_capture(calls: Any) -> Any:
        if len(calls) == 20 and getattr(calls[0], "func", None) is None:
            raise RuntimeError("operation not permitted when stream is capturing")
        return wall_sampler(calls, lambda: None)

    monkeypatch.setattr(measure, "graph_sampler", no_capture)
    cpu = linear.problem(SMALL, "cpu")
    eager = next(rival for rival in cpu.implementations if rival.name == "eager")
    synchronising = Implementation("synchronising", lambda sets: [lambda c=c: c() for c in eager.calls(sets)])
    graphs = dataclasses.replace(eager, name="graphs of its own", graphs=True)
    problem = dataclasses.replace(cpu, implementations=[eager, synchronising, graphs], min_calls=20)
    with torch.no_grad():
        rows = measure.measure(problem, device="cuda", rounds=2)
    assert [row["gpu"]["method"] for row in rows] == ["graph", "events", "events"]
    assert [row["wall"]["method"] for row in rows] == ["wall"] * 3
    assert [row["peak_bytes"] for row in rows] == [250, 250, None]
    assert all(row["complete"] and row["error"] is None for row in rows)
