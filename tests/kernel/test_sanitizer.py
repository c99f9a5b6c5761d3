"""The sanitizer is loud about faults planted in the kernels, and silent without them."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import triton
import triton.language as tl
from interpreter import Sanitizer, SanitizerError
from interpreter import sanitized as sanitize
from reference64 import (
    generator,
    make_inputs,
    strided_vector,
    with_layout,
)

from bert_fused.kernels import elementwise, linear_act, tiles
from bert_fused.kernels.configs import Config

pytestmark = pytest.mark.usefixtures("poisoned_empty")

# ----------------------------------------------------------------------------------------- faults in the kernels proper


def pointer(module: ModuleType, K: int = 45, group_m: int = 2) -> None:
    i = make_inputs("unit", 19, 70, K, torch.float16)
    config = Config("pointer", "float16", 16, 32, 32, num_warps=1, num_stages=1, group_m=group_m)
    assert i.bias is not None
    bias = strided_vector(i.bias)
    module.linear_act_fwd(i.x, i.weight, bias, activation="gelu", save_preact=True, config=config)


def tma(module: ModuleType, persistent: int = 0, subtiles: int = 1) -> None:
    i = make_inputs("unit", 37, 72, 40, torch.float16)
    tile = {"num_warps": 1, "num_stages": 1, "group_m": 2, "persistent": persistent, "subtiles": subtiles}
    config = Config("tma", "float16", 16, 32, 32, **tile)
    module.linear_act_fwd(i.x, i.weight, i.bias, activation="gelu", save_preact=True, config=config)


def gated(module: ModuleType) -> None:
    i = make_inputs("unit", 19, 66, 45, torch.float16)
    config = Config("pointer", "float16", 16, 16, 32, num_warps=1, num_stages=1)
    module.linear_act_fwd(i.x, i.weight, i.bias, activation="gelu(a)*b", save_preact=True, config=config)


def gated_grad(module: ModuleType) -> None:
    d_out, saved = torch.randn(150, 70).half(), torch.randn(150, 140).half()
    module.act_bwd(d_out, saved, activation="gelu(a)*b", bias_grad=True)


def grad(module: ModuleType) -> None:
    d_out, saved = (torch.randn(150, 160, generator=generator(seed)).half() for seed in (0, 1))
    module.act_bwd(d_out, with_layout(saved, "column_slice"), activation="silu", bias_grad=True)


CALLS: dict[str, Callable[[ModuleType], None]] = {
    "pointer": pointer,
    "even K": lambda module: pointer(module, K=64),
    "more K than N": lambda module: pointer(module, K=80),
    "wide groups": lambda module: pointer(module, group_m=8),
    "tma": tma,
    "persistent": lambda module: tma(module, persistent=2),
    "subtiles": lambda module: tma(module, persistent=1, subtiles=2),
    "pass": lambda module: module.act_fwd(37 * 71, "gelu")(torch.randn(37, 71), torch.empty(37, 71)),
    "grad": grad,
    "gated": gated,
    "gated pass": lambda module: module.act_fwd(37 * 71, "gelu(a)*b", 71)(torch.randn(37, 142), torch.empty(37, 71)),
    "gated grad": gated_grad,
}
MODULES = dict.fromkeys(("pass", "grad", "gated pass", "gated grad"), elementwise)

ONCE = r"elements of \w+, \d+ were never written and \d+ more than once"
# The report also names the nearest tensor, which depends on where the allocator put them.
READS, WRITES = r"reads \d+ elements of .* outside", r"writes \d+ elements of .* outside"

# Name -> call, the source to replace, its replacement, and the report. tests/mutants plants other faults.
FAULTS = {
    "store: no mask of rows": (
        "pointer",
        "mask = (start_m + rows < M) & (start_n + cols < N)",
        "mask = (rows >= 0) & (start_n + cols < N)",
        WRITES,
    ),
    "store: no mask of columns": (
        "pointer",
        "mask = (start_m + rows < M) & (start_n + cols < N)",
        "mask = (start_m + rows < M) & (cols >= 0)",
        WRITES + "|" + ONCE,
    ),
    "store: columns one too few": ("pointer", "(start_n + cols < N)", "(start_n + cols < N - 1)", ONCE),
    "store: wrong row of a tile": ("pointer", "base = start_m.to(tl.int64) * N", "base = start_m * (N + 1)", WRITES),
    "store: wrong stride": ("pointer", "offs = rows * N + cols", "offs = rows * (N + 1) + cols", WRITES + "|" + ONCE),
    "x: rows clamped one too far": ("pointer", "tl.arange(0, BLOCK_M), M - 1)", "tl.arange(0, BLOCK_M), M)", READS),
    "W: rows not clamped": (
        "pointer",
        "cols = tl.minimum(start_n + tl.arange(0, BLOCK_N), N - 1)",
        "cols = (start_n + tl.arange(0, BLOCK_N))",
        READS,
    ),
    "x: no mask of K": ("pointer", "tl.load(x_ptrs, mask=mask_k[None, :], other=0.0)", "tl.load(x_ptrs)", READS),
    "K: a step too many": ("even K", "x = tl.load(x_ptrs)", "x = tl.load(x_ptrs + BLOCK_K)", READS),
    "x: steps along rows": ("even K", "tl.cast(stride_xk,", "tl.cast(stride_xm,", READS),
    "W: steps along rows": ("even K", "tl.cast(stride_wk,", "tl.cast(stride_wn,", READS),
    "W: strides swapped": (
        "more K than N",
        "*weight.stride())",
        "weight.stride(1), weight.stride(0))",
        READS,
    ),
    "grid: one too few": (
        "wide groups",
        "linear_act_fwd_kernel, num_blocks,",
        "linear_act_fwd_kernel, num_blocks - 1,",
        ONCE,
    ),
    "tma: rows for columns": ("tma", "out_ptr.store([start_m, start_n]", "out_ptr.store([start_n, start_m]", ONCE),
    "persistent: every block does all": ("persistent", "tl.num_programs(0)\n", "1\n", ONCE),
    "pass: one too many": ("pass", "mask = offs < numel", "mask = offs <= numel", READS),
    "pass: one too few": ("pass", "mask = offs < numel", "mask = offs < numel - 1", ONCE),
    "grad: no mask of columns": ("grad", "& mask_n[None, :]", "& (offs_n >= 0)[None, :]", READS),
    "grad: strides swapped": (
        "grad",
        "*d_out.stride())",
        "d_out.stride(1), d_out.stride(0))",
        READS,
    ),
    "grad: wrong step": (
        "grad",
        "offs += tl.cast(width, tl.int64) * BLOCK_M",
        "offs += width * (BLOCK_M + 1)",
        READS,
    ),
    "grad: sums without mask": (
        "grad",
        "tl.sum(total, axis=0), mask=mask_n)",
        "tl.sum(total, axis=0))",
        WRITES + "|" + ONCE,
    ),
    "grad: sums too few": (
        "grad",
        "torch.empty(num_pid_m, width",
        "torch.empty(num_pid_m - 1, width",
        WRITES,
    ),
    "grad: grid one too many": (
        "grad",
        "num_pid_m * triton.cdiv(N, BLOCK_N), (M",
        "num_pid_m * triton.cdiv(N, BLOCK_N) + 1, (M",
        WRITES,
    ),
    "gated: rows of W one half too far": (
        "gated",
        "to_b = tl.cast(N, tl.int64) * stride_wn",
        "to_b = tl.cast(N + 1, tl.int64) * stride_wn",
        READS,
    ),
    "gated: bias of the second half without mask": (
        "gated",
        "tl.load(bias_ptr + N + offs_n, mask=offs_n < N,",
        "tl.load(bias_ptr + N + offs_n, mask=offs_n >= 0,",
        READS,
    ),
    "gated: second half stored over the first": ("gated", "tl.store(preact_ptrs + N,", "tl.store(preact_ptrs,", ONCE),
    "gated: rows of preact as long as out's": ("gated", "(offs + rows * N)", "offs", ONCE),
    "gated pass: rows of preact as long as out's": ("gated pass", "cols // N * N", "cols // N * (N + 1)", READS),
    "gated grad: second half over the first": (
        "gated grad",
        "tl.store(d_preact_ptr + offs + N,",
        "tl.store(d_preact_ptr + offs,",
        ONCE,
    ),
    "gated grad: sums of the second half over the first's": (
        "gated grad",
        "tl.store(partial_ptrs + N,",
        "tl.store(partial_ptrs,",
        ONCE,
    ),
}


def rewritten(call: str, old: str, new: str, folder: Path) -> ModuleType:
    """The module of the kernel that ``call`` launches, with ``old`` in its source or in that of its tiles replaced."""
    original = MODULES.get(call, linear_act)
    sources = {module: Path(module.__file__).read_text() for module in (tiles, original)}
    places = [module for module, source in sources.items() for _ in range(source.count(old))]
    assert len(places) == 1, f"{old!r} is {len(places)} times in {original.__file__} and {tiles.__file__}"
    sources[places[0]] = sources[places[0]].replace(old, new)
    with pytest.MonkeyPatch.context() as patch:
        for module, source in sources.items():
            path = folder / Path(module.__file__).name  # Triton reads a kernel's source when it first runs
            path.write_text(source)
            spec = importlib.util.spec_from_file_location("bert_fused.kernels.rewritten", path)
            made = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(made)
            patch.setitem(sys.modules, module.__name__, made)
    return made


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_planted_in_a_kernel_is_reported(fault: str, tmp_path: Path) -> None:
    call, old, new, report = FAULTS[fault]
    module = rewritten(call, old, new, tmp_path)
    with sanitize(), pytest.raises(SanitizerError, match=report):
        CALLS[call](module)


@pytest.mark.parametrize("call", CALLS)
def test_a_kernel_without_a_fault_is_not_reported(call: str, sanitized: Sanitizer) -> None:
    CALLS[call](MODULES.get(call, linear_act))
    assert len(sanitized.launches) == 1


# ------------------------------------------------------------------------------------------------- faults by themselves


@triton.jit
def planted_kernel(src_ptr, dst_ptr, first, reads, writes, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    value = tl.load(src_ptr + first + offs, mask=offs < reads, other=0.0)
    tl.store(dst_ptr + offs, value, mask=offs < writes)


@triton.jit
def unmasked_kernel(src_ptr, dst_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(dst_ptr + offs, tl.load(src_ptr + offs))


@triton.jit
def atomic_kernel(dst_ptr, BLOCK: tl.constexpr):
    tl.atomic_add(dst_ptr + tl.arange(0, BLOCK), 1)


@pytest.mark.parametrize(
    ("first", "reads", "writes", "programs", "message"),
    [
        (0, 5, 4, 1, "reads 1 elements of 4 bytes outside .* src_ptr"),
        (-1, 4, 4, 1, "reads 1 elements of 4 bytes outside .* src_ptr -4 bytes"),
        (0, 4, 5, 1, "writes 1 elements of 4 bytes outside .* dst_ptr"),
        (0, 4, 3, 1, "of 4 elements of dst_ptr, 1 were never written and 0 more than once"),
        (0, 4, 4, 2, "of 4 elements of dst_ptr, 0 were never written and 4 more than once"),
    ],
    ids=["read past the end", "read before the start", "write past the end", "unwritten", "written twice"],
)
@pytest.mark.parametrize("view", ["rows", "middle of a row"])
def test_a_stray_element_is_reported(
    view: str, first: int, reads: int, writes: int, programs: int, message: str
) -> None:
    """Also where the stray element lies inside the memory of the same tensor's base."""
    pad = 0 if view == "rows" else 3
    src, dst = (torch.zeros(4 + 2 * pad)[pad : 4 + pad] for _ in range(2))
    with sanitize(), pytest.raises(SanitizerError, match=message):
        planted_kernel[(programs,)](src, dst, first, reads, writes, 8)


def test_row_padding_is_outside_the_tensor() -> None:
    src, dst = torch.zeros(2, 6)[:, :4], torch.zeros(8)
    with sanitize(), pytest.raises(SanitizerError, match="reads 2 elements"):
        unmasked_kernel[(1,)](src, dst, 8)


def test_atomics_are_refused_on_floats_and_watched_on_counters() -> None:
    with sanitize(), pytest.raises(SanitizerError, match="atomics"):
        atomic_kernel[(1,)](torch.zeros(8), 8)
    with sanitize(), pytest.raises(SanitizerError, match="counts 1 elements of 4 bytes outside"):
        atomic_kernel[(1,)](torch.zeros(7, dtype=torch.int32), 8)
    counters = torch.zeros(8, dtype=torch.int32)
    with sanitize():
        atomic_kernel[(2,)](counters, 8)
    assert torch.equal(counters, torch.full((8,), 2, dtype=torch.int32))


def test_clean_launches_pass_and_the_watch_ends() -> None:
    src, dst = torch.ones(4), torch.zeros(4)
    with sanitize() as record:
        planted_kernel[(1,)](src, dst, 0, 4, 4, 8)
        planted_kernel[(1,)](src, dst, 0, 4, 4, 8)
    assert [launch.stored for launch in record.launches] == [{"dst_ptr": 4}] * 2
    assert torch.equal(src, dst)
    planted_kernel[(1,)](src, dst, 0, 4, 3, 8)
    assert len(record.launches) == 2
