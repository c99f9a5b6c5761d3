"""What the compiler makes of every shipped configuration: registers, spills, shared memory, matrix instructions.

Needs no GPU: Triton compiles for an architecture by name, and the disassembler it bundles reads the result. The times
are modelled and prove nothing about speed. Exits with 1 if a budget of docs/design.md is broken.
"""

import argparse
import functools
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton._C.libtriton import native_specialize_impl
from triton.backends.nvidia.compiler import CUDABackend

from bert_fused.kernels import act_grad, act_pass, linear_act
from bert_fused.kernels.candidates import LATENCY, Chip, chip_of, modelled_clocks, resident_blocks
from bert_fused.kernels.configs import MAX_M, SHARED_MEMORY, Config, get_config, load_table, shipped_configs

from .ahead_of_time import ROWS, compile_grad, compile_linear, compile_pass
from .intermediate import matrix_instructions, narrow_offsets, right_instruction, wide_products

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
REGISTERS_PER_SM = 65536
# Bytes of shared memory that the system takes from an SM's for each block on it.
RESERVED = 1024
# Blocks an SM must hold at a time, where the speed of a configuration rests on it whatever the cycle model supposes.
RESIDENT_BLOCKS = {(90, "tma 128x128x64 4 warps 3 stages"): 2}
# BERT-base: the shape whose time is modelled for configurations that serve any N and K, and for the passes.
N, K = 3072, 768
PASS_ROWS = 8192
MATRIX_INSTRUCTION = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 103: "UTCHMMA", 120: "HMMA"}
# Fewest multiplications in 64 bits: rows of x, W and the output; x and W are TMA's; whole tensors; rows of both inputs.
WIDE_PRODUCTS = {"pointer": 3, "tma": 0, "act_fwd": 1, "act_bwd": 2}

# Most instructions per element, by whether the pre-activation is stored: from the end of the loop over K to the exit of
# the configuration below (activation, cast, store, teardown of the pipeline), and of a derivative beyond ReLU's.
EPILOGUE_BUDGET = {
    ("bfloat16", "gelu", False): 10.0,
    ("bfloat16", "gelu", True): 11.0,
    ("float16", "gelu", False): 12.0,
    ("float16", "gelu", True): 12.0,
}
EPILOGUE_BUDGET_CONFIG = (90, "tma 128x128x64 4 warps 3 stages")
DERIVATIVE_BUDGET = 16.0
GRAD_TILE = act_grad.BLOCK_M * act_grad.BLOCK_N


def matrix_instruction(arch: int, block_m: int) -> str:
    """What multiplies tiles: Hopper's and Blackwell's own instructions need 64 rows, smaller tiles take the old one."""
    return MATRIX_INSTRUCTION[arch] if block_m >= 64 else "HMMA"


def activations_to_check(dtype: str) -> tuple[str, ...]:
    """BERT's own activation, and the dearest: tanh in instructions, tanh GELU in registers, erf GELU in fp32."""
    return ("gelu",) if dtype in ("tf32", "float32") else ("gelu", "tanh", "gelu_tanh")


def inspect(compiled: Any, arch: int, num_warps: int, tile: int, block_m: int = 64) -> dict[str, Any]:
    """Resources of a compiled kernel, read from its machine code. ``tile``: output elements a block computes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        sass = _tool("nvdisasm", "-c", file.name)
        usage = _tool("cuobjdump", "-res-usage", file.name)
    instructions, labels = _listing(sass)
    registers_match = re.search(r"REG:(\d+)", usage)
    assert registers_match is not None, usage
    registers = int(registers_match[1])
    matrix = [i for i, (name, _) in enumerate(instructions) if name.startswith(matrix_instruction(arch, block_m))]
    epilogue = _epilogue_length(instructions, labels, matrix[-1]) if matrix else 0
    shared = compiled.metadata.shared
    ttir, ptx = compiled.asm["ttir"], compiled.asm["ptx"]
    return {
        "registers": registers,
        "instructions": len(instructions),
        "spills": sum(name.startswith(("STL", "LDL")) for name, _ in instructions),
        "shared_bytes": shared,
        "ctas_per_sm": min(
            REGISTERS_PER_SM // (-(-registers // 8) * 8 * 32 * num_warps),
            (SHARED_MEMORY[arch] + RESERVED) // (shared + RESERVED),
        ),
        "mma_instructions": len(matrix),
        "matrix": ", ".join(matrix_instructions(ptx)),
        "narrow_offsets": narrow_offsets(ttir),
        "wide_products": wide_products(ttir),
        "approximate_tanh": "tanh.approx" in ptx,
        "epilogue_per_element": round(epilogue * num_warps * 32 / tile, 1) if matrix else None,
    }


def _listing(sass: str) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """Instructions as (name, operands), and the instruction that each label stands before."""
    instructions: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    pattern = r"^\s*(?:(\.L_x_\d+):|/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*))"
    for label, name, operands in re.findall(pattern, sass, re.MULTILINE):
        if label:
            labels[label] = len(instructions)
        else:
            instructions.append((name, operands))
    return instructions, labels


def _epilogue_length(instructions: list[tuple[str, str]], labels: dict[str, int], last_matrix: int) -> int:
    """Instructions between the end of the loop over K and the end of the tile.

    The loop's own last instructions are no part of it, nor is what lies behind the exit: waiting loops and padding.
    """
    exits = [i for i, (name, _) in enumerate(instructions) if name == "EXIT"]
    branches_back = [
        i
        for i, (name, operands) in enumerate(instructions[: exits[-1]])
        if i > last_matrix
        and name == "BRA"
        and (target := re.search(r"\.L_x_\d+", operands)) is not None
        and labels[target[0]] <= last_matrix
    ]
    start, end = ([*branches_back, exits[-1]] if branches_back else [last_matrix, exits[-1]])[:2]
    return end - start


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def inspect_arch(arch: int) -> Iterator[dict[str, Any]]:
    """A row per kernel, configuration and activation that an architecture can select.

    The forward stores the pre-activation, of any number of rows. In another row, for BERT's own activation, it does
    not, and has a multiple of 16 rows, as batched inference. A configuration that serves one row is compiled for that.
    """
    for config in shipped_configs(arch):
        shapes = shapes_served(config, arch)
        variants = [(activation, True, 17) for activation in activations_to_check(config.dtype)] + [("gelu", False, 16)]
        if min(shapes)[0] == 1:
            variants.append(("gelu", True, 1))
        for activation, save_preact, rows in variants:
            tile = config.block_m * config.block_n
            row = {"arch": arch, "dtype": config.dtype, "config": str(config), "activation": activation}
            row |= {"save_preact": save_preact, "rows": rows, "triton": triton.__version__}
            row |= of_kernel("linear_act_fwd", config.kernel)
            row |= {"right_matrix": right_instruction(arch, config.dtype, config.block_m)}
            row |= {"intended_ctas": intended_blocks(config, arch, shapes)}
            try:
                compiled = compile_linear(config, arch, activation=activation, save_preact=save_preact, rows=rows)
            except Exception as error:  # the compiler's have no base of their own
                yield row | {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
                continue
            row |= inspect(compiled, arch, compiled.metadata.num_warps, tile, config.block_m)
            yield row | linear_times(config, max(shapes, key=math.prod), arch)
    for dtype in ("float16", "bfloat16", "float32"):
        row = {"arch": arch, "dtype": dtype, "config": "", "save_preact": False, "triton": triton.__version__}
        for activation in activations_to_check(dtype):
            compiled = compile_pass(dtype, arch, activation=activation)
            stats = inspect(compiled, arch, compiled.metadata.num_warps, act_pass.BLOCK)
            yield row | of_kernel("act_fwd") | {"activation": activation} | stats | pass_times(2, dtype, arch)
        relu = inspect(compile_grad(dtype, arch, activation="relu"), arch, 4, GRAD_TILE)
        for activation in activations_to_check(dtype):
            compiled = compile_grad(dtype, arch, activation=activation)
            stats = inspect(compiled, arch, compiled.metadata.num_warps, GRAD_TILE)
            added = (stats["instructions"] - relu["instructions"]) * compiled.metadata.num_warps * 32 / GRAD_TILE
            stats["derivative_per_element"] = round(added, 1)
            yield row | of_kernel("act_bwd") | {"activation": activation} | stats | pass_times(3, dtype, arch)


def of_kernel(name: str, kind: str | None = None) -> dict[str, Any]:
    """What holds for every row of a kernel. ``kind``: how the forward kernel reaches memory."""
    return {"kernel": name, "row_variants": row_variants(name), "least_wide_products": WIDE_PRODUCTS[kind or name]}


@functools.cache
def row_variants(kernel: str) -> int:
    """How many kernels Triton makes of one for all numbers of rows, by what it specialises on."""
    jitted, name = {
        "linear_act_fwd": (linear_act.linear_act_fwd_kernel, "M"),
        "act_fwd": (act_pass.act_fwd_kernel, "numel"),
        "act_bwd": (act_grad.act_bwd_kernel, "M"),
    }[kernel]
    (parameter,) = [parameter for parameter in jitted.params if parameter.name == name]
    special, aligned = not parameter.do_not_specialize, not parameter.do_not_specialize_on_alignment
    numbers = (*range(1, 4097), *range(MAX_M - 64, MAX_M + 1))
    return len({native_specialize_impl(CUDABackend, number, False, special, aligned) for number in numbers})


def shapes_served(config: Config, arch: int) -> list[tuple[int, int, int]]:
    """M, N and K of products that an architecture's table gives to a configuration."""
    served = [(entry.m, entry.n or N, entry.k or K) for entry in load_table(arch) if entry.config == config]
    return served + [(M, N, K) for M in (1, 4096) if get_config(M, N, K, config.dtype, arch, aligned=True) == config]


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
    """What of docs/design.md a row breaks, in words."""
    if "error" in row:
        return [f"does not compile: {row['error']}"]
    broken = []
    if row["spills"]:
        broken.append(f"{row['spills']} spills")
    if row["shared_bytes"] > SHARED_MEMORY[row["arch"]]:
        broken.append(f"{row['shared_bytes']} bytes of shared memory, a block has {SHARED_MEMORY[row['arch']]}")
    if row["kernel"] == "linear_act_fwd":
        if not row["mma_instructions"]:
            broken.append("no matrix instruction")
        if row["matrix"] != row["right_matrix"]:
            broken.append(f"tiles are multiplied by {row['matrix'] or 'nothing'} instead of {row['right_matrix']}")
        if row["ctas_per_sm"] < row["intended_ctas"]:
            broken.append(f"{row['ctas_per_sm']} blocks per SM instead of {row['intended_ctas']}")
    broken += [f"32-bit offsets: {product}" for product in row["narrow_offsets"]]
    if row["wide_products"] < row["least_wide_products"]:
        broken.append(f"{row['wide_products']} products in 64 bits instead of {row['least_wide_products']}")
    if row["row_variants"] > len(ROWS):
        broken.append(f"{row['row_variants']} variants over the number of rows instead of {len(ROWS)}")
    if row["approximate_tanh"]:
        broken.append("tanh.approx, which is good to 11 bits")
    budget, count = None, row["epilogue_per_element"]
    if (row["arch"], row["config"]) == EPILOGUE_BUDGET_CONFIG:
        budget = EPILOGUE_BUDGET.get((row["dtype"], row["activation"], row["save_preact"]))
    elif row["kernel"] == "act_bwd" and (row["arch"], row["activation"]) == (90, "gelu") and row["dtype"] != "float32":
        budget, count = DERIVATIVE_BUDGET, row["derivative_per_element"]
    if budget is not None and count > budget:
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
    columns += ("shared_bytes", "ctas_per_sm", "mma_instructions", "matrix", "epilogue_per_element")
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
