"""Calls of a fused block that PyTorch watches or transforms, that run out of memory, or that run in many threads."""

import copy
import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from blocks import (
    KERNELS,
    PYTORCH,
    assert_runs,
    every_kind,
    fused_twins,
    hidden_states,
    linear_name,
    step,
    twins,
)
from models import blocks, inputs, make
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from bert_fused import FusedBertIntermediate, FusedBertPooler, fuse, unfuse


@pytest.mark.parametrize("seeded", ["hidden_states", "weight", "bias"])
@every_kind
def test_forward_mode_differentiation_runs_hugging_faces_code(kind: str, seeded: str, launches: list[str]) -> None:
    ours, theirs = fused_twins(kind)
    tangents = []
    for block in (theirs, ours):
        values = {name: p.detach() for name, p in block.named_parameters()} | {"hidden_states": hidden_states()}
        seed = seeded if seeded in values else f"{linear_name(block)}.{seeded}"
        with torch.autograd.forward_ad.dual_level():
            direction = torch.linspace(-1, 1, values[seed].numel()).view_as(values[seed])
            values[seed] = torch.autograd.forward_ad.make_dual(values[seed], direction)
            out = torch.func.functional_call(block, values, values.pop("hidden_states"))
            tangents.append(torch.autograd.forward_ad.unpack_dual(out))
    (primal, tangent), (our_primal, our_tangent) = tangents
    assert tangent.abs().max() > 0
    torch.testing.assert_close(our_primal, primal)
    torch.testing.assert_close(our_tangent, tangent)
    assert launches == PYTORCH


TRANSFORMS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "vmap": lambda m, x: torch.func.vmap(m)(x[:, None]),
    "grad": lambda m, x: torch.func.grad(lambda v: m(v).square().sum())(x),
    "jvp": lambda m, x: torch.func.jvp(m, (x,), (torch.ones_like(x),))[1],
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@every_kind
@torch.no_grad()
def test_function_transforms_of_a_module_run_hugging_faces_code(kind: str, transform: str, launches: list[str]) -> None:
    ours, theirs = fused_twins(kind)
    expected = TRANSFORMS[transform](theirs, hidden_states())
    torch.testing.assert_close(TRANSFORMS[transform](ours, hidden_states()), expected, rtol=1e-5, atol=1e-5)
    assert launches == PYTORCH


@every_kind
def test_symbolic_tracing_records_hugging_faces_operations(kind: str, launches: list[str]) -> None:
    """What torch.fx passes is no tensor, and what it records are Hugging Face's operations."""
    ours, theirs = fused_twins(kind)
    traced = torch.fx.symbolic_trace(ours)
    assert linear_name(theirs) in traced.code
    assert_runs(PYTORCH, traced, theirs, launches)


class Doubling(TorchDispatchMode):
    """Results of matrix products, doubled."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out * 2 if func in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default) else out


@every_kind
def test_a_dispatch_mode_sees_every_operation(kind: str, launches: list[str]) -> None:
    ours, theirs = fused_twins(kind)
    plain = theirs(hidden_states())
    flops, results = [], []
    for block in (theirs, ours):
        with FlopCounterMode(display=False) as counter:
            block(hidden_states())
        flops.append(counter.get_total_flops())
        with Doubling():
            results.append(step(block, hidden_states())["out"])
    assert flops[0] == flops[1] > 0
    assert not torch.allclose(results[0], plain)
    torch.testing.assert_close(results[1], results[0])
    assert launches == PYTORCH
    assert_runs(KERNELS, ours, theirs, launches)


@every_kind
def test_memory_that_runs_out_leaves_the_next_step_right(
    kind: str, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever allocation of a step fails, the next step is as good as ever."""
    ours, theirs = fused_twins(kind)
    honest = {name: getattr(*name) for name in ((Tensor, "new_empty"), (torch, "empty_like"), (torch, "empty"))}
    failures = 0
    for failing in range(20):
        made = 0

        def allocate(*args: Any, _allocate: Callable[..., Tensor], **kwargs: Any) -> Tensor:
            nonlocal made
            made += 1
            if made == failing + 1:  # noqa: B023
                raise torch.OutOfMemoryError("out of memory")
            return _allocate(*args, **kwargs)

        with monkeypatch.context() as patch:
            for (owner, name), function in honest.items():
                partial = functools.partialmethod if owner is Tensor else functools.partial
                patch.setattr(owner, name, partial(allocate, _allocate=function))
            try:
                step(ours, hidden_states())
            except torch.OutOfMemoryError:
                failures += 1
            else:
                break
        assert_runs(KERNELS, ours, theirs, launches)
    assert failures >= 3, "output, its gradient and the bias's"


def test_threads_that_fuse_unfuse_and_call_get_the_same_outputs(launches: list[str]) -> None:
    model = make()
    expected = model(**inputs())[0]

    def work(seed: int) -> None:
        for turn in range(6):
            if (seed + turn) % 3 == 0:
                fuse(model)
            elif (seed + turn) % 3 == 1:
                unfuse(model)
            with torch.no_grad():
                out = model(**inputs())[0]
            assert float((out - expected).detach().abs().max()) < 1e-4

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert 0 < len(launches) < 8 * 6 * 3
    fuse(model)
    assert {type(m) for m in blocks(model)} == {FusedBertIntermediate, FusedBertPooler}


def test_threads_that_train_their_own_models_get_the_same_gradients(launches: list[str]) -> None:
    """Eight models, fused while others run: what a thread records of a call must not reach another's."""
    theirs = twins("intermediate")[1]
    models = [copy.deepcopy(theirs) for _ in range(8)]
    start = threading.Barrier(8)

    def work(block: nn.Module) -> dict[str, Tensor | None]:
        start.wait()
        fuse(block)
        return step(block, hidden_states())

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, models))
    assert sorted(launches) == sorted(8 * KERNELS)
    torch.testing.assert_close(results, 8 * [step(theirs, hidden_states())], rtol=1e-4, atol=1e-4)


def test_a_call_unfused_meanwhile_runs_hugging_faces_code(launches: list[str]) -> None:
    """The call began with the fused class's forward; another thread has unfused the module since."""
    block, theirs = twins("intermediate")
    for b in (block, theirs):
        b.intermediate_act_fn = nn.Softplus()
    torch.testing.assert_close(FusedBertIntermediate.forward(block, hidden_states()), theirs(hidden_states()))
    assert launches == PYTORCH
