"""Compile a case, execute every block of its grid, and compare with fp64."""

import functools
import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from cases import Case, Elementwise, Linear
from emulator.block import Block
from emulator.kernel import Kernel
from emulator.memory import Memory, Tensor
from emulator.numbers import Array
from emulator.parse import PTXError
from emulator.tensor_map import TensorMap
from gated64 import gated64, gated_bound, gated_grad64, own_error
from reference64 import GELU_GRAD_FLOOR, act64, forward_bound, grad_bound, linear64, rounding_bound, saved_grad64

from benchmarks.static.compile import Compiled, compile_grad, compile_linear, compile_pass
from bert_fused.kernels import elementwise
from bert_fused.kernels.gated import parse

# On a GPU of this size persistent blocks have several tiles each.
SMS = 1
# Schedules of a kernel whose warps run apart.
SEEDS = (0, 1)
ROWS = elementwise.MAX_ROWS_PER_PROGRAM
# Absolute error of an activation that is not hidden by rounding to fp32 or fp16 (``kernels/activations.py``).
ACT_FLOOR = 1.3e-7
# Relative error of the sum of rows in fp32, beside the absolute error of the derivative in each.
SUM_ERROR = 1e-6


@dataclass
class Outcome:
    """share: the largest error as a part of the bound. wrong: what is wrong, in words. reports: as of a block."""

    share: float = 0.0
    wrong: list[str] = field(default_factory=list)
    reports: dict[tuple[str, int], str] = field(default_factory=dict)

    def check(self, what: str, got: torch.Tensor, want: torch.Tensor, bound: torch.Tensor | float) -> None:
        share = ((got.double() - want).abs() / bound).nan_to_num(nan=math.inf).max().item()
        self.share = max(self.share, share)
        if not share <= 1:
            self.wrong.append(f"{what} is off by {share:.3g} of the bound")

    def check_written_once(self, memory: Memory, tensor: Tensor) -> None:
        times = memory.times_written(tensor)
        if (times != 1).any():
            self.wrong.append(
                f"{int((times == 0).sum())} bytes of {tensor.name} not written, {int((times > 1).sum())} twice"
            )


def compiled(case: Case) -> Compiled:
    if isinstance(case, Linear):
        return compile_linear(
            case.config,
            case.arch,
            activation=case.activation,
            save_preact=case.save_preact,
            bias=case.bias,
            even_k=case.even_k,
            rows=case.rows,
        )
    function = compile_grad if case.backward else compile_pass
    return function(case.dtype, case.arch, activation=case.activation)


def run_case(case: Case, ptx: str, metadata: Any) -> Outcome:
    """Execute a compiled case for each of its shapes. Raises ``PTXError``."""
    kernel, outcome = Kernel.of(ptx), Outcome()
    if isinstance(case, Linear):
        seeds = SEEDS if case.config.kernel == "hopper" else (None,)
        for shape, seed in itertools.product(case.shapes, seeds):
            run_linear(case, shape, kernel, metadata, outcome, seed)
    else:
        run_elementwise(case, kernel, metadata, outcome)
    return outcome


def torch_dtype(name: str) -> torch.dtype:
    return torch.float32 if name == "tf32" else getattr(torch, name)


def drawn(shape: tuple[int, ...], name: str, scale: float = 1.0) -> torch.Tensor:
    """Random numbers; for tf32 such as it represents."""
    values = torch.from_numpy(_normal(shape) * np.float32(scale)).to(torch_dtype(name))
    return (values.view(torch.int32) & -0x2000).view(torch.float32) if name == "tf32" else values


@functools.lru_cache(64)
def _normal(shape: tuple[int, ...]) -> Array:
    return np.random.default_rng(math.prod(shape)).standard_normal(shape, np.float32)


def bits(tensor: torch.Tensor) -> Array:
    return tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32).numpy()


def tensor_of(memory: Memory, tensor: Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(memory.read(tensor).copy()).view(dtype)


def run_linear(
    case: Linear, shape: tuple[int, int, int], kernel: Kernel, metadata: Any, outcome: Outcome, seed: int | None
) -> None:
    (M, N, K), config, rows = shape, case.config, shape[0] - case.first_row
    dtype, (name, half) = torch_dtype(config.dtype), parse(case.activation)
    width = 2 * N if half else N
    x, weight = drawn((rows, K), config.dtype), drawn((width, K), config.dtype, K**-0.5)
    bias = drawn((width,), config.dtype) if case.bias else None
    memory, x_stride, w_stride = Memory(), K + 16, K + 32
    hopper = config.kernel == "hopper"
    given = Arguments(M, case.first_row, metadata, config.kernel in ("tma", "hopper"))
    given.matrix(memory.add("x", bits(x), stride=x_stride), x_stride)
    given.matrix(memory.add("weight", bits(weight), stride=w_stride), w_stride, from_first_row=False)
    if bias is not None:
        given.values.append(memory.add("bias", bits(bias)).address)
    out = memory.add("out", bits(torch.zeros(rows, N, dtype=dtype)), output=True)
    given.matrix(out, N)
    if case.save_preact:
        preact = memory.add("preact", bits(torch.zeros(rows, width, dtype=dtype)), output=True)
        given.matrix(preact, width)
    # A row count of 1 is a constant, and the last two are Triton's scratch memory.
    strides = [] if hopper else [x_stride, w_stride]
    given.values += [*([M] if case.rows != 1 else []), N, K, *strides, 0, 0]
    execute(kernel, metadata, memory, given.values, blocks_of(case, M, N), outcome, seed)
    z = linear64(x, weight, bias)
    if half:
        y, bound = gated_bound(x, weight, bias, name, half)
    else:
        y = act64(z, name)
        bound = forward_bound(y, x, weight, bias, name)
    outcome.check("out", tensor_of(memory, out, dtype), y, bound)
    outcome.check_written_once(memory, out)
    if case.save_preact:
        outcome.check("preact", tensor_of(memory, preact, dtype), z, forward_bound(z, x, weight, bias, "none"))
        outcome.check_written_once(memory, preact)


def blocks_of(case: Linear, M: int, N: int) -> tuple[int, list[int]]:
    """Return the size of the grid, and the blocks to execute: those of rows in memory."""
    config, group = case.config, case.config.group_m
    tiles_m, tiles_n = -(-M // config.block_m), -(-N // config.block_n)
    if config.persistent:
        blocks = min(tiles_m * tiles_n, config.persistent * SMS)
        return blocks, list(range(blocks))
    # A group of tiles has this many rows of tiles or fewer, and all of their columns.
    first = case.first_row // config.block_m // group * group * tiles_n
    blocks = tiles_m * tiles_n

    def row(tile: int) -> int:
        start = tile // (group * tiles_n) * group
        return start + tile % (group * tiles_n) % min(tiles_m - start, group)

    return blocks, [tile for tile in range(first, blocks) if row(tile) * config.block_m >= case.first_row]


@dataclass
class Arguments:
    """A kernel's parameters. Matrices of M rows are in memory from ``first_row`` on."""

    M: int
    first_row: int
    metadata: Any
    tma: bool
    values: list[int | TensorMap] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.descriptors = iter(getattr(self.metadata, "tensordesc_meta", None) or ())

    def matrix(self, tensor: Tensor, stride: int, *, from_first_row: bool = True) -> None:
        """Add a matrix's address or, for TMA, its descriptor. stride: elements between rows."""
        rows, columns, size = *tensor.shape, tensor.dtype.itemsize
        address = tensor.address
        if from_first_row:
            rows, address = self.M, address - self.first_row * stride * size
        if not self.tma:
            self.values.append(address)
            return
        described = next(self.descriptors)
        box = tuple(described["block_size"])
        tensor_map = TensorMap(address, (rows, columns), stride * size, box, described["swizzle"], size)
        self.values += [tensor_map, rows, columns, stride, 1]


def execute(
    kernel: Kernel,
    metadata: Any,
    memory: Memory,
    given: list[int | TensorMap],
    grid: tuple[int, list[int]],
    outcome: Outcome,
    seed: int | None = None,
) -> None:
    if len(given) != len(kernel.program.parameters):
        raise PTXError(f"{len(given)} arguments for {len(kernel.program.parameters)} parameters")
    blocks, executed = grid
    for index in executed:
        block = Block(kernel, memory, given, metadata.shared, index, blocks, seed)
        block.run()
        for key, text in block.reports.items():
            outcome.reports.setdefault(key, text)


def run_elementwise(case: Elementwise, kernel: Kernel, metadata: Any, outcome: Outcome) -> None:
    if case.backward:
        run_backward(case, kernel, metadata, outcome)
        return
    (M, N), dtype, memory, (name, half) = case.shape, torch_dtype(case.dtype), Memory(), parse(case.activation)
    z = drawn((M, 2 * N if half else N), case.dtype, 3)
    z_at = memory.add("preact", bits(z).reshape(-1))
    out = memory.add("out", bits(torch.zeros(M * N, dtype=dtype)), output=True)
    blocks = -(-M * N // elementwise.FWD_BLOCK)
    grid = blocks, list(range(blocks))
    numbers = [M * N, N] if half else [M * N]
    execute(kernel, metadata, memory, [z_at.address, out.address, *numbers, 0, 0], grid, outcome)
    want = gated64(z, name, half) if half else act64(z, name)
    bound = rounding_bound(want, dtype, name) + ACT_FLOOR
    if half:
        bound += own_error(name, dtype) * z.double().abs().max()
    outcome.check("out", tensor_of(memory, out, dtype), want.reshape(1, -1), bound.reshape(1, -1))
    outcome.check_written_once(memory, out)


def run_backward(case: Elementwise, kernel: Kernel, metadata: Any, outcome: Outcome) -> None:
    (M, N), dtype, memory = case.shape, torch_dtype(case.dtype), Memory()
    rows, (name, half) = M - case.first_row, parse(case.activation)
    width = 2 * N if half else N
    d_out, saved = drawn((rows, N), case.dtype), drawn((rows, width), case.dtype, 2)
    saved = saved.tanh() if case.activation == "tanh" else saved
    given = Arguments(M, case.first_row, metadata, tma=False)
    given.matrix(memory.add("d_out", bits(d_out), stride=N + 16), N + 16)
    given.matrix(memory.add("saved", bits(saved)), width)
    d_preact = memory.add("d_preact", bits(torch.zeros_like(saved)), output=True)
    given.matrix(d_preact, width)
    programs, first = -(-M // ROWS), case.first_row // ROWS
    partial = memory.add("partial", np.zeros((programs - first, width), np.float32), output=True)
    given.values += [partial.address - first * width * 4, M, N, N + 16, 0, 0]
    columns = -(-N // elementwise.BLOCK_N)
    grid = programs * columns, list(range(first * columns, programs * columns))
    execute(kernel, metadata, memory, given.values, grid, outcome)
    if half:
        want, bound = gated_grad64(d_out, saved, name, half)
    else:
        want = d_out.double() * saved_grad64(saved, name)
        bound = grad_bound(want, d_out, name)
    outcome.check("d_preact", tensor_of(memory, d_preact, dtype), want, bound)
    sums = tensor_of(memory, partial, torch.float32).double().sum(0)
    errors = GELU_GRAD_FLOOR * rows * (saved.double().abs().max() if half else 1)
    outcome.check("d_bias", sums, want.sum(0), SUM_ERROR * want.abs().sum(0) + errors)
    for tensor in (d_preact, partial):
        outcome.check_written_once(memory, tensor)
