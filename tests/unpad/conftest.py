import pytest


@pytest.fixture(autouse=True)
def plain_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests are about encoders: the kernels inside them need not be interpreted."""
    monkeypatch.setenv("BERT_FUSED_DISABLE", "1")
