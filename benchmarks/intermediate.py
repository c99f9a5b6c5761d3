"""What a kernel's intermediate code says: how wide offsets are (Triton IR), what multiplies tiles (PTX).

Triton IR is read as text: one assignment a line, and arguments keep the names of the kernel's source.
"""

import re

ASSIGNMENT = re.compile(r"^\s*%(\w+)(?::\d+)? = ([\w.]+) (.*)$", re.MULTILINE)
MATRIX = re.compile(r"(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)[\w.:]*")
# What changes a value's shape or width, and not what it counts.
TRANSPARENT = ("tt.splat", "tt.expand_dims", "tt.broadcast", "arith.extsi")
SIZES = re.compile(r"M|N|K|numel|stride_\w+")
ELEMENT = {"float16": "f16", "bfloat16": "bf16", "tf32": "tf32", "float32": "f32"}


def narrow_offsets(ttir: str) -> list[str]:
    """Multiplications in 32 bits that overflow in tensors past 2^31 elements, as ``what times what``.

    A size or a stride may be multiplied in 32 bits only by a row inside a tile, of which there are at most 256:
    MAX_N in kernels/configs.py limits that product.
    """
    values = {name: (operation, rest) for name, operation, rest in ASSIGNMENT.findall(ttir)}
    narrow = []
    for operation, rest in values.values():
        operands, _, kind = rest.split(" loc(")[0].partition(" : ")
        if operation != "arith.muli" or not re.fullmatch(r"i32|tensor<[\dx]+xi32>", kind):
            continue
        sources = sorted(_source(name, values) for name in re.findall(r"%(\w+)", operands))
        inside_a_tile = sources in (["N", "tt.make_range"], ["arith.constant", "tt.make_range"])
        if not inside_a_tile and (kind != "i32" or any(SIZES.fullmatch(source) for source in sources)):
            narrow.append(" times ".join(sources))
    return narrow


def wide_products(ttir: str) -> int:
    """How many integer multiplications have 64 bits."""
    return len(re.findall(r"arith\.muli [^\n]*: (?:tensor<[\dx]+xi64>|i64)", ttir))


def _source(name: str, values: dict[str, tuple[str, str]]) -> str:
    """The argument that a value is, or the operation it comes from."""
    while name in values:
        operation, rest = values[name]
        operand = re.search(r"%(\w+)", rest)
        if operation not in TRANSPARENT or operand is None:
            return operation
        name = operand[1]
    return name


def matrix_instructions(ptx: str) -> list[str]:
    """Every kind of matrix instruction, without the shape of its operands."""
    kinds = {
        re.sub(r"\.(?:sync|aligned|row|col|m\d+n\d+k\d+|cta_group::\d)(?=\.|$)", "", i) for i in MATRIX.findall(ptx)
    }
    return sorted(kinds)


def right_instruction(arch: int, dtype: str, block_m: int) -> str:
    """What should multiply tiles, as ``matrix_instructions`` names it; sums are fp32 throughout.

    Hopper's and Blackwell's own instructions need 64 rows, smaller tiles take the old one.
    """
    element = ELEMENT[dtype]
    if 100 <= arch < 120 and block_m >= 64:
        return f"tcgen05.mma.kind::{'tf32' if dtype == 'tf32' else 'f16'}"
    if arch == 90 and block_m >= 64:
        return f"wgmma.mma_async.f32.{element}.{element}"
    return f"mma.f32.{element}.{element}.f32"
