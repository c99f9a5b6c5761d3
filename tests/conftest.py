"""Tests run every kernel through Triton's interpreter on the CPU, or, with BERT_FUSED_TEST_GPU=1, on the GPU.

With BERT_FUSED_EMULATE=90 as well, the GPU's tests run in the PTX emulator, compiled for sm_90 (``ptx/driver.py``).
"""

import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

GPU = os.environ.get("BERT_FUSED_TEST_GPU") == "1"
if not GPU:
    # Triton reads this when a kernel is decorated, so it must be set before anything imports one.
    os.environ["TRITON_INTERPRET"] = "1"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # also where the GPU's tests are rehearsed (gpu.py)
EMULATED_ARCH = int(os.environ.get("BERT_FUSED_EMULATE", "0"))

import torch  # noqa: E402
from cpu import on_cpu  # noqa: E402, F401

if GPU:
    from watchdog import pytest_configure, pytest_runtest_protocol, pytest_runtest_teardown  # noqa: F401

if EMULATED_ARCH:
    import driver

    driver.install(EMULATED_ARCH)

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
    """Names of the kernels launched so far, without their ``_kernel``."""
    from bert_fused.kernels.plan import Launch

    names: list[str] = []
    call = Launch.__call__

    def record(self: Launch, *tensors: torch.Tensor | None) -> None:
        names.append(self.kernel.fn.__name__.removesuffix("_kernel"))
        call(self, *tensors)

    monkeypatch.setattr(Launch, "__call__", record)
    return names


@pytest.fixture
def launched_on(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The tensors of each launch so far."""
    from bert_fused.kernels.plan import Launch

    given: list[tuple[Any, ...]] = []
    call = Launch.__call__
    monkeypatch.setattr(Launch, "__call__", lambda self, *tensors: given.append(tensors) or call(self, *tensors))
    return given


@pytest.fixture(autouse=True)
def no_plans() -> None:
    """A test that patches what a plan is made from must not meet an earlier test's plan."""
    if (plan := sys.modules.get("bert_fused.kernels.plan")) is not None:
        plan.plans.clear()


@pytest.fixture(autouse=True)
def no_failures_in_the_emulator() -> Iterator[None]:
    """Fail a test whose launches the PTX emulator had something against."""
    yield
    if EMULATED_ARCH:
        failures, driver.failures[:] = driver.failures[:], []
        assert not failures, "\n".join(failures[:3])
