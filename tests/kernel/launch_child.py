"""Checks of kept launches in a process whose driver is a stub: ``test_launch.py`` runs this and reads what it prints.

Every launch goes through Triton's own launcher into ``libcuda_stub.c``, which keeps what it was given. ``kernel[grid]``
is the truth: what is launched must be the kernel that it picks, with the same grid, stream and parameters.
"""

import contextlib
import gc
import itertools
import json
import logging
import os
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from typing import Any

if __name__ == "__main__":
    from benchmarks.static import stub_driver

    STUB = stub_driver.install()

import pytest
import torch
import triton
import triton.language as tl
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks.static import stub_driver
from bert_fused import linear_act, reference
from bert_fused.kernels import act_pass, replay
from bert_fused.kernels import launch as launching
from bert_fused.kernels import linear_act as forward
from bert_fused.kernels.configs import Config
from bert_fused.kernels.launch import launch

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


def launched(call: Callable[[], Any], parameters: int = 5) -> tuple[Any, dict[str, Any]]:
    """What ``call`` returns, and its one launch, which must have that many parameters."""
    STUB.stub_keep_params(parameters)
    before = STUB.stub_launches()
    result = call()
    assert STUB.stub_launches() == before + 1, STUB.stub_launches() - before
    last = STUB.stub_last_launch().contents
    STUB.stub_keep_params(0)
    seen = {"function": last.function, "grid": tuple(last.grid), "stream": last.stream, "block": last.block}
    return result, seen | {"shared": last.shared, "params": list(last.params[:parameters])}


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


def assert_as_plain(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constexprs: dict[str, Any]) -> None:
    compiled, plain = launched(lambda: kernel[grid](*args, **constexprs), parameters=0)
    params = expected_params(compiled, args)
    _, plain = launched(lambda: kernel[grid](*args, **constexprs), len(params))
    _, ours = launched(lambda: launch(kernel, grid, *args, **constexprs), len(params))
    assert ours["function"] == plain["function"] == compiled.function, (args, constexprs)
    for field in ("grid", "stream", "block", "shared"):
        assert ours[field] == plain[field], field
    for (value, mask), mine in zip(params, ours["params"], strict=True):
        assert mine & mask == value


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
    cases = list(probes())
    functions = set()
    for order in (cases, cases[::-1], cases):
        for args, constexprs in order:
            assert_as_plain(probe_kernel, (7,), args, constexprs)
            functions.add(probe_kernel[(1,)](*args, **constexprs).function)
    # As many kernels as kinds, or the cases above could not tell them apart.
    assert len(functions) >= 22, len(functions)
    assert 22 <= len([key for key in launching._kept if key[0] is probe_kernel]) <= len(cases)


def check_every_kind_of_descriptor() -> None:
    functions = set()
    for _ in range(2):
        for dtype, block in itertools.product((torch.float16, torch.float32), ([16, 32], [32, 32], [16, 64])):
            descriptor = TensorDescriptor.from_tensor(torch.empty(64, 64, dtype=dtype), block)
            compiled = descriptor_kernel[(1,)](descriptor, 32)
            _, seen = launched(lambda descriptor=descriptor: launch(descriptor_kernel, (1,), descriptor, 32))
            assert seen["function"] == compiled.function
            assert seen["params"][0] == descriptor.base.data_ptr()
            functions.add(compiled.function)
    assert len(functions) == 6


def check_grids_of_every_rank() -> None:
    args, constexprs = next(probes())
    for grid in ((3,), (3, 5), (3, 5, 2)):
        assert_as_plain(probe_kernel, grid, args, constexprs)
    _, seen = launched(lambda: launch(probe_kernel, (3, 5), *args, **constexprs))
    assert seen["grid"] == (3, 5, 1)


def check_other_arguments_are_refused() -> None:
    args, constexprs = next(probes())
    for wrong in (True, 1.5, "text"):
        with pytest.raises(TypeError, match=type(wrong).__name__):
            launch(probe_kernel, (1,), *args[:2], wrong, 1, **constexprs)


@contextlib.contextmanager
def on_stream(stream: int) -> Iterator[None]:
    before = stub_driver.streams[stub_driver.DEVICE]
    stub_driver.streams[stub_driver.DEVICE] = stream
    yield
    stub_driver.streams[stub_driver.DEVICE] = before


def check_the_stream_of_the_moment() -> None:
    args, constexprs = next(probes())
    x, w, b = linear_tensors()
    for _ in range(3):
        linear_act(x, w, b)
    for stream in (0, 0xABC, 0xDEF):
        with on_stream(stream):
            assert launched(lambda: launch(probe_kernel, (1,), *args, **constexprs))[1]["stream"] == stream
            assert launched(lambda: linear_act(x, w, b))[1]["stream"] == stream


# ------------------------------------------------------------------------------------------------------- whole calls


def linear_tensors(M: int = 48, dtype: torch.dtype = torch.float16, N: int = 32, K: int = 64) -> tuple[Any, ...]:
    return torch.randn(M, K).to(dtype), torch.randn(N, K).to(dtype), torch.randn(N).to(dtype)


def offset_by(tensor: torch.Tensor, elements: int) -> torch.Tensor:
    """The same numbers, shape and strides, ``elements`` further from a 16-byte boundary."""
    room = torch.empty(tensor.numel() + 64, dtype=tensor.dtype)
    moved = room[elements : elements + tensor.numel()].view(tensor.shape)
    return moved.copy_(tensor)


def linear_calls() -> Iterator[tuple[str, tuple[Any, ...], str]]:
    """Name, arguments of ``linear_act``, and what is kept of such a call: "fused", "library" or nothing."""
    x, w, b = linear_tensors()
    yield "as it is", (x, w, b, "gelu"), "fused"
    yield "activation", (x, w, b, "relu"), "fused"
    yield "no bias", (x, w, None, "gelu"), "fused"
    yield "x requires grad", (x.clone().requires_grad_(), w, b, "gelu"), "fused"
    yield "only bias requires grad", (x, w, b.clone().requires_grad_(), "gelu"), "fused"
    yield "output saved", (x.clone().requires_grad_(), w, b, "relu"), "fused"
    for M in (1, 2, 16, 17, 300):
        yield f"M={M}", (linear_tensors(M)[0], w, b, "gelu"), "fused"
    for dtype in (torch.bfloat16, torch.float32):
        yield str(dtype), (*linear_tensors(dtype=dtype), "gelu"), "fused"
    yield "N", (x, *linear_tensors(N=48)[1:], "gelu"), "fused"
    yield "K", (*linear_tensors(K=80), "gelu"), "fused"
    yield "three dimensions", (x.view(3, 16, 64), w, b, "gelu"), "fused"
    yield "three dimensions, other shape", (x.view(4, 12, 64), w, b, "gelu"), "fused"
    yield "rows of a wider matrix", (torch.randn(48, 72).half()[:, :64], w, b, "gelu"), "fused"
    yield "rows of a still wider one", (torch.randn(48, 88).half()[:, :64], w, b, "gelu"), "fused"
    yield "CLS rows", (torch.randn(48, 5, 64).half()[:, 0], w, b, "gelu"), "fused"
    yield "weight of a wider matrix", (x, torch.randn(32, 72).half()[:, :64], b, "gelu"), "fused"
    yield "weight is x", (x[:32], x[:32], b, "gelu"), "fused"
    yield "x transposed", (torch.randn(64, 48).half().t(), w, b, "gelu"), "library"
    yield "odd N", (x, *(t[:31] for t in (w, b)), "gelu"), "library"
    yield "odd N, three dimensions", (x.view(3, 16, 64), *(t[:31] for t in (w, b)), "gelu"), "library"
    yield "odd N, four dimensions", (x.view(3, 4, 4, 64), *(t[:31] for t in (w, b)), "gelu"), "library"
    yield "odd N, x requires grad", (x.clone().requires_grad_(), *(t[:31] for t in (w, b)), "gelu"), "library"
    yield "odd N, only bias requires grad", (x, w[:31], b[:31].clone().requires_grad_(), "relu"), "library"
    # Off a boundary, or on a copy.
    yield "x off its boundary", (offset_by(x, 1), w, b, "gelu"), ""
    yield "weight off its boundary", (x, offset_by(w, 4), b, "gelu"), ""
    yield "bias off its boundary", (x, w, offset_by(b, 1), "gelu"), ""
    yield "bias with gaps", (x, w, torch.randn(64).half()[::2], "gelu"), ""
    yield "x with rows apart in memory", (torch.randn(3, 20, 64).half()[:, :16], w, b, "gelu"), ""


# Parameters of a launch that are looked at: those of the pass over a product are no more than three.
SEEN = {"fused": 8, "library": 3, "": 3}


def slow_and_seen(arguments: tuple[Any, ...], parameters: int = 5) -> dict[str, Any]:
    """The launch of a call that nothing kept can serve."""
    kept = dict(replay.calls)
    replay.calls.clear()
    launching._kept.clear()
    _, seen = launched(lambda: linear_act(*arguments), parameters)
    replay.calls.clear()
    replay.calls.update(kept)
    return seen


def check_kept_calls_launch_what_new_ones_do() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    cases = list(linear_calls())
    truth = {name: slow_and_seen(arguments, SEEN[kept]) for name, arguments, kept in cases}
    replay.calls.clear()
    seen_functions = {seen["function"] for seen in truth.values()}
    assert len(seen_functions) >= 8, len(seen_functions)
    for order in (cases, cases[::-1], cases):
        for name, arguments, kept in order:
            out, seen = launched(lambda arguments=arguments: linear_act(*arguments), SEEN[kept])
            x, w, bias, _ = arguments
            assert out.shape == (*x.shape[:-1], w.shape[0]), name
            assert out.dtype == x.dtype
            assert out.requires_grad == any(t.requires_grad for t in (x, w, bias) if t is not None), name
            assert out.is_contiguous()
            assert not out._is_view()
            for field in ("function", "grid", "stream", "block", "shared"):
                assert seen[field] == truth[name][field], (name, field)
            if not kept:
                continue
            given = (x, w, bias, out) if kept == "fused" else (out,)
            addresses = [t.data_ptr() for t in given if t is not None]
            # Then come preact, if it is saved, and the numbers that are not compiled in.
            saved = [t for t in getattr(out.grad_fn, "saved_tensors", ()) if t is not None]
            inputs = [t.data_ptr() for t in (x, w, bias) if t is not None]
            fresh = [t.data_ptr() for t in saved if t.data_ptr() not in (*inputs, *addresses)]
            assert len(fresh) == (out.requires_grad and arguments[3] == "gelu"), name
            if kept == "library":
                addresses = (fresh or addresses) + addresses
                fresh = []
            start = len(addresses) + len(fresh)
            assert seen["params"][:start] == addresses + fresh, name
            numbers = [value & 0xFFFFFFFF for value in seen["params"][start : start + 3]]
            assert numbers == [value & 0xFFFFFFFF for value in truth[name]["params"][start : start + 3]], name
            if kept == "library":
                assert numbers == [out.numel()], name
    torch.backends.cuda.matmul.fp32_precision = "ieee"


def check_the_product_of_a_kept_library_call() -> None:
    """The stub launches nothing, so what the library computed is still there."""
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    x, w, b = (t.float() for t in linear_tensors())
    for shaped in (
        x,
        x.view(3, 16, 64),
        x.view(3, 4, 4, 64),
        x.t().contiguous().t(),
        x.view(3, 16, 64).transpose(0, 1),
    ):
        replay.calls.clear()
        for wanted in (False, True):
            parameter = w.clone().requires_grad_(wanted)
            for _ in range(3):
                out = linear_act(shaped, parameter, b, "tanh")
                torch.testing.assert_close(out.detach(), torch.nn.functional.linear(shaped, w, b))
        assert len(replay.calls) == 1


def check_a_kept_library_call_under_autocast() -> None:
    """Through the operator, which autocast does not reach: the product keeps x's dtype, and the pass its buffer."""
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    x, w, b = (t.float() for t in linear_tensors())
    for enabled in (False, True, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out, preact = torch.ops.bert_fused.linear_act_fwd(x, w, b, "gelu", True)
        assert out.dtype is preact.dtype is torch.float32
        torch.testing.assert_close(preact, torch.nn.functional.linear(x, w, b))


def check_what_is_kept() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    for name, arguments, kept in linear_calls():
        replay.calls.clear()
        for _ in range(2):
            linear_act(*arguments)
        assert len(replay.calls) == bool(kept), name
    torch.backends.cuda.matmul.fp32_precision = "ieee"


def check_a_call_that_could_not_be_kept_is_kept_later() -> None:
    """Off its boundary, or while a profiler looked on."""
    x, w, b = linear_tensors()
    replay.calls.clear()
    linear_act(offset_by(x, 1), w, b)
    with observed(forward.linear_act_fwd_kernel, "launch_enter_hook", []):
        linear_act(x, w, b)
    assert not replay.calls
    linear_act(x, w, b)
    linear_act(x, w, b)
    assert len(replay.calls) == 1


def check_a_kept_call_is_made() -> None:
    """Or every other check here would hold without any being kept."""
    x, w, b = linear_tensors()
    for arguments in ((x, w, b, "gelu"), (x.clone().requires_grad_(), w, b, "gelu")):
        linear_act(*arguments)
        original = forward.linear_act_fwd
        forward.linear_act_fwd = None
        try:
            launched(lambda arguments=arguments: linear_act(*arguments))
        finally:
            forward.linear_act_fwd = original


def check_the_precision_of_fp32_is_read_each_time() -> None:
    arguments = linear_tensors(dtype=torch.float32)
    seen = {}
    for setting in ("ieee", "tf32", "ieee", "tf32"):
        torch.backends.cuda.matmul.fp32_precision = setting
        function = launched(lambda: linear_act(*arguments))[1]["function"]
        assert seen.setdefault(setting, function) == function
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert seen["ieee"] != seen["tf32"]


def check_a_parameter_whose_data_changes() -> None:
    x, w, b = linear_tensors()
    parameter = torch.nn.Parameter(torch.randn(64, 64).half())
    bias = torch.randn(64).half()
    with torch.no_grad():
        for _ in range(3):
            linear_act(x, parameter, bias)
        square = slow_and_seen((x, parameter, bias, "gelu"))
        parameter.data = parameter.data.t()
        for _ in range(2):
            assert launched(lambda: linear_act(x, parameter, bias))[1]["function"] != square["function"]
        parameter.data = parameter.data.t()[:32]
        for _ in range(2):
            out, seen = launched(lambda: linear_act(x, parameter, b))
            assert out.shape == (48, 32)
            assert seen["params"][1] == parameter.data_ptr()
        parameter.data = w.clone()
        _, seen = launched(lambda: linear_act(x, parameter, b))
        assert seen["params"][1] == parameter.data_ptr()


def check_descriptors() -> None:
    x, w, b = linear_tensors(M=512)
    config = Config("tma", "float16", 64, 32, 32, num_warps=4, num_stages=2)
    functions = set()
    for _ in range(3):
        fresh = x.clone()
        (out, _), seen = launched(
            lambda fresh=fresh: forward.linear_act_fwd(
                fresh, w, b, activation="gelu", save_preact=False, config=config
            ),
            parameters=12,
        )
        functions.add(seen["function"])
        # A descriptor is followed by two sizes and two strides.
        assert seen["params"][0] == fresh.data_ptr()
        assert seen["params"][5] == w.data_ptr()
        assert seen["params"][10] == b.data_ptr()
        assert seen["params"][11] == out.data_ptr()
    assert len(functions) == 1


def wide_tensors(M: int = 2048) -> tuple[Any, ...]:
    """Tensors that the table of the stub's GPU serves through descriptors."""
    return linear_tensors(M, N=64)


def check_kept_calls_with_descriptors() -> None:
    x, w, b = wide_tensors()
    functions = set()
    for wanted in (False, True):
        for round in range(4):
            x, w = x.clone(), w.clone().requires_grad_(wanted)
            shaped = x.view(2, -1, 64) if round % 2 else x
            out, seen = launched(lambda shaped=shaped, w=w: linear_act(shaped, w, b), parameters=23)
            functions.add((wanted, seen["function"]))
            params = seen["params"]
            assert out.shape == (*shaped.shape[:-1], 64)
            # A descriptor is followed by two sizes and two strides.
            assert [params[0], params[5], params[10], params[11]] == [t.data_ptr() for t in (x, w, b, out)]
            sizes = [[value & 0xFFFFFFFF for value in params[at : at + 4]] for at in (1, 6, 12)]
            assert sizes == [[2048, 64, 64, 1], [64, 64, 64, 1], [2048, 64, 64, 1]]
            if wanted:
                preact = next(t for t in reversed(out.grad_fn.saved_tensors) if t is not None)
                assert params[16] == preact.data_ptr()
            after = 21 if wanted else 16
            assert params[after] & 0xFFFFFFFF == 2048
    assert len(functions) == 2
    assert len(replay.calls) >= 4


def check_a_descriptor_is_that_of_its_call() -> None:
    """One address, many shapes and strides, in turn."""
    room, (_, w, b) = torch.randn(4096, 128).half(), wide_tensors()
    views = [room[:2048, :64], room.view(-1, 64)[:2048], room.view(-1, 64)[:4000], room.view(-1, 64)[:2048]]
    for _ in range(3):
        for x in views:
            _, seen = launched(lambda x=x: linear_act(x, w, b), parameters=6)
            assert seen["params"][0] == room.data_ptr()
            assert [value & 0xFFFFFFFF for value in seen["params"][1:5]] == [*x.shape, *x.stride()]
            assert seen["params"][5] == w.data_ptr()
    with torch.no_grad():
        parameter = torch.nn.Parameter(w)
        for _ in range(3):
            parameter.data = parameter.data.clone()
            _, seen = launched(lambda: linear_act(views[1], parameter, b), parameters=6)
            assert seen["params"][5] == parameter.data_ptr()


def check_descriptors_are_encoded_once_and_their_number_is_bounded() -> None:
    x, w, b = wide_tensors()
    encoded: list[int] = []
    utils = triton.runtime.driver.active.utils
    name = next(n for n in ("fill_tma_descriptor_tiled", "fill_tma_descriptor") if hasattr(utils, n))
    original = getattr(utils, name)
    setattr(utils, name, lambda *args: encoded.append(args[0]) or original(*args))
    try:
        linear_act(x, w, b)
        linear_act(x, w, b)
        encoded.clear()
        replay.encoded.clear()
        held = []  # an output that lives on has an address of its own
        for _ in range(5):
            held.append(linear_act(x, w, b))
        assert encoded.count(x.data_ptr()) == encoded.count(w.data_ptr()) == 1
        assert len(encoded) == 7
        replay.MAX_ENCODED, before = 3, replay.MAX_ENCODED
        for _ in range(5):
            held.append(linear_act(x, w, b))
            assert len(replay.encoded) <= 3
        replay.MAX_ENCODED = before
    finally:
        setattr(utils, name, original)


def check_a_kept_call_is_a_threads_first_cuda_work() -> None:
    """A driver encodes only where the thread has a context, which any call of CUDA's runtime gives it."""
    x, w, b = wide_tensors()
    linear_act(x, w, b)
    linear_act(x, w, b)
    utils = triton.runtime.driver.active.utils
    name = next(n for n in ("fill_tma_descriptor_tiled", "fill_tma_descriptor") if hasattr(utils, n))
    original, thread, refused = getattr(utils, name), threading.local(), []
    mem_get_info = torch.cuda.mem_get_info

    def encode(*args: Any) -> Any:
        if not hasattr(thread, "context"):
            refused.append(args)
            raise RuntimeError("Triton Error [CUDA]: invalid device context")
        return original(*args)

    def attempt() -> str:
        found: list[str] = []

        def work() -> None:
            replay.encoded.clear()
            try:
                _, seen = launched(lambda: linear_act(x, w, b), parameters=6)
                assert [seen["params"][0], seen["params"][5]] == [x.data_ptr(), w.data_ptr()]
            except RuntimeError as error:
                found.append(str(error))

        cold = threading.Thread(target=work)
        cold.start()
        cold.join()
        return "".join(found)

    setattr(utils, name, encode)
    try:
        torch.cuda.mem_get_info = lambda: vars(thread).update(context=True)
        assert attempt() == ""
        assert len(refused) == 1, len(refused)
        torch.cuda.mem_get_info = lambda: None  # what fails twice is the caller's to know
        assert "invalid device context" in attempt()
        assert len(refused) == 3, len(refused)
    finally:
        setattr(utils, name, original)
        torch.cuda.mem_get_info = mem_get_info


def check_backward() -> None:
    x, w, b = (t.requires_grad_() for t in linear_tensors())
    functions = set()
    for _ in range(3):
        out = linear_act(x, w, b)
        d_out = torch.ones_like(out)
        _, seen = launched(lambda out=out, d_out=d_out: torch.autograd.grad(out, (x, w, b), d_out))
        functions.add(seen["function"])
        assert seen["params"][0] == d_out.data_ptr()
    assert len(functions) == 1


# -------------------------------------------------------------------------------------------- who wants to see launches


@contextlib.contextmanager
def observed(kernel: Any, how: str, seen: list[Any]) -> Iterator[None]:
    runtime = knobs.runtime

    def hook(*args: Any, **kwargs: Any) -> None:
        seen.append(how)

    if how in ("launch_enter_hook", "launch_exit_hook"):
        getattr(runtime, how).add(hook)
        yield
        getattr(runtime, how).remove(hook)
    elif how == "a function as hook":
        chain, runtime.launch_enter_hook = runtime.launch_enter_hook, hook
        yield
        runtime.launch_enter_hook = chain
    else:
        kernel.pre_run_hooks.append(hook)
        yield
        kernel.pre_run_hooks.remove(hook)


def check_hooks_fire() -> None:
    args, constexprs = next(probes())
    x, w, b = linear_tensors()
    for _ in range(3):
        launch(probe_kernel, (1,), *args, **constexprs)
        linear_act(x, w, b)
        linear_act(x, w[:31], b[:31])
    for how in ("launch_enter_hook", "launch_exit_hook", "a function as hook", "pre_run_hooks"):
        for kernel, call in (
            (probe_kernel, lambda: launch(probe_kernel, (1,), *args, **constexprs)),
            (forward.linear_act_fwd_kernel, lambda: linear_act(x, w, b)),
            (act_pass.act_fwd_kernel, lambda: linear_act(x, w[:31], b[:31])),
        ):
            seen: list[Any] = []
            with observed(kernel, how, seen):
                call()
                call()
            assert seen == [how, how], (how, seen)
            call()
            assert len(seen) == 2


def check_settings_of_triton_are_seen() -> None:
    args, constexprs = next(probes())
    for _ in range(2):
        launch(probe_kernel, (1,), *args, **constexprs)
    usual = launched(lambda: launch(probe_kernel, (1,), *args, **constexprs))[1]["function"]
    knobs.runtime.debug = True
    try:
        debug = launched(lambda: launch(probe_kernel, (1,), *args, **constexprs))[1]["function"]
    finally:
        knobs.runtime.debug = False
    assert debug != usual
    assert launched(lambda: launch(probe_kernel, (1,), *args, **constexprs))[1]["function"] == usual
    for owner, name, value in (
        (knobs.compilation, "instrumentation_mode", "consan"),
        (knobs.runtime, "add_stages_inspection_hook", lambda *a: ("", "")),
    ):
        before = getattr(owner, name)
        setattr(owner, name, value)
        assert launching.is_observed(probe_kernel), name
        setattr(owner, name, before)
        assert not launching.is_observed(probe_kernel)


def check_an_unknown_triton_gets_its_own_path() -> None:
    args, constexprs = next(probes())
    launching._kept.clear()
    launching.LAUNCHER_IS_KNOWN = False
    records: list[str] = []
    logging.getLogger(launching.__name__).addFilter(lambda record: records.append(record.getMessage()))
    try:
        for _ in range(2):
            launched(lambda: launch(probe_kernel, (1,), *args, **constexprs))
        assert not launching._kept
        assert records == [launching.SLOW_LAUNCHES]
    finally:
        launching.LAUNCHER_IS_KNOWN = triton.__version__.startswith(launching.KNOWN_TRITONS)
    assert launching.LAUNCHER_IS_KNOWN


# ------------------------------------------------------------------------------------------- bounds, threads, processes


def check_bounds() -> None:
    launching.MAX_KEPT, replay.MAX_CALLS, before = 3, 3, (launching.MAX_KEPT, replay.MAX_CALLS)
    try:
        for _ in range(2):
            for args, constexprs in list(probes())[:8]:
                assert_as_plain(probe_kernel, (1,), args, constexprs)
                assert len(launching._kept) <= 3
            for M in range(2, 12):
                x, w, b = linear_tensors(M)
                out, seen = launched(lambda x=x, w=w, b=b: linear_act(x, w, b))
                assert seen["params"][0] == x.data_ptr()
                assert out.shape == (M, 32)
                assert len(replay.calls) <= 3
    finally:
        launching.MAX_KEPT, replay.MAX_CALLS = before


def check_no_tensor_is_kept_alive() -> None:
    x, w, b = linear_tensors()
    w.requires_grad_()
    for _ in range(3):
        out = linear_act(x, w, b)
    wide_x, wide_w, wide_b = wide_tensors()
    wide_w.requires_grad_()
    for _ in range(3):
        wide_out = linear_act(wide_x, wide_w, wide_b)
    references = [weakref.ref(t) for t in (x, w, b, out, wide_x, wide_w, wide_b, wide_out)]
    del x, w, b, out, wide_x, wide_w, wide_b, wide_out
    gc.collect()
    assert [reference() for reference in references] == [None] * 8


def check_threads() -> None:
    """Each thread has shapes of its own and some that all share; all start with nothing kept."""
    launching._kept.clear()
    replay.calls.clear()
    errors: list[str] = []
    start = threading.Barrier(6)

    def work(index: int) -> None:
        try:
            tensors = [linear_tensors(M) for M in (16, 17, 18 + index)]
            start.wait()
            for _ in range(60):
                for x, w, b in tensors:
                    assert linear_act(x, w, b).shape == (x.shape[0], 32)
        except BaseException:
            errors.append(traceback.format_exc())

    before = STUB.stub_launches()
    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]
    assert STUB.stub_launches() - before == 6 * 60 * 3
    # Every call kept has the grid and numbers of its own shape.
    for M in (16, 17, 18, 19, 20, 21, 22, 23):
        x, w, b = linear_tensors(M)
        _, seen = launched(lambda x=x, w=w, b=b: linear_act(x, w, b))
        assert seen["params"][4] & 0xFFFFFFFF == M
        assert seen["function"] == slow_and_seen((x, w, b, "gelu"))["function"]


def check_a_child_starts_with_nothing() -> None:
    x, w, b = linear_tensors()
    for _ in range(2):
        linear_act(x, w, b)
    assert launching._kept
    assert replay.calls
    pid = os.fork()
    if pid == 0:
        os._exit(0 if not launching._kept and not replay.calls else 1)
    assert os.waitpid(pid, 0)[1] == 0


class OnDeviceOne(torch.Tensor):
    def get_device(self) -> int:
        return 1


def check_devices_are_kept_apart() -> None:
    """A module is loaded once for each device."""
    (a, b, *numbers), constexprs = next(probes())
    stub_driver.streams[1] = 0xD1
    launching._kept.clear()
    for tensor in (a, a.as_subclass(OnDeviceOne)) * 2:
        _, seen = launched(lambda tensor=tensor: launch(probe_kernel, (1,), tensor, b, *numbers, **constexprs))
    assert seen["stream"] == 0xD1
    assert sorted(key[1] for key in launching._kept) == [-1, 1]


def check_a_new_and_a_kept_kernel_run_on_their_tensors_device() -> None:
    args, constexprs = next(probes())
    entered: list[Any] = []

    @contextlib.contextmanager
    def on_device(tensor: torch.Tensor) -> Iterator[None]:
        entered.append(tensor)
        before = STUB.stub_launches()
        yield
        assert STUB.stub_launches() == before + 1

    original, launching.on_device = launching.on_device, on_device
    try:
        launching._kept.clear()
        for _ in range(2):
            launch(probe_kernel, (1,), *args, **constexprs)
    finally:
        launching.on_device = original
    assert [tensor is args[0] for tensor in entered] == [True, True]


def check_lazily_zero_tensors_are_not_launched() -> None:
    """They have no address, and all else in common with those of a kept call."""
    tensors = linear_tensors()
    for _ in range(2):
        linear_act(*tensors)
    assert replay.calls
    for place, tensor in enumerate(tensors):
        zero = torch._efficientzerotensor(tensor.shape, dtype=tensor.dtype)
        arguments = [zero if i == place else other for i, other in enumerate(tensors)]
        before = STUB.stub_launches()
        out = linear_act(*arguments)
        assert STUB.stub_launches() == before
        arguments[place] = torch.zeros_like(tensor)
        torch.testing.assert_close(out, reference.linear_act(*arguments, "gelu"))


def check_another_device_is_made_the_current_one() -> None:
    x, w, b = linear_tensors()
    for _ in range(2):
        linear_act(x, w, b)
    entered: list[int] = []

    @contextlib.contextmanager
    def device(index: int) -> Iterator[None]:
        entered.append(index)
        yield
        entered.append(-99)

    originals = replay.current_device, torch.cuda.device
    replay.current_device, torch.cuda.device = (lambda: 5), device
    try:
        launched(lambda: linear_act(x, w, b))
    finally:
        replay.current_device, torch.cuda.device = originals
    assert entered == [stub_driver.DEVICE, -99]


CHECKS = [name for name in globals() if name.startswith("check_")]


def main() -> None:
    results = {}
    for name in sys.argv[1:] or CHECKS:
        try:
            globals()[name]()
            results[name] = ""
        except BaseException:
            results[name] = traceback.format_exc()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
