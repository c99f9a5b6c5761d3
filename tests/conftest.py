"""Tests run every kernel through Triton's interpreter on the CPU, or, with BERT_FUSED_TEST_GPU=1, on the GPU."""

import os

import pytest

GPU = os.environ.get("BERT_FUSED_TEST_GPU") == "1"
if not GPU:
    # Triton reads this when a kernel is decorated, so it must be set before anything imports one.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = [item for item in items if GPU == (item.get_closest_marker("gpu") is not None)]
    config.hook.pytest_deselected(items=[item for item in items if item not in here])
    items[:] = here
