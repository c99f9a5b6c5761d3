"""Offsets that 32 bits cannot hold; test_forward and test_backward see that no foreign memory is touched."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

INT64_SCRIPT = """
import dataclasses
import torch
from triton.runtime import interpreter

interpreter.interpreter_builder.options = dataclasses.replace(interpreter.interpreter_builder.options, debug=True)
# Its copy of the arguments back to the device would touch all of the memory.
interpreter.GridExecutor._restore_args_dev = lambda *args: None

from bert_fused.kernels.elementwise import act_bwd
from bert_fused.kernels.configs import Config
from bert_fused.kernels.linear_act import linear_act_fwd

STRIDE = 2**30
memory = torch.empty(3 * STRIDE + 64, dtype=torch.float16)  # only the pages that are touched become real


def far(small, by_columns):
    strides = (1, STRIDE) if by_columns else (STRIDE, 1)
    return memory.as_strided(small.shape, strides).copy_(small)


def check(x, weight, far_args):
    args = {"x": x, "weight": weight} | far_args
    for block_k in (2, 4):  # the step between tiles overflows, or the offsets inside one
        config = Config("pointer", "float16", 16, 16, block_k, num_warps=1, num_stages=1)
        near = linear_act_fwd(x, weight, None, activation="none", save_preact=False, config=config)[0]
        out = linear_act_fwd(**args, bias=None, activation="none", save_preact=False, config=config)[0]
        assert torch.equal(out, near), (list(far_args), block_k)


rows, columns = torch.arange(64.0).view(4, 16).half(), torch.arange(64.0).view(16, 4).half()
many = torch.ones(5, 16).half()
check(rows, many, {"x": far(rows, by_columns=False)})
check(many, rows, {"weight": far(rows, by_columns=False)})
few = torch.ones(5, 4).half()
check(columns, few, {"x": far(columns, by_columns=True)})
check(few, columns, {"weight": far(columns, by_columns=True)})
for small, by_columns in ((rows, False), (columns, True)):
    saved = torch.ones_like(small)
    d_preact, _ = act_bwd(far(small, by_columns), saved, activation="relu", bias_grad=True)
    assert torch.equal(d_preact, small)
print("passed")
"""


def test_offsets_past_32_bits_do_not_wrap() -> None:
    """Strides of 2^30 elements, in a process of its own: a wrapped offset is a segmentation fault."""
    result = subprocess.run([sys.executable, "-c", INT64_SCRIPT], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.stdout.strip() == "passed", f"exit status {result.returncode}: {result.stderr[-2000:]}"
