"""Launches recorded in a process whose driver is a stub (``benchmarks/static/stub_driver.py``).

Every launch goes through Triton's own launcher into ``libcuda_stub.c``, which keeps what it was given. ``kernel[grid]``
is the truth: what is launched must be the kernel that it picks, with the same grid, stream and parameters.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.static import stub_driver

# The stub comes before the kernels. Under pytest, which runs them in the interpreter, only names are read from here.
STUB: Any = None
if os.environ.get("TRITON_INTERPRET") != "1":
    STUB = stub_driver.install()

import torch  # noqa: E402
from triton import knobs  # noqa: E402

from bert_fused import linear_act  # noqa: E402
from bert_fused.kernels.plan import plans  # noqa: E402


def launched(call: Callable[[], Any], parameters: int = 5) -> tuple[Any, dict[str, Any]]:
    """Return the result of ``call`` and its one launch, which must have that many parameters."""
    STUB.stub_keep_params(parameters)
    before = STUB.stub_launches()
    result = call()
    assert STUB.stub_launches() == before + 1, STUB.stub_launches() - before
    last = STUB.stub_last_launch().contents
    STUB.stub_keep_params(0)
    seen = {"function": last.function, "grid": tuple(last.grid), "stream": last.stream, "block": last.block}
    return result, seen | {"shared": last.shared, "params": list(last.params[:parameters])}


@contextlib.contextmanager
def on_stream(stream: int) -> Iterator[None]:
    before = stub_driver.streams[stub_driver.DEVICE]
    stub_driver.streams[stub_driver.DEVICE] = stream
    yield
    stub_driver.streams[stub_driver.DEVICE] = before


def linear_tensors(M: int = 48, dtype: torch.dtype = torch.float16, N: int = 32, K: int = 64) -> tuple[Any, ...]:
    return torch.randn(M, K).to(dtype), torch.randn(N, K).to(dtype), torch.randn(N).to(dtype)


def offset_by(tensor: torch.Tensor, elements: int) -> torch.Tensor:
    """The same numbers, shape and strides, ``elements`` further from a 16-byte boundary."""
    room = torch.empty(tensor.numel() + 64, dtype=tensor.dtype)
    moved = room[elements : elements + tensor.numel()].view(tensor.shape)
    return moved.copy_(tensor)


def wide_tensors(M: int = 2048) -> tuple[Any, ...]:
    """Tensors that the table of the stub's GPU serves through descriptors."""
    return linear_tensors(M, N=64)


def slow_and_seen(arguments: tuple[Any, ...], parameters: int = 5) -> dict[str, Any]:
    """The launch of a call that no plan serves yet."""
    kept = dict(plans)
    plans.clear()
    _, seen = launched(lambda: linear_act(*arguments), parameters)
    plans.clear()
    plans.update(kept)
    return seen


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
