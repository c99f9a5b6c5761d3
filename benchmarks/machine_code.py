"""What machine code and ptxas's log say of a kernel: resources, waits in the loop over K, and the order of loads."""

import re
import subprocess
import tempfile
from pathlib import Path

import triton

DISASSEMBLER = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
INSTRUCTION = re.compile(r"^\s*(?:(\.L_x_\d+):|/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*))", re.MULTILINE)

Instructions = list[tuple[str, str]]  # name and operands
Labels = dict[str, int]  # the instruction that each label stands before


def read_log(log: str) -> dict[str, object]:
    """Of ``ptxas -v``: registers, bytes that a thread keeps in memory for want of them, and C75xx messages.

    C75xx are about ``wgmma``: what they call a potential loss is a wait after every matrix instruction.
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
    """Of a product by instructions named ``matrix``: how many the loop over K has, how often it waits for them, how
    many instructions follow the loop, and in which order bias and tile are loaded and used."""
    products = [i for i, (name, _) in enumerate(instructions) if name.startswith(matrix)]
    if not products:
        return {"products": 0, "waits": 0, "epilogue": 0, "order": ""}
    start, end, after = _loop(instructions, labels, products[-1])
    waits = sum(name.startswith("WARPGROUP.DEPBAR") for name, _ in instructions[start:end])
    inside = sum(start <= i < end for i in products)
    return {"products": inside, "waits": waits, "epilogue": after, "order": _order(instructions, products[0])}


def _loop(instructions: Instructions, labels: Labels, last_product: int) -> tuple[int, int, int]:
    """First and last instruction of the loop over K, and how many lie between it and the end of the tile.

    The loop's own last instructions are no part of those, nor is what lies behind the exit: waiting loops and padding.
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
    # A persistent block's tile ends where it branches back for the next.
    end_of_tile = branches_back[1][0] if len(branches_back) > 1 else exits[-1]
    return start, end, end_of_tile - end


def _order(instructions: Instructions, first_product: int) -> str:
    """When the bias and the first tile are asked for, and when the bias is first used, which is to wait for it.

    Tiles are loaded by instructions of their own, so that a plain load is one of the bias.
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
    """Whether the bias is loaded before the product, and the first tile before the bias is waited for."""
    steps = order.split(", ")
    if len(steps) != 4:
        return False
    return steps.index("load bias") < steps.index("multiply") and steps.index("load tile") < steps.index("use bias")
