"""Turn what ``run`` wrote into a Markdown table and plots, or compare two runs.

Every case is shown, also where ours is slower. A ratio is the rival's time over ours: above 1, ours is faster.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks import plots
from benchmarks.cases import describe
from benchmarks.records import (
    NOISE,
    OURS,
    BadResults,
    Group,
    against_ours,
    by_shape,
    case_of,
    is_slower,
    key,
    load,
    rivals,
    same_function,
    share,
    speedup,
    threads,
    times,
)
from bert_fused.timing import Ratio


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks report", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE.jsonl", help="what run wrote, of one device")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write README.md and plots here, else print the table")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="two files of one device")
    arguments = parser.parse_args(argv)
    if bool(arguments.files) == bool(arguments.compare):
        parser.error("give files, or --compare OLD NEW")
    try:
        if arguments.compare:
            old, new = (load([path]) for path in arguments.compare)
            text = compare(old, new)
        else:
            groups = load(arguments.files)
            text = markdown(groups)
        if arguments.out is None:
            print(text)
            return 0
        arguments.out.mkdir(parents=True, exist_ok=True)
        pictures = [] if arguments.compare else plots.draw(groups, arguments.out)
        path = arguments.out / ("compare.md" if arguments.compare else "README.md")
        path.write_text(text + "".join(f"\n![{title}]({picture.name})\n" for title, picture in pictures))
        written = [path, *(picture for _, picture in pictures)]
    except (BadResults, OSError) as error:
        print(f"python -m benchmarks report: {error}", file=sys.stderr)
        return 2
    print("\n".join(map(str, written)))
    return 0


def markdown(groups: list[Group]) -> str:
    lines = [*_header(groups), ""]
    for title, section in _sections(groups):
        lines += [f"## {title}", "", *_table(by_shape(section)), ""]
        lines += [f"- {line}" for line in dict.fromkeys(_failures(section))] + [""]
    return "\n".join(lines).rstrip() + "\n"


def _header(groups: list[Group]) -> Iterator[str]:
    first = next(iter(groups[0].values()))
    device = first["device"]
    if device["type"] == "cpu":
        yield f"# {device['name']}, {threads(device)}: a CPU, so no kernel of ours"
    else:
        yield f"# {device['name']}"
    yield ""
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items() if version)
    dirty = {True: ", with local changes", None: "", False: ""}[first["dirty"]]
    driver = f"driver {device['driver']}, " if device.get("driver") else ""
    yield f"{driver}{versions}, commit {first['commit'][:12]}{dirty}, {first['run'][:10]}."
    yield ""
    noise = [found.median for group in groups if (found := speedup(group, NOISE, "eager"))]
    rounds = sorted({len(of["samples_us"]) for group in groups for r in group.values() if (of := times(r))})
    taken = " to ".join(map(str, dict.fromkeys((rounds[0], rounds[-1]))))
    yield (
        "Microseconds per call on the GPU's clock (the wall's on a CPU): graph replays over rotating buffers; events "
        "where noted. Ratios are the rival's time over ours, above 1 where ours is faster: medians of "
        f"{taken} interleaved rounds with a bootstrap 95 % interval; **bold** where ours is slower. "
        + (f"Eager against itself: {min(noise):.3f} to {max(noise):.3f}." if noise else "")
    )
    ceilings = {r["case"]["dtype"]: r["ceilings"] for group in groups for r in group.values() if r["ceilings"]}
    rates = ", ".join(f"{dtype} {found['matmul_tflops']:.4g} TFLOP/s" for dtype, found in ceilings.items())
    yield f"Measured ceilings: {rates}, copy {next(iter(ceilings.values()))['copy_tb_per_s']:.3g} TB/s."


def _sections(groups: list[Group]) -> Iterator[tuple[str, list[Group]]]:
    sections: dict[str, list[Group]] = {}
    for group in groups:
        case = case_of(group)
        direction = ", forward and backward" if case["suite"] == "training" else ""
        against = ", max-autotune" if case["rivals"] == "max-autotune" else ""
        title = f"{case['suite']}, {case['dtype']}, {case['activation']}{direction}{against}"
        sections.setdefault(title, []).append(group)
    yield from sections.items()


def _table(section: list[Group]) -> Iterator[str]:
    names = rivals(section)
    heads = ["case", "ours µs", "p20..p80", "eager µs", *(f"vs {name}" for name in names), "wall vs eager"]
    heads += ["of roofline"]
    yield "| " + " | ".join(heads) + " |"
    yield "|" + "---|" * len(heads)
    for group in section:
        ours, eager = (times(group[name]) if name in group else None for name in (OURS, "eager"))
        cells = [_shape(group)]
        cells += [f"{ours['median_us']:.2f}", f"{ours['p20_us']:.2f}..{ours['p80_us']:.2f}"] if ours else ["-", "-"]
        cells += [f"{eager['median_us']:.2f}" if eager else "-"]
        cells += [_cell(against_ours(group, name), bold=name in group and same_function(group[name])) for name in names]
        cells += [_cell(speedup(group, "eager", clock="wall"))]
        cells += [f"{share(group[OURS]):.0%}" if ours else "-"]
        yield "| " + " | ".join(cells) + " |"


def _shape(group: Group) -> str:
    case = case_of(group)
    shape = f"M={case['M']}" if case["batch"] is None else f"B={case['batch']} S={case['sequence']}"
    fill = next(iter(group.values()))["fill"]
    ragged = f" ragged, fill {fill:.2f}" if case["ragged"] else ""
    sizes = f" {case['K']}→{case['N']}" if case["suite"] != "models" else ""
    head = " classifier" if case.get("head") else ""
    return f"{case['model']}{head}{sizes} {shape}{ragged}"


def _cell(found: Ratio | None, *, bold: bool = True) -> str:
    if found is None:
        return "-"
    text = f"{found.median:.3f} [{found.low:.3f}, {found.high:.3f}]"
    return f"**{text}**" if bold and is_slower(found) else text


def _failures(section: list[Group]) -> Iterator[str]:
    """Yield what the table cannot show: implementations that compute another function, or have no figure."""
    for group in section:
        for name, record in group.items():
            if not same_function(record):
                yield f"{name} computes another function, activation {record['computes']}."
            if record["error"] or not record["complete"]:
                yield f"No figure for {name}, {_shape(group)}: {record['error'] or 'time ran out before all rounds'}"
            elif (times(record) or {}).get("method") == "events":
                yield f"{name} was timed with events, since its calls cannot be captured in a graph of ours."


def compare(old: list[Group], new: list[Group]) -> str:
    """Compare ours then and now, each with the eager of its own run, since a GPU can be warmer in one of them."""
    before = {key(case_of(group)): group for group in old}
    lines = ["| case | old µs | new µs | old vs eager | new vs eager | |", "|---|---|---|---|---|---|"]
    shared = 0
    for group in new:
        then = before.get(key(case_of(group)))
        if then is None:
            continue
        was, now = speedup(then, "eager"), speedup(group, "eager")
        if was is None or now is None:
            continue
        shared += 1
        verdict = "faster" if now.low > was.high else "**slower**" if now.high < was.low else ""
        figures = [times(of[OURS]) for of in (then, group)]
        microseconds = " | ".join(f"{of['median_us']:.2f}" if of else "-" for of in figures)
        lines.append(f"| {describe(case_of(group))} | {microseconds} | {_cell(was)} | {_cell(now)} | {verdict} |")
    if not shared:
        raise BadResults("the two files have no measured case in common")
    device = {next(iter(groups[0].values()))["device"]["name"] for groups in (old, new)}
    if len(device) > 1:
        raise BadResults(f"results of different devices: {', '.join(sorted(device))}")
    return "\n".join(lines) + "\n"
