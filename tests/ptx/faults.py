"""Plant faults in the compiled PTX, one line at a time, and see that the emulator finds each (``make mutants``).

``EQUIVALENT`` lists the faults that change nothing, each with the argument. Exits with 1 if another is not found.
"""

import argparse
import dataclasses
import multiprocessing
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import cases
import execute
from emulator.parse import PTXError
from equivalent import EQUIVALENT
from one import reason_to_allow
from rich.console import Console
from rich.table import Table

from bert_fused.kernels.configs import Config

# Faults of one kind in one kernel: this many, spread over its lines.
PER_KIND = 4


@dataclass(frozen=True)
class Fault:
    """A changed line. kind: what is wrong with it; number: of the faults of this kind in a kernel, from 0.

    line: from 1. text: the whole line without its fault.
    """

    kind: str
    number: int
    line: int
    text: str
    changed: str


def kernels() -> dict[str, cases.Case]:
    """Return the kernels that faults are planted in, by name."""

    def linear(arch: int, config: Config, activation: str = "gelu") -> cases.Linear:
        m, n, k = config.block_m, config.block_n, config.block_k
        shapes = ((m + m // 2 + 5, n + 16, (2 * config.num_stages + 1) * k), (m, n, k))
        return cases.Linear(arch, config, activation, True, True, True, 17, shapes)

    def hopper(config: Config) -> cases.Linear:
        # Four tiles for one block, so that each group of warps goes on to another.
        m, n, k = config.block_m, config.block_n, config.block_k
        shapes = ((3 * m + 5, n, (2 * config.num_stages + 1) * k), (m, n, k))
        return dataclasses.replace(linear(90, config), shapes=shapes)

    half, wide, tf32 = "float16", "bfloat16", "tf32"
    ragged = linear(80, Config("pointer", half, 32, 64, 64, num_warps=4, num_stages=3), "tanh")
    ragged = dataclasses.replace(ragged, even_k=False, shapes=tuple((m, n, k - 32) for m, n, k in ragged.shapes))
    return {
        "sm_80 pointer": linear(80, Config("pointer", wide, 64, 64, 64, num_warps=4, num_stages=4)),
        "sm_80 pointer, ragged K": ragged,
        "sm_80 pointer, tf32": linear(80, Config("pointer", tf32, 32, 64, 32, num_warps=4, num_stages=3)),
        "sm_89 pointer": linear(89, Config("pointer", half, 16, 64, 128, num_warps=4, num_stages=3), "gelu_tanh"),
        "sm_90 pointer": linear(90, Config("pointer", half, 64, 64, 64, num_warps=4, num_stages=3)),
        "sm_90 TMA": linear(90, Config("tma", wide, 128, 128, 64, num_warps=4, num_stages=3)),
        "sm_90 TMA, persistent": linear(90, Config("tma", half, 64, 128, 64, 4, 3, persistent=1, subtiles=2)),
        "sm_90 Hopper, cooperative": hopper(Config("hopper", wide, 128, 256, 64, 8, 3, persistent=1, subtiles=4)),
        "sm_90 Hopper, ping-pong": hopper(Config("hopper", half, 128, 128, 64, 8, 3, persistent=1, subtiles=2)),
        "sm_100 pointer": linear(100, Config("pointer", wide, 64, 64, 64, num_warps=4, num_stages=3)),
        "sm_100 TMA": linear(100, Config("tma", half, 128, 64, 64, num_warps=4, num_stages=3)),
        "sm_120 pointer": linear(120, Config("pointer", half, 64, 64, 32, num_warps=4, num_stages=4)),
        "sm_80 backward": cases.Elementwise(80, wide, "gelu", True, (141, 272)),
        "sm_90 pass": cases.Elementwise(90, half, "tanh", False, (13, 272)),
    }


# Only where warps run apart: elsewhere the emulator loads no later than a wait, which then never times out.
ASKED_ONCE = "an mbarrier is asked once"
# A pattern that a line matches, and what replaces it: the kinds of faults.
_DROPPED = (
    "cp.async.wait_group", "cp.async.commit_group", "bar.sync", "wgmma.wait_group", "wgmma.fence", "wgmma.commit_group",
    "fence.proxy.async", "cp.async.bulk.wait_group", "cp.async.bulk.commit_group", "tcgen05.wait::ld",
    "tcgen05.wait::st", "tcgen05.commit", "mbarrier.arrive.expect_tx", "mbarrier.init", "st.shared", "stmatrix",
    "cp.async.bulk.tensor", "mbarrier.arrive.shared::cta", "setmaxnreg.dec",
)  # fmt: skip
_REPLACED = (
    (
        "one group too few is waited for",
        r"(cp\.async\.wait_group\s+|wgmma\.wait_group\S* |bulk\.wait_group\S* )(\d+)(?=;)",
        1,
    ),
    ("swizzle: another bit", r"(xor\.b32\s+%r\d+, %r\d+, )(\d+)(?=;)", 32),
    ("offset in shared or global memory", r"(add\.s32\s+%r\d+, %r\d+, )(\d{4,})(?=;)", 16),
    ("bytes expected of a bulk copy", r"(expect_tx\S* _, \[%r\d+\], )(\d+)(?=;)", 128),
    ("registers asked for", r"(setmaxnreg\.inc\S*\s+)(\d+)(?=;)", 8),
    ("threads of a barrier", r"(bar\.sync\s+\d+, )(\d+)(?=;)", 32),
    ("arrivals of an mbarrier", r"(mbarrier\.init\S* \[%r\d+\], )(\d+)(?=;)", 1),
)
_REWRITTEN = (
    ("store without its mask", r"@%p\d+ (st\.global)", r"\1"),
    ("load without its mask", r"@%p\d+ (ld\.global)", r"\1"),
    ("copy without its mask", r"(cp\.async\.c[ga]\S* .*, 0x10, )%r\d+;", r"\g<1>16;"),
    ("rows are not clamped", r"min\.s(32|64)(\s+%\w+, %\w+), %\w+;", r"mov.b\1\2;"),
    ("an mbarrier is not waited for", r"mbarrier\.try_wait\S* complete, .*;", "mov.pred complete, -1;"),
    ("the other phase of an mbarrier", r"(mbarrier\.try_wait\S* complete, .*, )(%r\d+);", r"xor.b32 \2, \2, 1; \1\2;"),
    (ASKED_ONCE, r"@!complete bra\.uni waitLoop;", ""),
    ("ring of buffers never wraps", r"selp\.b32(\s+%r\d+), 0, (%r\d+), %p\d+;", r"mov.b32\1, \2;"),
    ("activation: sign", r"neg\.f32(\s+%r\d+), (%r\d+);", r"mov.b32\1, \2;"),
    ("activation: product without its sum", r"fma\.rn\.f32(\s+%r\d+, %r\d+, %r\d+), %r\d+;", r"mul.f32\1;"),
    ("comparison", r"setp\.lt\.(s32|s64)", r"setp.le.\1"),
    ("the sum so far is thrown away", r"(wgmma\.mma_async.*), %p\d+, 1, 1", r"\1, 0, 1, 1"),
)


# Kinds of which each line may guard other rows or columns.
MASKS = ("comparison", "rows are not clamped", "load without its mask", "copy without its mask")


def planted(ptx: str) -> Iterator[tuple[str, int, str, str]]:
    """Yield every fault of every kind: the kind, the line's number and text, and the changed line."""
    for number, text in enumerate(ptx.split("\n"), 1):
        bare = re.sub(r"^\s*(@!?%p\d+ )?", "", text)
        for dropped in _DROPPED:
            if re.match(re.escape(dropped) + r"[.\s;]", bare):
                yield f"{dropped} is left out", number, text, ""
        for kind, pattern, more in _REPLACED:
            match = re.search(pattern, text)
            if match:
                value = int(match[2]) ^ more if "swizzle" in kind else int(match[2]) + more
                yield kind, number, text, f"{text[: match.start()]}{match[1]}{value}{text[match.end() :]}"
        for kind, pattern, new in _REWRITTEN:
            changed = re.sub(pattern, new, text)
            if changed != text and (kind != ASKED_ONCE or "setmaxnreg" in ptx):
                yield kind, number, text, changed


def chosen(ptx: str) -> list[Fault]:
    """Return at most ``PER_KIND`` faults of each kind, evenly spread."""
    kinds: dict[str, list[Fault]] = {}
    for kind, *where in planted(ptx):
        faults = kinds.setdefault(kind, [])
        faults.append(Fault(kind, len(faults), *where))
    counts = {kind: min(PER_KIND, len(faults)) for kind, faults in kinds.items()}
    return [kinds[kind][i * len(kinds[kind]) // count] for kind, count in counts.items() for i in range(count)]


def finding(case: cases.Case, ptx: str, metadata: object) -> str:
    """Return what is wrong with a program, in a few words; "" if nothing is."""
    try:
        outcome = execute.run_case(case, ptx, metadata)
    except PTXError as error:
        return re.sub(r"line \d+: |[:\d].*", "", str(error))
    for (kind, _), text in outcome.reports.items():
        if reason_to_allow(kind, text) is None:
            return kind
    return "wrong values" if outcome.wrong else ""


def run(name: str, case: cases.Case) -> list[tuple[str, Fault, str]]:
    """Plant the chosen faults of one kernel: (kernel, fault, what was found)."""
    compiled = execute.compiled(case)
    ptx, metadata = compiled.asm["ptx"], compiled.metadata
    assert finding(case, ptx, metadata) == ""
    lines, found = ptx.split("\n"), []
    for fault in chosen(ptx):
        changed = [*lines[: fault.line - 1], fault.changed, *lines[fault.line :]]
        how = finding(case, "\n".join(changed), metadata)
        for other in with_every_edge(case) if fault.kind in MASKS else ():
            how = how or finding(other, "\n".join(changed), metadata)
        found.append((name, fault, how))
    return found


def with_every_edge(case: cases.Case) -> list[cases.Case]:
    """Return the case with edges in each row and column of a tile, and each step of K, that a mask may guard."""
    if isinstance(case, cases.Elementwise):
        M, N = case.shape
        return [dataclasses.replace(case, shape=(M + edge, N)) for edge in range(16) if case.backward]
    m, n, k = case.config.block_m, case.config.block_n, case.config.block_k
    first = k if case.even_k else k // 2
    rows = [(m + edge, n, first) for edge in range(1, m, max(m // 16, 1)) if (m + edge) % 16]
    # Each group of warps of the Hopper kernel has code of its own, and gets every second tile.
    groups = range(case.config.consumers if case.config.kernel == "hopper" else 1)
    columns = [(3, (1 + group) * n + edge, first) for edge in range(16, n, 16) for group in groups]
    steps = [(3, n, first + step * k) for step in range(1, case.config.num_stages + 1)]
    group = [(case.config.group_m * m, n, first)] if case.config.persistent else []  # after it, one without rows
    return [dataclasses.replace(case, shapes=(*steps, *columns, *rows, *group))]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python tests/ptx/faults.py", description=__doc__)
    parser.add_argument("--kernel", action="append", choices=list(kernels()), help="only this one; may be repeated")
    options = parser.parse_args(arguments)
    console, start = Console(width=160), time.perf_counter()
    jobs = {name: case for name, case in kernels().items() if name in (options.kernel or kernels())}
    workers = min(len(os.sched_getaffinity(0)), 8)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("forkserver")) as pool:
        found = [row for rows in pool.map(run, jobs.keys(), jobs.values()) for row in rows]
    table = Table()
    for title in ("kind of fault", "planted", "found", "equivalent", "not found", "how they were found"):
        table.add_column(title, justify="left" if title.startswith(("kind", "how")) else "right")
    missed = []
    known = {
        (name, each.kind, number) for each in EQUIVALENT for name, numbers in each.where.items() for number in numbers
    }
    for kind in dict.fromkeys(fault.kind for _, fault, _ in found):
        mine = [(name, fault, how) for name, fault, how in found if fault.kind == kind]
        how = Counter(how for _, _, how in mine if how)
        left = [(name, fault) for name, fault, how in mine if not how]
        unexplained = [(name, fault) for name, fault in left if (name, kind, fault.number) not in known]
        missed += unexplained
        counts = (len(mine), how.total(), len(left) - len(unexplained), len(unexplained))
        table.add_row(kind, *map(str, counts), ", ".join(f"{words} {n}" for words, n in how.most_common()))
    console.print(table)
    for name, fault in missed:
        console.print(
            f"not found: {name}, line {fault.line}, {fault.kind} {fault.number}: {fault.text.strip()[:80]}",
            markup=False,
        )
    total = sum(bool(how) for _, _, how in found)
    console.print(f"{total} of {len(found)} faults found, {len(missed)} not, {time.perf_counter() - start:.0f} s")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
