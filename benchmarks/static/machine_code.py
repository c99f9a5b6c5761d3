"""Read a compiled kernel: its resources, the waits in its loop over K, and the order of its loads."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton

from bert_fused.kernels.configs import SHARED_MEMORY

from .compile import Compiled

DISASSEMBLER = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
INSTRUCTION = re.compile(r"^\s*(?:(\.L_x_\d+):|/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*))", re.MULTILINE)

REGISTERS_PER_SM = 65536
# Bytes of an SM's shared memory that the system takes for each block.
RESERVED = 1024
MATRIX_INSTRUCTION = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 103: "UTCHMMA", 120: "HMMA"}
# The same in PTX.
PTX_INSTRUCTION = {"HMMA": "mma.sync", "HGMMA": "wgmma.mma_async", "UTCHMMA": "tcgen05.mma"}

Instructions = list[tuple[str, str]]  # name and operands
Labels = dict[str, int]  # the instruction that each label stands before


def matrix_instruction(arch: int, block_m: int) -> str:
    """Return what multiplies tiles: Hopper's and Blackwell's own instructions need 64 rows."""
    return MATRIX_INSTRUCTION[arch] if block_m >= 64 else "HMMA"


def inspect(compiled: Compiled, arch: int, tile: int = 1, block_m: int = 64, *, code: bool = True) -> dict[str, Any]:
    """Return the resources of a compiled kernel.

    tile: output elements that a block computes. code: whether to disassemble it as well, to count instructions and
    waits; that takes as long as compiling.
    """
    ptx, shared, num_warps = compiled.asm["ptx"], compiled.metadata.shared, compiled.metadata.num_warps
    row: dict[str, Any] = read_log(compiled.ptxas)
    row |= {
        "shared_bytes": shared,
        "ctas_per_sm": min(
            REGISTERS_PER_SM // (-(-row["registers"] // 8) * 8 * 32 * num_warps),
            (SHARED_MEMORY[arch] + RESERVED) // (shared + RESERVED),
        ),
        "matrix": ", ".join(name for name in PTX_INSTRUCTION.values() if name in ptx),
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


def read_log(log: str) -> dict[str, object]:
    """Return the registers, the bytes that a thread spills, and the C75xx messages in the output of ``ptxas -v``.

    C75xx are about ``wgmma``: the loss of performance that they warn of is a wait after every matrix instruction.
    """
    registers = re.search(r"Used (\d+) registers", log)
    stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert registers is not None, log
    assert stack is not None, log
    messages = sorted(set(re.findall(r"\(C75\d\d\)[^\n]*", log)))
    return {"registers": int(registers[1]), "spills": sum(map(int, stack.groups())), "ptxas": messages}


def disassembled(cubin: bytes) -> tuple[Instructions, Labels]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [DISASSEMBLER, "-c", file.name]
        return listing(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def listing(sass: str) -> tuple[Instructions, Labels]:
    instructions: Instructions = []
    labels: Labels = {}
    for label, name, operands in INSTRUCTION.findall(sass):
        if label:
            labels[label] = len(instructions)
        else:
            instructions.append((name, operands))
    return instructions, labels


def read_product(instructions: Instructions, labels: Labels, matrix: str) -> dict[str, object]:
    """Count the instructions named ``matrix`` in the loop over K, its waits for them, and the instructions after it.

    Also find the order in which bias and tile are loaded and used.
    """
    products = [i for i, (name, _) in enumerate(instructions) if name.startswith(matrix)]
    if not products:
        return {"products": 0, "waits": 0, "epilogue": 0, "order": ""}
    start, end, after = _loop(instructions, labels, products[-1])
    waits = sum(name.startswith("WARPGROUP.DEPBAR") for name, _ in instructions[start:end])
    inside = sum(start <= i < end for i in products)
    return {"products": inside, "waits": waits, "epilogue": after, "order": _order(instructions, products[0])}


def _loop(instructions: Instructions, labels: Labels, last_product: int) -> tuple[int, int, int]:
    """Return the loop over K's first and last instruction, and how many instructions follow until the tile's end.

    Waiting loops and padding behind the exit are not counted.
    """
    exits = [i for i, (name, _) in enumerate(instructions) if name == "EXIT"]
    branches_back = [
        (i, labels[target[0]])
        for i, (name, operands) in enumerate(instructions[: exits[-1]])
        if i > last_product
        and name == "BRA"
        and (target := re.search(r"\.L_x_\d+", operands)) is not None
        and labels[target[0]] <= last_product
    ]
    end, start = branches_back[0] if branches_back else (last_product, 0)
    # A persistent block's tile ends at the branch back to the next tile.
    end_of_tile = branches_back[1][0] if len(branches_back) > 1 else exits[-1]
    return start, end, end_of_tile - end


def _order(instructions: Instructions, first_product: int) -> str:
    """Return the order of four steps: load bias, load tile (the first), use bias (which waits for it), and multiply.

    Tiles are loaded by special instructions, so a plain load is one of the bias.
    """
    found = {"multiply": first_product}
    bias: set[int] = set()
    for i, (name, operands) in enumerate(instructions):
        registers = [int(number) for number in re.findall(r"\bR(\d+)\b", operands)]
        if name.startswith(("LDGSTS", "UTMALDG")):
            found.setdefault("load tile", i)
        if bias.intersection(registers):
            found.setdefault("use bias", i)
        if name.startswith("LDG.") and "use bias" not in found:
            found.setdefault("load bias", i)
            width = 4 if ".128" in name else 2 if ".64" in name else 1
            bias.update(range(registers[0], registers[0] + width))
    return ", ".join(sorted(found, key=lambda step: found[step]))


def hides_bias(order: str) -> bool:
    """Return whether the bias is loaded before the product, and the first tile before the wait for the bias."""
    steps = order.split(", ")
    if len(steps) != 4:
        return False
    return steps.index("load bias") < steps.index("multiply") and steps.index("load tile") < steps.index("use bias")
