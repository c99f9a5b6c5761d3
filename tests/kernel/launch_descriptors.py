"""Checks of launches with tensor descriptors."""

import threading
from typing import Any

import torch
import triton
from launch_common import launched, linear_tensors, wide_tensors

from bert_fused import linear_act
from bert_fused.kernels import linear_act as forward
from bert_fused.kernels import plan
from bert_fused.kernels.configs import Config
from bert_fused.kernels.plan import plans


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
    assert len(plans) >= 4


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
    plans.clear()
    try:
        held = [linear_act(x, w, b)]  # an output that lives on has an address of its own
        encoded.clear()
        for _ in range(5):
            held.append(linear_act(x, w, b))
        assert encoded.count(x.data_ptr()) == encoded.count(w.data_ptr()) == 0
        assert len(encoded) == 5
        assert plan._encoded_at.cache_info().maxsize == plan.MAX_ENCODED
    finally:
        setattr(utils, name, original)


def check_a_kept_call_is_a_threads_first_cuda_work() -> None:
    """A driver encodes only where the thread has a context, which any call of CUDA's runtime gives it."""
    x, w, b = wide_tensors()
    plans.clear()
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
            plan._encoded_at.cache_clear()
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
        torch.cuda.mem_get_info = lambda: None  # an error that comes twice reaches the caller
        assert "invalid device context" in attempt()
        assert len(refused) == 3, len(refused)
    finally:
        setattr(utils, name, original)
        torch.cuda.mem_get_info = mem_get_info
