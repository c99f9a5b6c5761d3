"""The Triton kernels on activations from a file, in Triton's interpreter, against fp64. Used by the demo.

``TRITON_INTERPRET=1 python -m bert_fused.cli.interpreter_proof FILE``; FILE is a safetensors file that holds x, weight
and bias of an intermediate and a pooler module in fp32. Prints a JSON list; exits with 1 if an error is over the
promised bound.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from ..kernels.linear_act import linear_act_fwd
from ..reference import error_bound, linear_act


def main(path: Path) -> int:
    from safetensors.torch import load_file

    tensors = load_file(path)
    proofs: list[dict[str, Any]] = []
    for module, activation in (("intermediate", "gelu"), ("pooler", "tanh")):
        if f"{module}.x" not in tensors:
            continue
        for dtype in (torch.float32, torch.float16):
            x, weight, bias = (tensors[f"{module}.{name}"].to(dtype) for name in ("x", "weight", "bias"))
            rows = x[:, 0] if module == "pooler" else x.reshape(-1, x.shape[-1])
            out, _ = linear_act_fwd(rows, weight, bias, activation=activation, save_preact=False)
            exact = linear_act(rows.double(), weight.double(), bias.double(), activation)
            error = (out.double() - exact).abs()
            proofs.append(
                {
                    "module": module,
                    "dtype": str(dtype).removeprefix("torch."),
                    "M": rows.shape[0],
                    "N": out.shape[1],
                    "K": rows.shape[1],
                    "error": float(error.max()),
                    "share_of_bound": float((error / error_bound(rows, weight, bias, activation, exact, dtype)).max()),
                }
            )
    print(json.dumps(proofs))
    return int(not all(proof["share_of_bound"] <= 1 for proof in proofs))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
