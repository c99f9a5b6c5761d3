"""Plans: the kernel that Triton would pick, the right addresses, and no plan for a call that PyTorch must see.

Most run in a process of their own, on a stub driver (``launch_child.py`` and its modules). The autograd of kept calls
is checked here, in the interpreter.
"""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import launch_child
import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor

from benchmarks.static import stub_driver
from bert_fused import linear_act, ops, reference
from bert_fused.kernels import linear_act as launcher
from bert_fused.kernels.configs import Config
from bert_fused.kernels.plan import key_of, plans

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Name of each check -> its error, "" if it passed."""
    folder = tmp_path_factory.mktemp("stub")
    stub_driver.build(folder)
    environment = stub_driver.environment(folder) | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests/support"}
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("launch_child.py"))]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("check", launch_child.CHECKS)
def test_each_check_of_a_launch_on_the_stub_driver_passes(check: str, outcomes: dict[str, str]) -> None:
    assert outcomes[check] == "", outcomes[check]


# -------------------------------------------------------------------------------------------- what a kept call computes


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The activation of each call that a kept plan served."""
    found: list[str] = []

    def get(key: Any) -> Any:
        plan = plans.get(key)
        if plan is not None:
            found.append(key[0])
        return plan

    monkeypatch.setattr(ops, "plans", SimpleNamespace(get=get))
    return found


def leaves(shape: tuple[int, ...], wanted: tuple[bool, bool, bool], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (shape, (12, shape[-1]), (12,))
    tensors = [torch.randn(s, generator=generator) * 0.3 for s in shapes]
    return [t.requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]


WANTED = [(x, w, b) for x in (True, False) for w in (True, False) for b in (True, False) if x or w or b]


@pytest.mark.parametrize(
    ("activation", "recompute"),
    [("gelu", False), ("gelu", True), ("relu", False), ("tanh", False), ("none", False)],
    ids=["gelu", "gelu recomputed", "relu", "tanh", "none"],
)
@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 8), (2, 1, 3, 8)], ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("wanted", WANTED, ids=lambda w: "".join("xwb"[i] for i in range(3) if w[i]))
def test_gradients_of_a_kept_call_match_eager(
    activation: str, recompute: bool, shape: tuple[int, ...], wanted: tuple[bool, bool, bool], served: list[str]
) -> None:
    ours, eager = leaves(shape, wanted), leaves(shape, wanted)
    linear_act(*ours, activation, recompute_preact=recompute)
    out, expected = linear_act(*ours, activation, recompute_preact=recompute), reference.linear_act(*eager, activation)
    assert served == [activation]
    torch.testing.assert_close(out, expected)
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(d_out, retain_graph=True)
    out.backward(d_out)
    expected.backward(2 * d_out)
    for mine, theirs in zip(ours, eager, strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize("activation", ["gelu", "relu", "tanh", "none", "silu"])
def test_second_gradients_of_a_kept_call_match_eager(activation: str) -> None:
    results = []
    for function in (linear_act, reference.linear_act):
        tensors = leaves((2, 3, 8), (True, True, True))
        if function is linear_act:
            function(*tensors, activation)
        out = function(*tensors, activation)
        first = torch.autograd.grad(out.pow(2).sum(), tensors, create_graph=True)
        results.append(torch.autograd.grad(sum(g.pow(2).sum() for g in first), tensors))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


def saved_shapes(tensors: list[Tensor], activation: str) -> list[torch.Size]:
    shapes: list[torch.Size] = []

    def pack(tensor: Tensor) -> Tensor:
        shapes.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        linear_act(*tensors, activation)
    return shapes


def test_a_kept_call_saves_what_a_new_one_does(served: list[str]) -> None:
    for wanted in WANTED:
        for activation in ("gelu", "relu", "none"):
            tensors = leaves((2, 3, 8), wanted)
            plans.clear()
            new = saved_shapes(tensors, activation)
            assert not served
            assert saved_shapes(tensors, activation) == new
            assert served.pop() == activation
            # x for the weight's gradient, the weight for x's, and what the activation's derivative needs.
            assert len(new) == wanted[1] + wanted[0] + (activation != "none")


@pytest.mark.parametrize("activation", ["gelu", "relu", "none"])
def test_checkpointing_may_recompute_by_a_kept_call(activation: str, served: list[str]) -> None:
    """Checkpointing compares the tensors that a kept call saves with those that the first, new call saved."""
    tensors = leaves((2, 3, 8), (True, True, True))
    out = torch.utils.checkpoint.checkpoint(linear_act, *tensors, activation, use_reentrant=False)
    assert not served
    out.sum().backward()
    assert served == [activation]


def test_the_result_of_a_kept_call_may_be_changed_in_place() -> None:
    for _ in range(2):
        tensors = leaves((2, 3, 8), (True, True, True))
        out = linear_act(*tensors, "gelu")
        assert not out._is_view()
        out.mul_(2).sum().backward()
        out.detach_()


def test_a_saved_weight_changed_in_place_is_noticed() -> None:
    x, weight, bias = leaves((2, 3, 8), (True, True, True))
    linear_act(x, weight, bias)
    out = linear_act(x, weight, bias)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


class Watcher(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


def stepping_aside() -> dict[str, Any]:
    """Name -> a function that calls ``linear_act``, on tensors of a kept call, where that would be silently wrong."""

    def forward_ad(x: Tensor, w: Tensor, b: Tensor) -> Any:
        with torch.autograd.forward_ad.dual_level():
            return linear_act(torch.autograd.forward_ad.make_dual(x, x), w, b)

    def mode(x: Tensor, w: Tensor, b: Tensor) -> Any:
        with Watcher():
            return linear_act(x, w, b)

    def autocast(x: Tensor, w: Tensor, b: Tensor) -> Any:
        torch.set_autocast_enabled("cuda", True)  # torch.autocast would not, where there is no GPU
        try:
            return linear_act(x, w, b)
        finally:
            torch.set_autocast_enabled("cuda", False)

    return {
        "vmap": lambda x, w, b: torch.func.vmap(lambda row: linear_act(row, w, b))(x[:, None]),
        "grad": lambda x, w, b: torch.func.grad(lambda v: linear_act(v, w, b).sum())(x),
        "jvp": lambda x, w, b: torch.func.jvp(lambda v: linear_act(v, w, b), (x,), (x,)),
        "forward AD": forward_ad,
        "dispatch mode": mode,
        "autocast": autocast,
        "negated x": lambda x, w, b: linear_act(torch._neg_view(x), w, b),
        "negated weight": lambda x, w, b: linear_act(x, torch._neg_view(w), b),
        "negated bias": lambda x, w, b: linear_act(x, w, torch._neg_view(b)),
        "subclass": lambda x, w, b: linear_act(x.as_subclass(Sub), w, b),
        "subclass of weight": lambda x, w, b: linear_act(x, w.as_subclass(Sub), b),
        "subclass of bias": lambda x, w, b: linear_act(x, w, b.as_subclass(Sub)),
        "compile": lambda x, w, b: torch.compile(linear_act, backend="eager", fullgraph=True)(x, w, b),
        "trace": lambda x, w, b: torch.jit.trace(lambda v: linear_act(v, w, b), x, check_trace=False)(x),
    }


class Sub(Tensor):
    pass


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(stepping_aside()))
def test_a_kept_call_is_not_made_where_it_would_be_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = leaves((5, 8), (False, False, False))
    made: list[int] = []
    plan = plan_of(*tensors)

    def counted(*arguments: Any) -> Any:
        made.append(1)
        return plan(*arguments)

    monkeypatch.setattr(ops, "plans", SimpleNamespace(get=lambda key: counted))  # whatever the key
    stepping_aside()[name](*tensors)
    assert not made
    linear_act(*tensors)
    assert made


def plan_of(*tensors: Tensor) -> Any:
    linear_act(*tensors)
    return plans[key_of(*tensors, "gelu", False)]


def test_the_switch_turns_kept_calls_off(monkeypatch: pytest.MonkeyPatch, served: list[str]) -> None:
    tensors = leaves((5, 8), (False, False, False))
    linear_act(*tensors)
    monkeypatch.setenv("BERT_FUSED_DISABLE", "1")
    linear_act(*tensors)
    assert not served
    for off in ("0", ""):
        monkeypatch.setenv("BERT_FUSED_DISABLE", off)
        linear_act(*tensors)
    assert served == ["gelu", "gelu"]


# --------------------------------------------------------------------------------------------- a Triton of another time

WITHOUT_GLUON = """
import triton
from triton.experimental.gluon.language.nvidia import hopper
del hopper.warpgroup_mma
triton.__version__ = "99.0.0"
import torch, bert_fused
x, weight = torch.randn(5, 16), torch.randn(8, 16)
assert bert_fused.ops.path_name(x.device, x.dtype) == "Triton"
error = (bert_fused.linear_act(x, weight) - bert_fused.reference.linear_act(x, weight, None, "gelu")).abs().max()
assert error < 1e-5, error
"""


def test_a_triton_without_gluon_has_all_other_kernels() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_GLUON], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_hopper_entry_measured_with_another_triton_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = Config("pointer", "float32", 16, 16, 16, 4, 1)

    def choice(*_: object, device: str | None = None, **__: object) -> Config:
        return shipped if device is None else Config("hopper", "float16", 128, 128, 64, 8, 5, persistent=1, subtiles=2)

    monkeypatch.setattr(launcher, "LAUNCHER_IS_KNOWN", False)
    monkeypatch.setattr(launcher, "get_config", choice)
    x, weight = torch.randn(5, 16), torch.randn(8, 16)
    torch.testing.assert_close(linear_act(x, weight), reference.linear_act(x, weight, None, "gelu"))
