"""One case as a row of the table, in a process of its own."""

import re
import time
from dataclasses import dataclass, field

import cases
import execute
from emulator.parse import PTXError

# What Triton's own code does: (kind, the report's first words) -> why it is let through.
ALLOWED = {
    ("missing proxy fence", "the mbarrier was initialized: "): (
        "Triton issues no fence between mbarrier.init and the first bulk load; it does so for every kernel with TMA"
    ),
}


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
    return next((why for (k, words), why in ALLOWED.items() if k == kind and text.startswith(words)), None)


def run(arch: int, index: int, quick: bool) -> Result:
    """Compile and execute one case, in a process of its own."""
    case = (cases.choice(arch) if quick else cases.cases(arch))[index]
    kernel = str(case.config) if isinstance(case, cases.Linear) else re.split(r" ", str(case))[2]
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
