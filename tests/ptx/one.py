"""One case as a row of the table, in a process of its own."""

import time
from dataclasses import dataclass, field

import cases
import execute
import triton
from emulator.parse import PTXError


@dataclass(frozen=True)
class Allowed:
    """What Triton's own code does, and why it is let through. words: of the report. versions: of Triton, its start."""

    kind: str
    words: str
    why: str
    versions: str = ""


ALLOWED = (
    Allowed(
        "mbarrier not fenced",
        "the mbarrier was initialized",
        "Triton issues no fence between mbarrier.init and the first bulk load; it does so for every kernel with TMA",
    ),
    Allowed(
        "allocation not fenced",
        "write of shared byte",
        "on sm_100 a bulk load fills the bytes where tcgen05.alloc wrote its address, which all warps have read",
    ),
    Allowed(
        "missing proxy fence",
        "not ordered after cp.async of warp",
        "Triton 3.6 issues no fence between cp.async and the matrix instructions that read its bytes; 3.7 does",
        versions="3.6.",
    ),
    Allowed(
        "unfinished register",
        "used before tcgen05.wait::ld: cvt.u64.u32",
        "Triton 3.6 packs registers by cvt, shl and or, which LLVM moves before tcgen05.wait::ld (sm_100)",
        versions="3.6.",
    ),
    Allowed(
        "unfinished register",
        "used before tcgen05.wait::ld",
        "Triton 3.9 lets LLVM move arithmetic on loaded registers before tcgen05.wait::ld (sm_100)",
        versions="3.9.",
    ),
)


@dataclass
class Result:
    """One case: its row in the table, how it went, and how long it took. allowed: reports of each reason."""

    row: tuple[str, str]
    name: str
    share: float = 0.0
    wrong: list[str] = field(default_factory=list)
    allowed: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


def reason_to_allow(kind: str, text: str) -> str | None:
    for each in ALLOWED:
        if each.kind == kind and each.words in text and triton.__version__.startswith(each.versions):
            return each.why
    return None


def run(arch: int, index: int, quick: bool) -> Result:
    """Compile and execute one case, in a process of its own."""
    case = (cases.choice(arch) if quick else cases.cases(arch))[index]
    kernel = str(case.config) if isinstance(case, cases.Linear) else str(case).split()[2]
    dtype = "tf32" if " tf32 " in str(case) else ""
    result, start = Result((f"sm_{arch}", f"{kernel} {dtype}".strip()), str(case)), time.perf_counter()
    compiled = execute.compiled(case)
    try:
        outcome = execute.run_case(case, compiled.asm["ptx"], compiled.metadata)
    except PTXError as error:
        result.wrong = [str(error)]
    else:
        result.share, result.wrong = outcome.share, outcome.wrong
        for (kind, line), text in outcome.reports.items():
            why = reason_to_allow(kind, text)
            if why is None:
                result.wrong.append(f"line {line}: {kind}: {text}")
            else:
                result.allowed[why] = result.allowed.get(why, 0) + 1
    result.seconds = time.perf_counter() - start
    return result
