"""Tests run every kernel through Triton's interpreter on the CPU, or, with BERT_FUSED_TEST_GPU=1, on the GPU."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

GPU = os.environ.get("BERT_FUSED_TEST_GPU") == "1"
if not GPU:
    # Triton reads this when a kernel is decorated, so it must be set before anything imports one.
    os.environ["TRITON_INTERPRET"] = "1"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # also where the GPU's tests are rehearsed (gpu.py)

import torch  # noqa: E402

if GPU:
    from watchdog import pytest_configure, pytest_runtest_protocol, pytest_runtest_teardown  # noqa: F401

if INTERPRETED:
    import interpreter

    from bert_fused import fallback

    interpreter.install()
    fallback.INTERPRETER_DTYPES = fallback.KERNEL_DTYPES


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = [item for item in items if GPU == (item.get_closest_marker("gpu") is not None)]
    if "slow" not in config.option.markexpr:
        here = [item for item in here if item.get_closest_marker("slow") is None]
    config.hook.pytest_deselected(items=[item for item in items if item not in here])
    items[:] = here
    for item in items:
        # One worker runs all tests of a module's fixture, so that it is set up once (--dist loadgroup).
        fixtures = item._fixtureinfo.name2fixturedefs.values()
        if any(definitions[-1].scope == "module" for definitions in fixtures):
            item.add_marker(pytest.mark.xdist_group(item.path.name))


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point():
            tensor.detach().fill_(float("nan"))
        elif tensor.dtype == torch.int32:
            tensor.fill_(-7)
        return tensor

    return poisoned


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """New tensors hold NaN, counters a wrong number: an element left unwritten cannot look right by chance."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


@pytest.fixture
def sanitized() -> "Iterator[interpreter.Sanitizer]":
    """The record of the test's launches, each of which is watched (``interpreter.sanitized``)."""
    with interpreter.sanitized() as record:
        yield record


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels launched so far."""
    from bert_fused.kernels import act_grad
    from bert_fused.kernels import linear_act as forward

    names: list[str] = []
    for module, name in ((forward, "linear_act_fwd"), (act_grad, "act_bwd")):
        launch = getattr(module, name)

        def record(*args: Any, _launch: Callable[..., Any] = launch, _name: str = name, **kwargs: Any) -> Any:
            names.append(_name)
            return _launch(*args, **kwargs)

        monkeypatch.setattr(module, name, record)
    return names
