"""Checks of ``Launch``: it launches the kernel that Triton picks, for every kind of argument, watched or not."""

import contextlib
import inspect
import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from launch_common import launched, linear_tensors, observed
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks.static import stub_driver
from bert_fused import linear_act
from bert_fused.kernels import elementwise, plan
from bert_fused.kernels import linear_act as forward
from bert_fused.kernels.plan import Launch, Matrix, plans

POINTER_MASK = 2**64 - 1


@triton.jit
def probe_kernel(a_ptr, b_ptr, n, stride, FLAG: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(a_ptr + offs, (offs * stride + n + FLAG).to(a_ptr.dtype.element_ty), mask=offs < n)
    if b_ptr is not None:
        tl.store(b_ptr + offs, offs.to(b_ptr.dtype.element_ty), mask=offs < n)


@triton.jit
def descriptor_kernel(descriptor, n):
    descriptor.store([0, 0], descriptor.load([0, n]))


def expected_params(compiled: Any, args: tuple[Any, ...]) -> list[tuple[int, int]]:
    """Value and mask of every parameter that a compiled kernel has."""
    params = []
    for arg, kind in zip(args, compiled.src.signature.values(), strict=False):
        if kind == "constexpr":
            continue
        if kind.startswith("*"):
            params.append((arg.data_ptr(), POINTER_MASK))
        else:
            mask = 2 ** int(kind[1:]) - 1
            params.append((arg & mask, mask))
    return params


def assert_as_plain(args: tuple[Any, ...], constexprs: dict[str, Any]) -> Any:
    """A launch of ``probe_kernel`` is the same twice, and the same as Triton's, whose function is returned."""
    compiled, plain = launched(lambda: probe_kernel[(7,)](*args, **constexprs), parameters=0)
    params = expected_params(compiled, args)
    _, plain = launched(lambda: probe_kernel[(7,)](*args, **constexprs), len(params))
    launch = Launch(probe_kernel, 7, args[2:], constexprs)
    for _ in range(2):
        _, ours = launched(lambda: launch(*args[:2]), len(params))
        assert ours["function"] == plain["function"] == compiled.function, (args, constexprs)
        for field in ("grid", "stream", "block", "shared"):
            assert ours[field] == plain[field], field
        for (value, mask), mine in zip(params, ours["params"], strict=True):
            assert mine & mask == value
    return compiled.function


def memory(dtype: torch.dtype = torch.float32, offset: int = 0, size: int = 4096) -> torch.Tensor:
    return torch.empty(size + 64, dtype=dtype)[offset : offset + size]


def probes() -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments of ``probe_kernel``, each unlike the first in one respect that Triton specialises on."""
    a, b, flags = memory(), memory(), {"FLAG": 3, "BLOCK": 64}
    yield (a, b, 32, 48), flags
    for n in (1, 17, 2**31 - 16, 2**31, 2**31 + 1, -16, -17, -(2**31) - 1, 2**63):
        yield (a, b, n, 48), flags
    for stride in (1, 49, 2**32):
        yield (a, b, 32, stride), flags
    for dtype, offset in itertools.product((torch.float32, torch.float16, torch.bfloat16), (0, 1, 8)):
        yield (memory(dtype, offset), b, 32, 48), flags
        yield (a, memory(dtype, offset), 32, 48), flags
    yield (a, None, 32, 48), flags
    for changed in ({"FLAG": 4}, {"FLAG": True}, {"FLAG": 1}, {"BLOCK": 128}, {"num_warps": 8}, {"num_stages": 8}):
        yield (a, b, 32, 48), flags | changed
    yield (a, b, 32, 48), flags | {"enable_fp_fusion": False}


def check_every_kind_of_argument() -> None:
    functions = {assert_as_plain(args, constexprs) for args, constexprs in probes()}
    # As many kernels as kinds, or the cases above could not tell them apart.
    assert len(functions) >= 22, len(functions)


def check_every_kind_of_descriptor() -> None:
    functions = set()
    for dtype, block in itertools.product((torch.float16, torch.float32), ([16, 32], [32, 32], [16, 64])):
        tensor = torch.empty(64, 64, dtype=dtype)
        compiled = descriptor_kernel[(1,)](TensorDescriptor.from_tensor(tensor, block), 32)
        launch = Launch(descriptor_kernel, 1, (32,), {}, (Matrix([64, 64], [64, 1], block, TensorDescriptor),))
        for other in (tensor, tensor, tensor.clone().view(-1)):
            _, seen = launched(lambda launch=launch, other=other: launch(other))
            assert seen["function"] == compiled.function
            assert seen["params"][0] == other.data_ptr()
        functions.add(compiled.function)
    assert len(functions) == 6


def probe() -> Callable[[], None]:
    """A launch of ``probe_kernel``, compiled."""
    (a, b, *numbers), constexprs = next(probes())
    launch = Launch(probe_kernel, 3, tuple(numbers), constexprs)
    launch(a, b)
    return lambda: launch(a, b)


def check_hooks_fire() -> None:
    x, w, b = linear_tensors()
    launch_probe = probe()
    for _ in range(3):
        linear_act(x, w, b)
        linear_act(x, w[:31], b[:31])
    for how in ("launch_enter_hook", "launch_exit_hook", "a function as hook", "pre_run_hooks"):
        for kernel, call in (
            (probe_kernel, launch_probe),
            (forward.linear_act_fwd_kernel, lambda: linear_act(x, w, b)),
            (elementwise.act_fwd_kernel, lambda: linear_act(x, w[:31], b[:31])),
        ):
            seen: list[Any] = []
            with observed(kernel, how, seen):
                call()
                call()
            assert seen == [how, how], (how, seen)
            call()
            assert len(seen) == 2


def check_settings_of_triton_are_seen() -> None:
    launch_probe = probe()
    usual = launched(launch_probe)[1]["function"]
    knobs.runtime.debug = True
    try:
        assert launched(launch_probe)[1]["function"] != usual
    finally:
        knobs.runtime.debug = False
    assert launched(launch_probe)[1]["function"] == usual
    for owner, name, value in (
        (knobs.compilation, "instrumentation_mode", "consan"),
        (knobs.runtime, "add_stages_inspection_hook", lambda *a: ("", "")),
    ):
        before = getattr(owner, name)
        setattr(owner, name, value)
        assert plan.is_observed(probe_kernel), name
        setattr(owner, name, before)
        assert not plan.is_observed(probe_kernel)


def check_an_unknown_triton_gets_its_own_path() -> None:
    plan.LAUNCHER_IS_KNOWN = False
    records: list[str] = []
    logging.getLogger(plan.__name__).addFilter(lambda record: records.append(record.getMessage()))
    x, w, b = linear_tensors()
    plans.clear()
    try:
        for _ in range(2):
            launched(lambda: linear_act(x, w, b))
        (kept,) = plans.values()
        assert inspect.getclosurevars(kept).nonlocals["launch"].compiled is None
        assert records == [plan.SLOW_LAUNCHES]
    finally:
        plan.LAUNCHER_IS_KNOWN = triton.__version__.startswith(plan.KNOWN_TRITONS)
    assert plan.LAUNCHER_IS_KNOWN


def check_a_new_kernel_is_compiled_and_launched_on_its_tensors_device() -> None:
    (a, b, *numbers), constexprs = next(probes())
    entered: list[Any] = []

    @contextlib.contextmanager
    def on_device(tensor: torch.Tensor) -> Iterator[None]:
        entered.append(tensor)
        yield

    original, plan.on_device = plan.on_device, on_device
    try:
        launch = Launch(probe_kernel, 1, tuple(numbers), constexprs)
        launch(a, b)
        with observed(probe_kernel, "pre_run_hooks", []):
            launch(a, b)
    finally:
        plan.on_device = original
    assert [tensor is a for tensor in entered] == [True, True]


def check_another_device_is_made_the_current_one() -> None:
    x, w, b = linear_tensors()
    linear_act(x, w, b)
    current = [5]
    entered: list[int] = []

    @contextlib.contextmanager
    def device(index: int) -> Iterator[None]:
        entered.append(index)
        current.append(index)
        yield
        current.pop()

    originals = plan.current_device, torch.cuda.device
    plan.current_device, torch.cuda.device = (lambda: current[-1]), device
    try:
        launched(lambda: linear_act(x, w, b))
    finally:
        plan.current_device, torch.cuda.device = originals
    assert entered == [stub_driver.DEVICE]
    assert current == [5]
