"""The benchmarks of gated MLPs: a wrong half or gradient gets no figure, and Liger's product is a rival."""

import dataclasses
import sys
from types import ModuleType

import pytest
import torch.nn.functional as F
from torch import Tensor

from benchmarks import linear, measure, models
from benchmarks.cases import Case
from benchmarks.measure import Implementation, each
from bert_fused import reference

CASE = Case("modules", "ModernBERT-base", "float32", "gelu(a)*b", 48, 96, 64)
TRAINING = Case("training", "ModernBERT-base", "float32", "gelu(a)*b", 48, 96, 64)


@pytest.fixture(autouse=True)
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BERT_FUSED_DISABLE", "1")


def other_half(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    a, b = F.linear(x, weight, bias).chunk(2, -1)
    return a * F.gelu(b)


@pytest.mark.parametrize("case", [CASE, TRAINING], ids=lambda case: case.suite)
def test_a_gated_case_is_measured_and_the_wrong_half_is_not(case: Case) -> None:
    problem = linear.problem(case, "cpu")
    wrong = linear.with_backward(other_half) if case is TRAINING else other_half
    problem.implementations.append(Implementation("wrong", each(wrong)))
    rows = measure.measure(problem, device="cpu", rounds=2)
    assert {row["implementation"]: row["error"] is None for row in rows[:-1]}.items() >= {
        ("ours", True),
        ("eager", True),
    }
    assert all(row["error"] is None for row in rows[:-1])
    assert "wrong result" in rows[-1]["error"]
    assert problem.bytes == (3 if case is TRAINING else 1) * 4 * (48 * 64 + 96 * 64 + 48 * 48)


@pytest.mark.parametrize("activation", ["gelu(a)*b", "a*gelu(b)"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_in_16_bits_eager_passes_and_the_tanh_form_does_not(dtype: str, activation: str) -> None:
    case = dataclasses.replace(CASE, dtype=dtype, activation=activation, M=256, N=384)
    tanh = activation.replace("gelu", "gelu_tanh")
    problem = linear.problem(case, "cpu")
    assert measure.checked(problem, problem.implementations[1])["rms_error"] > 0
    wrong = Implementation(
        "wrong", each(lambda x, w, b: reference.linear_act(x.float(), w.float(), b.float(), tanh).to(x))
    )
    with pytest.raises(ValueError, match="elements of a sweep are outside the bound"):
        measure.checked(problem, wrong)


def test_a_gated_model_is_measured_and_a_wrong_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.LAYERS_AND_HEADS, "ModernBERT-base", (2, 2))
    wrong = lambda model: lambda *inputs: (1.01 * models.eager(model)(*inputs)[0],)  # noqa: E731
    monkeypatch.setitem(models.BUILDERS, "wrong", wrong)
    case = Case("models", "ModernBERT-base", "float32", "gelu(a)*b", 32, 96, 64, 2, 16)
    errors = {
        row["implementation"]: row["error"]
        for row in measure.measure(models.problem(case, "cpu"), device="cpu", rounds=1)
    }
    assert "wrong result: RMS error of the hidden output" in errors["wrong"]
    assert {name for name, error in errors.items() if error is None} == {"ours", "eager", "eager again"}


def test_ligers_product_is_a_rival_in_its_own_form(monkeypatch: pytest.MonkeyPatch) -> None:
    class Product:
        apply = staticmethod(lambda a, b: F.gelu(a, approximate="tanh") * b)

    home = ModuleType("liger_kernel.ops.geglu")
    home.LigerGELUMulFunction = Product
    assert linear._liger("gelu", lambda f: f) == linear._liger("a*gelu(b)", lambda f: f) == []
    monkeypatch.setattr(linear.importlib.util, "find_spec", lambda name: name == "liger_kernel")
    monkeypatch.setitem(sys.modules, home.__name__, home)
    (rival,) = linear._liger("gelu(a)*b", lambda f: f)
    assert (rival.name, rival.computes) == ("Liger", "gelu_tanh(a)*b")
    problem = linear.problem(CASE, "cpu")
    assert measure.checked(problem, rival)["max_abs_error"] < 1e-5
