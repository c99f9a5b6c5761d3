"""Compile every configuration shipped or offered to the tuner, and check registers, spills, waits and instructions.

Needs no GPU: Triton compiles for an architecture by name. Registers and spills come from ptxas's log; only shipped
kernels with a limit on instructions or on waits are disassembled. The times are modelled and prove nothing about speed.
Exits with 1 if a kernel exceeds a limit of docs/design/kernels.md.
"""

import argparse
import dataclasses
import functools
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton._C.libtriton import native_specialize_impl
from triton.backends.nvidia.compiler import CUDABackend

from bert_fused.kernels import elementwise, linear_act
from bert_fused.kernels.configs import SHARED_MEMORY, Config
from bert_fused.kernels.gated import gated, gated_configs
from bert_fused.kernels.lookup import MAX_M, get_config, load_table, shipped_configs
from bert_fused.tune.candidates import (
    LATENCY,
    MEMORY_SHARE,
    Chip,
    candidates,
    chip_of,
    modelled_clocks,
    resident_blocks,
    shared_bytes,
)
from bert_fused.tune.shapes import MODELS

from .compile import ROWS, compile_grad, compile_linear, compile_pass
from .machine_code import MATRIX_INSTRUCTION, PTX_INSTRUCTION, hides_bias, inspect, matrix_instruction

# Blocks that an SM must hold, for configurations whose speed depends on that more than the cycle model says.
RESIDENT_BLOCKS = {(90, "tma 128x128x64 4 warps 3 stages"): 2}
# Rows at which candidates are asked for.
OFFERED_ROWS = tuple(2**i for i in range(18))
# N and K of the three models' intermediates and poolers.
MODEL_SHAPES = tuple((n, k) for k, wide in MODELS.values() for n in (wide, k))
# BERT-base: the shape whose time is modelled for configurations that serve any N and K, and for the passes.
N, K = 3072, 768
PASS_ROWS = 8192
# ModernBERT-base: the product of both halves, whose time is modelled for gated activations.
GATED_SHAPE = (8192, 2304, 768)
# The most instructions per element from the end of the loop over K to the exit (bias, activation, cast, store, teardown
# of the pipeline), in the configuration below; by dtype, activation, and whether the pre-activation is stored.
EPILOGUE_BUDGET = {
    ("bfloat16", "gelu", False): 11.6,
    ("bfloat16", "gelu", True): 12.4,
    ("float16", "gelu", False): 12.5,
    ("float16", "gelu", True): 13.3,
}
EPILOGUE_BUDGET_CONFIG = (90, "tma 128x128x64 4 warps 3 stages")
# The most instructions per element that GELU's derivative may need beyond ReLU's.
DERIVATIVE_BUDGET = 16.0
DERIVATIVE_COUNTED = ((90, "float16"), (90, "bfloat16"))
GRAD_TILE = elementwise.BLOCK_M * elementwise.BLOCK_N


def activations_to_check(dtype: str) -> tuple[str, ...]:
    """Return BERT's own activation and the most costly ones: tanh in instructions, tanh GELU in registers."""
    return ("gelu",) if dtype in ("tf32", "float32") else ("gelu", "tanh", "gelu_tanh")


def inspect_arch(arch: int, offered: bool = True) -> Iterator[dict[str, Any]]:
    """Yield a row for each kernel, configuration and activation that an architecture can select.

    offered: also for each configuration that only its tuner is offered.
    """
    shipped = list(shipped_configs(arch))
    for config in shipped:
        yield from shipped_rows(config, arch)
    for config, shape in offered_configs(arch).items() if offered else ():
        if config not in shipped:
            row = linear_row(config, arch, "gelu", True, 17, code=False) | linear_times(config, shape, arch)
            row |= {"offered": True, "intended_ctas": max(config.persistent, 1)}
            yield row | {"shared_estimate": shared_bytes(config, arch)}
    for config in gated_configs(arch):
        yield from gated_rows(config, arch)
    for dtype in ("float16", "bfloat16", "float32"):
        yield from pass_rows(dtype, arch)


def gated_rows(config: Config, arch: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of a configuration for gated activations. It may need what a tile twice as wide needs."""
    wide = dataclasses.replace(config, block_n=2 * config.block_n)
    expected = {"intended_ctas": resident_blocks(wide, arch), "shared_estimate": shared_bytes(wide, arch)}
    expected |= linear_times(wide, GATED_SHAPE, arch) | {"gated": True}
    variants = [(name, True, 17, name == "gelu") for name in activations_to_check(config.dtype)]
    for name, save_preact, rows, code in (*variants, ("gelu", False, 16, False)):
        code = code and is_wgmma(config, arch)
        yield linear_row(config, arch, gated(name, "first"), save_preact, rows, code=code) | expected


def shipped_rows(config: Config, arch: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each activation, with the pre-activation stored and any number of rows.

    BERT's own activation has another row as batched inference runs it, without the pre-activation and with a multiple
    of 16 rows, in which the order of loads is checked; and a third one if the configuration serves a single row.
    """
    shapes = shapes_served(config, arch)
    # wgmma was seen to wait for each product in kernels that store the pre-activation.
    variants = [
        (name, True, 17, name == "gelu" and is_wgmma(config, arch)) for name in activations_to_check(config.dtype)
    ]
    variants.append(("gelu", False, 16, True))
    if min(shapes)[0] == 1:
        variants.append(("gelu", True, 1, False))
    for activation, save_preact, rows, code in variants:
        row = linear_row(config, arch, activation, save_preact, rows, code=code)
        row |= {"intended_ctas": intended_blocks(config, arch, shapes)}
        yield row | linear_times(config, max(shapes, key=math.prod), arch)


def pass_rows(dtype: str, arch: int) -> Iterator[dict[str, Any]]:
    """Yield a row of the activation pass and one of the backward pass for each activation."""
    shared = {"arch": arch, "dtype": dtype, "config": "", "save_preact": False, "triton": triton.__version__}
    counted = (arch, dtype) in DERIVATIVE_COUNTED
    relu = inspect(compile_grad(dtype, arch, activation="relu"), arch, GRAD_TILE) if counted else {}
    for activation in (*activations_to_check(dtype), gated("gelu", "first")):
        row = shared | {"activation": activation}
        stats = inspect(compile_pass(dtype, arch, activation=activation), arch, code=False)
        yield row | of_kernel("act_fwd") | stats | pass_times(2, dtype, arch)
        compiled = compile_grad(dtype, arch, activation=activation)
        stats = inspect(compiled, arch, GRAD_TILE, code=counted)
        if counted:
            added = (stats["instructions"] - relu["instructions"]) * compiled.metadata.num_warps * 32 / GRAD_TILE
            stats["derivative_per_element"] = round(added, 1)
        yield row | of_kernel("act_bwd") | stats | pass_times(3, dtype, arch)


def linear_row(
    config: Config, arch: int, activation: str, save_preact: bool, rows: int, *, code: bool
) -> dict[str, Any]:
    """Return the row of the forward kernel for one configuration and activation."""
    row = {"arch": arch, "dtype": config.dtype, "config": str(config), "activation": activation}
    row |= {"save_preact": save_preact, "rows": rows, "triton": triton.__version__}
    row |= of_kernel("linear_act_fwd") | {"right_matrix": PTX_INSTRUCTION[matrix_instruction(arch, config.block_m)]}
    try:
        compiled = compile_linear(config, arch, activation=activation, save_preact=save_preact, rows=rows)
    except Exception as error:  # the compiler's have no base of their own
        return row | {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    return row | inspect(compiled, arch, config.block_m * config.block_n, config.block_m, code=code)


def is_wgmma(config: Config, arch: int) -> bool:
    """Return whether a configuration multiplies by Hopper's asynchronous instructions, which ptxas may serialize."""
    return matrix_instruction(arch, config.block_m) == "HGMMA"


def offered_configs(arch: int) -> dict[Config, tuple[int, int, int]]:
    """Return the configurations that ``tune`` is offered for the three models, each with its largest shape.

    bf16 gets fp16's tiles and needs one instruction less per element, so it is compiled only where wgmma may be
    serialized.
    """
    dtypes = ("float16", "bfloat16", "tf32") if MATRIX_INSTRUCTION[arch] == "HGMMA" else ("float16", "tf32")
    shapes = [(M, n, k) for M in OFFERED_ROWS for n, k in MODEL_SHAPES]
    return {
        config: shape
        for shape in sorted(shapes, key=math.prod)
        for dtype in dtypes
        for config in candidates(*shape, dtype, arch)
        if config.kernel != "library"
    }


def of_kernel(name: str) -> dict[str, Any]:
    """Return the fields that all rows of a kernel share."""
    return {"kernel": name, "row_variants": row_variants(name)}


@functools.cache
def row_variants(kernel: str) -> int:
    """Return how many kernels Triton compiles over all numbers of rows; it specialises on 1 and on multiples of 16."""
    jitted, name = {
        "linear_act_fwd": (linear_act.linear_act_fwd_kernel, "M"),
        "act_fwd": (elementwise.act_fwd_kernel, "numel"),
        "act_bwd": (elementwise.act_bwd_kernel, "M"),
    }[kernel]
    (parameter,) = [parameter for parameter in jitted.params if parameter.name == name]
    special, aligned = not parameter.do_not_specialize, not parameter.do_not_specialize_on_alignment
    numbers = (*range(1, 4097), *range(MAX_M - 64, MAX_M + 1))
    return len({native_specialize_impl(CUDABackend, number, False, special, aligned) for number in numbers})


def shapes_served(config: Config, arch: int) -> list[tuple[int, int, int]]:
    """Return M, N and K of the products for which an architecture's table selects a configuration."""
    served = [(entry.m, entry.n or N, entry.k or K) for entry in load_table(arch) if entry.config == config]
    asked = ((M, n, k) for M in (1, 4096) for n, k in MODEL_SHAPES)
    return served + [shape for shape in asked if get_config(*shape, config.dtype, arch, aligned=True) == config]


def intended_blocks(config: Config, arch: int, shapes: list[tuple[int, int, int]]) -> int:
    """Return how many blocks per SM the cycle model assumed in its ranking: as many as fit, or as there are."""
    needed = max(-(-M // config.block_m) * -(-N // config.block_n) for M, N, _ in shapes)
    modelled = min(resident_blocks(config, arch), -(-needed // chip_of(arch).sms))
    return RESIDENT_BLOCKS.get((arch, str(config)), modelled)


def linear_times(config: Config, shape: tuple[int, int, int], arch: int) -> dict[str, Any]:
    """Return the modelled time of a product, and the least time that the chip's data sheet allows."""
    M, N, K = shape
    itemsize = 4 if config.dtype == "tf32" else 2
    chip = chip_of(arch)
    products = 2 * M * N * K / (chip.sms * chip.matrix * 2 / itemsize)
    moved = itemsize * (M * K + N * K + M * N) / (chip.sms * chip.memory)
    return {
        "shape": f"{M}x{N}x{K}",
        "modelled_us": _microseconds(modelled_clocks(config, M, N, K, arch), chip),
        "roofline_us": _microseconds(max(products, moved), chip),
    }


def pass_times(tensors: int, dtype: str, arch: int) -> dict[str, Any]:
    """Return both times for a pass that moves ``tensors`` tensors: memory traffic, and one memory latency."""
    chip = chip_of(arch)
    moved = tensors * PASS_ROWS * N * (4 if dtype == "float32" else 2) / (chip.sms * chip.memory)
    return {
        "shape": f"{PASS_ROWS}x{N}",
        "modelled_us": _microseconds(moved / MEMORY_SHARE + LATENCY, chip),
        "roofline_us": _microseconds(moved, chip),
    }


def _microseconds(clocks: float, chip: Chip) -> float:
    return round(clocks / (1e3 * chip.ghz), 1)


def broken_budgets(row: dict[str, Any]) -> list[str]:
    """Return one line for each limit of docs/design/kernels.md that a row exceeds."""
    if "error" in row:
        return [f"does not compile: {row['error']}"]
    broken = []
    if row["spills"]:
        broken.append(f"{row['spills']} bytes spilled")
    if row["shared_bytes"] > SHARED_MEMORY[row["arch"]]:
        broken.append(f"{row['shared_bytes']} bytes of shared memory, a block has {SHARED_MEMORY[row['arch']]}")
    if row["kernel"] == "linear_act_fwd":
        if row["serialized"]:
            waits = f"{row['waits']} waits for {row['products']} in the loop" if "waits" in row else "waits not counted"
            broken.append(f"matrix instructions are serialized: {waits} {' '.join(row['ptxas'])}".rstrip())
        if "order" in row and not hides_bias(row["order"]):
            broken.append(f"a thread waits for the bias: {row['order']}")
        if row["matrix"] != row["right_matrix"]:
            broken.append(f"tiles are multiplied by {row['matrix'] or 'nothing'} instead of {row['right_matrix']}")
        if row["ctas_per_sm"] < row["intended_ctas"]:
            broken.append(f"{row['ctas_per_sm']} blocks per SM instead of {row['intended_ctas']}")
        estimate = row.get("shared_estimate", row["shared_bytes"])
        if not estimate - 1024 <= row["shared_bytes"] <= estimate:
            broken.append(f"{row['shared_bytes']} bytes of shared memory, candidates.py estimates {estimate}")
    if row["row_variants"] > len(ROWS):
        broken.append(f"{row['row_variants']} variants over the number of rows instead of {len(ROWS)}")
    if row["approximate_tanh"]:
        broken.append("tanh.approx, which is good to 11 bits")
    budget, count = None, row.get("epilogue_per_element")
    if (row["arch"], row["config"]) == EPILOGUE_BUDGET_CONFIG:
        budget = EPILOGUE_BUDGET.get((row["dtype"], row["activation"], row["save_preact"]))
    elif row["kernel"] == "act_bwd" and (row["arch"], row["activation"]) == (90, "gelu") and row["dtype"] != "float32":
        budget, count = DERIVATIVE_BUDGET, row["derivative_per_element"]
    if budget is not None and count is not None and count > budget:
        broken.append(f"{count} instructions per element, budget {budget}")
    return broken


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks sass", description=__doc__)
    parser.add_argument("--arch", default="80,86,89,90,100,120", help="compute capabilities, separated by commas")
    parser.add_argument("--shipped", action="store_true", help="leave out what only tune is offered")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file as well")
    arguments = parser.parse_args(argv)
    try:
        archs = [int(name) for name in arguments.arch.split(",")]
    except ValueError:
        archs = []
    if not archs or set(archs) - MATRIX_INSTRUCTION.keys():
        parser.error(f"--arch: expected some of {', '.join(map(str, MATRIX_INSTRUCTION))}, got {arguments.arch!r}")
    rows = []
    columns = ("kernel", "arch", "dtype", "config", "activation", "save_preact", "rows", "registers", "spills")
    columns += ("shared_bytes", "ctas_per_sm", "matrix", "serialized", "order", "epilogue_per_element")
    columns += ("derivative_per_element", "shape", "modelled_us", "roofline_us")
    print(" | ".join(columns))
    for arch in archs:
        for row in inspect_arch(arch, offered=not arguments.shipped):
            rows.append(row | {"broken": broken_budgets(row)})
            print(" | ".join(str(row.get(column, "")) for column in columns), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    broken = [(row, reason) for row in rows for reason in row["broken"]]
    for row, reason in broken:
        names = " ".join(str(row[column]) for column in ("kernel", "arch", "dtype", "config", "activation"))
        print(f"budget broken: {names}: {reason}", file=sys.stderr)
    return int(bool(broken))
