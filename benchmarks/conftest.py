from typing import Any

from benchmarks.records import environment
from benchmarks.test_speed import DEVICE


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info["bert_fused"] = environment(DEVICE, None)
