"""The Triton kernels on activations from a file, in Triton's interpreter, against fp64. Used by the demo.

``TRITON_INTERPRET=1 python -m bert_fused.interpreter_proof FILE``; FILE is a safetensors file that holds x, weight and
bias of an intermediate and a pooler module in fp32. Exits with 1 if an error is over the promised bound.
"""

import sys
from pathlib import Path

import torch

from .kernels.linear_act import linear_act_fwd
from .reference import error_bound, linear_act


def main(path: Path) -> int:
    from safetensors.torch import load_file

    tensors = load_file(path)
    worst = 0.0
    for module, activation in (("intermediate", "gelu"), ("pooler", "tanh")):
        if f"{module}.x" not in tensors:
            continue
        for dtype in (torch.float32, torch.float16):
            x, weight, bias = (tensors[f"{module}.{name}"].to(dtype) for name in ("x", "weight", "bias"))
            rows = x[:, 0] if module == "pooler" else x.reshape(-1, x.shape[-1])
            out, _ = linear_act_fwd(rows, weight, bias, activation=activation, save_preact=False)
            exact = linear_act(rows.double(), weight.double(), bias.double(), activation)
            error = (out.double() - exact).abs()
            share = float((error / error_bound(rows, weight, bias, activation, exact, dtype)).max())
            worst = max(worst, share)
            shape = f"[{rows.shape[0]}, {rows.shape[1]}] -> [{out.shape[0]}, {out.shape[1]}]"
            print(
                f"  {module:<13}{str(dtype).removeprefix('torch.'):<9}{shape:<26}"
                f"max error {float(error.max()):.2e}, {share:.2f} of the promised bound"
            )
    return int(worst > 1.0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
