"""What the compiler makes of every configuration shipped or offered to the tuner: registers, spills, waits, order.

Needs no GPU: Triton compiles for an architecture by name, and the disassembler it bundles reads the result. The times
are modelled and prove nothing about speed. Exits with 1 if a budget of docs/design/kernels.md is broken.
"""

import argparse
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
from bert_fused.kernels.lookup import MAX_M, get_config, load_table, shipped_configs
from bert_fused.tune.candidates import (
    LATENCY,
    Chip,
    candidates,
    chip_of,
    modelled_clocks,
    resident_blocks,
    shared_bytes,
)
from bert_fused.tune.shapes import MODELS

from .ahead_of_time import ROWS, Compiled, compile_grad, compile_linear, compile_pass
from .intermediate import matrix_instructions, narrow_offsets, right_instruction, wide_products
from .machine_code import disassembled, hides_bias, read_log, read_product

REGISTERS_PER_SM = 65536
# Bytes of shared memory that the system takes from an SM's for each block on it.
RESERVED = 1024
# Blocks an SM must hold at a time, where the speed of a configuration rests on it whatever the cycle model supposes.
RESIDENT_BLOCKS = {(90, "tma 128x128x64 4 warps 3 stages"): 2}
# Rows at which candidates are asked for.
OFFERED_ROWS = tuple(2**i for i in range(18))
# N and K of the three models' intermediates and poolers.
MODEL_SHAPES = tuple((n, k) for k, wide in MODELS.values() for n in (wide, k))
# BERT-base: the shape whose time is modelled for configurations that serve any N and K, and for the passes.
N, K = 3072, 768
PASS_ROWS = 8192
MATRIX_INSTRUCTION = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 103: "UTCHMMA", 120: "HMMA"}
# Fewest multiplications in 64 bits: rows of x, W and the output; x and W are TMA's; whole tensors; rows of both inputs.
WIDE_PRODUCTS = {"pointer": 3, "tma": 0, "act_fwd": 1, "act_bwd": 2}

# Most instructions per element, by whether the pre-activation is stored: from the end of the loop over K to the exit of
# the configuration below (bias, activation, cast, store, teardown of the pipeline), and of a derivative beyond ReLU's.
EPILOGUE_BUDGET = {
    ("bfloat16", "gelu", False): 11.6,
    ("bfloat16", "gelu", True): 12.4,
    ("float16", "gelu", False): 12.5,
    ("float16", "gelu", True): 13.3,
}
EPILOGUE_BUDGET_CONFIG = (90, "tma 128x128x64 4 warps 3 stages")
DERIVATIVE_BUDGET = 16.0
DERIVATIVE_COUNTED = ((90, "float16"), (90, "bfloat16"))
GRAD_TILE = elementwise.BLOCK_M * elementwise.BLOCK_N


def matrix_instruction(arch: int, block_m: int) -> str:
    """What multiplies tiles: Hopper's and Blackwell's own instructions need 64 rows, smaller tiles take the old one."""
    return MATRIX_INSTRUCTION[arch] if block_m >= 64 else "HMMA"


def activations_to_check(dtype: str) -> tuple[str, ...]:
    """BERT's own activation, and the dearest: tanh in instructions, tanh GELU in registers, erf GELU in fp32."""
    return ("gelu",) if dtype in ("tf32", "float32") else ("gelu", "tanh", "gelu_tanh")


def inspect(compiled: Compiled, arch: int, tile: int = 1, block_m: int = 64, *, code: bool = True) -> dict[str, Any]:
    """Resources of a compiled kernel.

    tile: output elements a block computes. code: whether to read the machine code as well; disassembling takes as long
    as compiling, and the log has registers, spills and what ptxas says of wgmma.
    """
    ttir, ptx, shared = compiled.asm["ttir"], compiled.asm["ptx"], compiled.metadata.shared
    num_warps = compiled.metadata.num_warps
    row: dict[str, Any] = read_log(compiled.ptxas)
    row |= {
        "shared_bytes": shared,
        "ctas_per_sm": min(
            REGISTERS_PER_SM // (-(-row["registers"] // 8) * 8 * 32 * num_warps),
            (SHARED_MEMORY[arch] + RESERVED) // (shared + RESERVED),
        ),
        "matrix": ", ".join(matrix_instructions(ptx)),
        "narrow_offsets": narrow_offsets(ttir),
        "wide_products": wide_products(ttir),
        "approximate_tanh": "tanh.approx" in ptx,
        "serialized": bool(row["ptxas"]),
    }
    if code:
        instructions, labels = disassembled(compiled.asm["cubin"])
        product = read_product(instructions, labels, matrix_instruction(arch, block_m))
        row |= product | {"instructions": len(instructions)}
        row["epilogue_per_element"] = round(product["epilogue"] * num_warps * 32 / tile, 1)
        row["serialized"] |= 0 < product["products"] <= product["waits"]
    return row


def inspect_arch(arch: int) -> Iterator[dict[str, Any]]:
    """A row per kernel, configuration and activation that an architecture can select, or that its tuner is offered.

    The forward stores the pre-activation, of any number of rows. In another row, for BERT's own activation, it does
    not, and has a multiple of 16 rows, as batched inference. A configuration that serves one row is compiled for that.
    What is only offered is compiled for BERT's own activation, and on wgmma alone without the pre-activation too.
    """
    shipped = list(shipped_configs(arch))
    for config in shipped:
        shapes = shapes_served(config, arch)
        variants = [(activation, True, 17) for activation in activations_to_check(config.dtype)] + [("gelu", False, 16)]
        if min(shapes)[0] == 1:
            variants.append(("gelu", True, 1))
        for variant in variants:
            row = linear_row(config, arch, *variant) | {"intended_ctas": intended_blocks(config, arch, shapes)}
            yield row | linear_times(config, max(shapes, key=math.prod), arch)
    for config, shape in offered_configs(arch).items():
        if config not in shipped:
            variants = [("gelu", True, 17), ("gelu", False, 16)]
            for variant in variants if waits_for_products(config, arch) else variants[:1]:
                row = linear_row(config, arch, *variant) | {"intended_ctas": max(config.persistent, 1), "offered": True}
                yield row | {"shared_estimate": shared_bytes(config, arch)} | linear_times(config, shape, arch)
    for dtype in ("float16", "bfloat16", "float32"):
        row = {"arch": arch, "dtype": dtype, "config": "", "save_preact": False, "triton": triton.__version__}
        for activation in activations_to_check(dtype):
            stats = inspect(compile_pass(dtype, arch, activation=activation), arch, elementwise.FWD_BLOCK, code=False)
            yield row | of_kernel("act_fwd") | {"activation": activation} | stats | pass_times(2, dtype, arch)
        counted = (arch, dtype) in DERIVATIVE_COUNTED
        relu = inspect(compile_grad(dtype, arch, activation="relu"), arch, GRAD_TILE) if counted else {}
        for activation in activations_to_check(dtype):
            compiled = compile_grad(dtype, arch, activation=activation)
            stats = inspect(compiled, arch, GRAD_TILE, code=counted)
            if counted:
                added = (stats["instructions"] - relu["instructions"]) * compiled.metadata.num_warps * 32 / GRAD_TILE
                stats["derivative_per_element"] = round(added, 1)
            yield row | of_kernel("act_bwd") | {"activation": activation} | stats | pass_times(3, dtype, arch)


def linear_row(config: Config, arch: int, activation: str, save_preact: bool, rows: int) -> dict[str, Any]:
    """The row of the forward kernel for one configuration and activation."""
    row = {"arch": arch, "dtype": config.dtype, "config": str(config), "activation": activation}
    row |= {"save_preact": save_preact, "rows": rows, "triton": triton.__version__}
    row |= of_kernel("linear_act_fwd", config.kernel)
    row |= {"right_matrix": right_instruction(arch, config.dtype, config.block_m)}
    try:
        compiled = compile_linear(config, arch, activation=activation, save_preact=save_preact, rows=rows)
    except Exception as error:  # the compiler's have no base of their own
        return row | {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    # Without the pre-activation for the order of loads; with it, where a wait could serialize products.
    code = activation == "gelu" and rows > 1 and (not save_preact or waits_for_products(config, arch))
    return row | inspect(compiled, arch, config.block_m * config.block_n, config.block_m, code=code)


def waits_for_products(config: Config, arch: int) -> bool:
    """Whether a configuration's matrix instructions are asynchronous ones, which ptxas may serialize."""
    return matrix_instruction(arch, config.block_m) == "HGMMA"


def offered_configs(arch: int) -> dict[Config, tuple[int, int, int]]:
    """What ``tune`` would be offered for the three models, each with the largest shape it is offered for.

    bf16 gets fp16's tiles and has an instruction less per element. It is compiled only where wgmma may be serialized.
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


def of_kernel(name: str, kind: str | None = None) -> dict[str, Any]:
    """What holds for every row of a kernel. ``kind``: how the forward kernel reaches memory."""
    return {"kernel": name, "row_variants": row_variants(name), "least_wide_products": WIDE_PRODUCTS[kind or name]}


@functools.cache
def row_variants(kernel: str) -> int:
    """How many kernels Triton makes of one for all numbers of rows, by what it specialises on."""
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
    """M, N and K of products that an architecture's table gives to a configuration."""
    served = [(entry.m, entry.n or N, entry.k or K) for entry in load_table(arch) if entry.config == config]
    asked = ((M, n, k) for M in (1, 4096) for n, k in MODEL_SHAPES)
    return served + [shape for shape in asked if get_config(*shape, config.dtype, arch, aligned=True) == config]


def intended_blocks(config: Config, arch: int, shapes: list[tuple[int, int, int]]) -> int:
    """How many blocks share an SM where the cycle model ranked the configuration: as many as there are, or as fit."""
    needed = max(-(-M // config.block_m) * -(-N // config.block_n) for M, N, _ in shapes)
    modelled = min(resident_blocks(config, arch), -(-needed // chip_of(arch).sms))
    return RESIDENT_BLOCKS.get((arch, str(config)), modelled)


def linear_times(config: Config, shape: tuple[int, int, int], arch: int) -> dict[str, Any]:
    """The modelled time of a product, and the least that the chip's data sheet allows."""
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
    """The same of a pass that reads and writes so many tensors: memory, and the wait for the first of it."""
    chip = chip_of(arch)
    moved = tensors * PASS_ROWS * N * (4 if dtype == "float32" else 2) / (chip.sms * chip.memory)
    return {
        "shape": f"{PASS_ROWS}x{N}",
        "modelled_us": _microseconds(moved + LATENCY, chip),
        "roofline_us": _microseconds(moved, chip),
    }


def _microseconds(clocks: float, chip: Chip) -> float:
    return round(clocks / (1e3 * chip.ghz), 1)


def broken_budgets(row: dict[str, Any]) -> list[str]:
    """What is wrong with a row, one line for each budget of docs/design/kernels.md that it breaks."""
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
    broken += [f"32-bit offsets: {product}" for product in row["narrow_offsets"]]
    if row["wide_products"] < row["least_wide_products"]:
        broken.append(f"{row['wide_products']} products in 64 bits instead of {row['least_wide_products']}")
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
        for row in inspect_arch(arch):
            rows.append(row | {"broken": broken_budgets(row)})
            print(" | ".join(str(row.get(column, "")) for column in columns), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    broken = [(row, reason) for row in rows for reason in row["broken"]]
    for row, reason in broken:
        names = " ".join(str(row[column]) for column in ("kernel", "arch", "dtype", "config", "activation"))
        print(f"budget broken: {names}: {reason}", file=sys.stderr)
    return int(bool(broken))
