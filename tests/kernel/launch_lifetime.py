"""Checks of plans over time: streams, threads, processes, memory, their number."""

import gc
import os
import threading
import traceback
import weakref

import torch
from launch_common import (
    STUB,
    launched,
    linear_tensors,
    observed,
    on_stream,
    slow_and_seen,
    wide_tensors,
)

from bert_fused import linear_act, reference
from bert_fused.kernels import linear_act as forward
from bert_fused.kernels import plan
from bert_fused.kernels.plan import plans


def check_the_stream_of_the_moment() -> None:
    x, w, b = linear_tensors()
    for _ in range(3):
        linear_act(x, w, b)
    for stream in (0, 0xABC, 0xDEF):
        with on_stream(stream):
            assert launched(lambda: linear_act(x, w, b))[1]["stream"] == stream


def check_a_plan_made_while_a_profiler_looked_on_compiles_later() -> None:
    x, w, b = linear_tensors()
    plans.clear()
    with observed(forward.linear_act_fwd_kernel, "launch_enter_hook", []):
        _, by_triton = launched(lambda: linear_act(x, w, b))
    for _ in range(2):
        _, seen = launched(lambda: linear_act(x, w, b))
        assert seen["function"] == by_triton["function"]
    assert len(plans) == 1


def check_the_number_of_plans_is_bounded() -> None:
    plan.MAX_PLANS, before = 3, plan.MAX_PLANS
    try:
        for M in (*range(2, 12), *range(2, 12)):
            x, w, b = linear_tensors(M)
            out, seen = launched(lambda x=x, w=w, b=b: linear_act(x, w, b))
            assert seen["params"][0] == x.data_ptr()
            assert out.shape == (M, 32)
            assert len(plans) <= 3
    finally:
        plan.MAX_PLANS = before


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
    plans.clear()
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
    assert plans
    pid = os.fork()
    if pid == 0:
        os._exit(1 if plans else 0)
    assert os.waitpid(pid, 0)[1] == 0


def check_lazily_zero_tensors_are_not_launched() -> None:
    """They have no address; otherwise they are like the tensors of a kept call."""
    tensors = linear_tensors()
    for _ in range(2):
        linear_act(*tensors)
    assert plans
    for place, tensor in enumerate(tensors):
        zero = torch._efficientzerotensor(tensor.shape, dtype=tensor.dtype)
        arguments = [zero if i == place else other for i, other in enumerate(tensors)]
        before = STUB.stub_launches()
        out = linear_act(*arguments)
        assert STUB.stub_launches() == before
        arguments[place] = torch.zeros_like(tensor)
        torch.testing.assert_close(out, reference.linear_act(*arguments, "gelu"))
