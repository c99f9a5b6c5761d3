"""A CPU whose vendor the tests choose, so that oneDNN serves it wherever they run.

The tests' process interprets kernels, so the fixture lets calls meet the reason that a process without them has.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from bert_fused import onednn, ops

NAMES = ("gelu", "gelu_tanh", "relu", "silu", "tanh", "none")
GATED = ("gelu(a)*b", "a*gelu(b)", "silu(a)*b", "none(a)*b")


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A CPU on which oneDNN serves fp32 and bf16 from 8 rows on. Returns the activations it served so far."""
    from bert_fused.hf import checks  # transformers, which few tests of kernels need
    from bert_fused.kernels.plan import plans

    table = {("AuthenticAMD", dtype): 8 for dtype in (torch.float32, torch.bfloat16)}
    for name in ("_FROM_ROWS", "_FROM_ROWS_ALONE", "_FROM_ROWS_GATED"):
        monkeypatch.setattr(onednn, name, table)
    monkeypatch.setattr(onednn, "interpreted", lambda: False)
    monkeypatch.setattr(onednn, "vendor", lambda: "AuthenticAMD")
    for name in ("fallback_reason", "device_reason"):
        monkeypatch.setattr(ops, name, lambda *_: "cpu is not an NVIDIA GPU")
    monkeypatch.setattr(checks, "_CPU_HAS_KERNELS", False)
    plans.clear()  # of the interpreter
    served: list[str] = []
    honest = onednn.linear_act

    def watch(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        served.append(activation)
        return honest(x, weight, bias, activation)

    for cached in (onednn.from_rows, onednn._agrees):
        cached.cache_clear()
    for activation in (*NAMES, *GATED):
        for dtype in (torch.float32, torch.bfloat16):
            assert onednn._agrees(dtype, activation)
    monkeypatch.setattr(onednn, "linear_act", watch)
    yield served
    plans.clear()
    onednn.from_rows.cache_clear()
    onednn._agrees.cache_clear()
