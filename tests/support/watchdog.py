"""Hooks of pytest for tests on a GPU, where one fault or hang would spoil all that follow in its process.

After a fault in a kernel every call of CUDA fails, and after a deadlock none returns. Either ends the worker of
pytest-xdist right after, or in, the test that did it: that test fails, and a new worker goes on with the others.
"""

import faulthandler
import os
import sys
from collections.abc import Generator
from typing import Any

import pytest
import torch

SECONDS = 120.0
DEAD = 70

_stderr = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    assert sys.__stderr__ is not None
    config.stash[_stderr] = os.dup(sys.__stderr__.fileno())  # a test's own is captured, and lost with the process


def _watch(item: pytest.Item) -> None:
    """End this process in ``SECONDS`` from now. A thread in C keeps the time: a hang may hold Python's lock."""
    faulthandler.dump_traceback_later(SECONDS, exit=True, file=item.config.stash[_stderr])


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    _watch(item)
    try:
        result = yield
        _watch(item)
        # Not in the next test's setup: xdist blames the test that a worker dies in, and this one has been reported.
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError as error:
        os.write(item.config.stash[_stderr], f"\nafter {item.nodeid} the GPU can do no more: {error}\n".encode())
        os._exit(DEAD)
    finally:
        faulthandler.cancel_dump_traceback_later()
    return result


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    _watch(item)  # again: pytest stops the clock of a test that has failed
