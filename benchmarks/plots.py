"""Draw the report's pictures as SVG: speed-up over M, and ours against each rival."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter

from benchmarks.records import (
    OURS,
    Group,
    against_ours,
    by_shape,
    case_of,
    is_slower,
    rivals,
    same_function,
    speedup,
    threads,
)

LOST = "#c62828"
COLOURS = {
    "ours": "#1565c0",
    "eager": "#616161",
    "F.linear": "#9e9e9e",
    "torch.compile": "#ef6c00",
    "torch.compile, frozen": "#c49000",
    "ONNX Runtime": "#00838f",
    "max-autotune without graphs": "#6a1b9a",
}
UNPADDED = {"ours unpadded": "#1565c0", "ours unpadded, position 0 only": "#2e7d32"}
MAX_ROWS = 40


def draw(groups: list[Group], out: Path) -> list[tuple[str, Path]]:
    """Write the pictures that the results have data for; return the title and file of each."""
    pictures = []
    modules = _most_measured([group for group in groups if case_of(group)["suite"] == "modules"])
    if modules:
        pictures.append(("Speed-up over eager", _over_rows(modules, out / "speedup.svg")))
    ragged = [group for group in groups if case_of(group)["suite"] == "models" and case_of(group)["ragged"]]
    if ragged:
        pictures.append(("Speed-up over eager without padding", _over_fill(by_shape(ragged), out / "unpadded.svg")))
    for suite in dict.fromkeys(case_of(group)["suite"] for group in groups):
        of_suite = [group for group in groups if case_of(group)["suite"] == suite]
        pictures += _against_rivals(by_shape(of_suite[:MAX_ROWS]), suite, out / f"rivals-{suite}.svg")
    return pictures


def _most_measured(groups: list[Group]) -> list[Group]:
    """Return the groups that have the most frequent dtype and activation."""

    def kind(group: Group) -> tuple[str, str]:
        return case_of(group)["dtype"], case_of(group)["activation"]

    kinds = [kind(group) for group in groups]
    return [group for group in groups if kind(group) == max(kinds, key=kinds.count)]


def _over_rows(groups: list[Group], path: Path) -> Path:
    """Draw a panel for each model and a line for each implementation over M."""
    models = list(dict.fromkeys(case_of(group)["model"] for group in groups))
    size = max(6.5, 1.5 + 3.6 * len(models)), 3.6
    figure, panels = plt.subplots(1, len(models), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for panel, model in zip(panels[0], models, strict=True):
        of_model = [group for group in groups if case_of(group)["model"] == model]
        for name, colour in COLOURS.items():
            # A case measured both with standard and costlier rivals is shown by its standard figure.
            of_model.sort(key=lambda group: case_of(group)["rivals"] == "standard")
            found = {case_of(group)["M"]: speedup(group, "eager", over=name) for group in of_model}
            points = {M: point for M, point in found.items() if point}
            if not points or name == "eager":
                continue
            rows = sorted(points)
            middle = [points[M].median for M in rows]
            panel.plot(rows, middle, color=colour, label=name, linewidth=2 if name == OURS else 1.2, marker="o", ms=4)
            low, high = [points[M].low for M in rows], [points[M].high for M in rows]
            panel.fill_between(rows, low, high, color=colour, alpha=0.15, lw=0)
            if name == OURS:
                lost = [M for M in rows if is_slower(points[M])]
                panel.plot(lost, [points[M].median for M in lost], "o", color=LOST, ms=7, zorder=3)
        panel.axhline(1, color=COLOURS["eager"], linewidth=1, linestyle="--")
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(FuncFormatter(lambda M, _: f"{M:.0f}"))
        panel.tick_params(axis="x", rotation=45)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.25)
        case = case_of(of_model[0])
        panel.set_title(f"{model}  {case['K']}→{case['N']}", fontsize=10)
        panel.set_xlabel("rows M")
    panels[0][0].set_ylabel("speed-up over eager")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    case = case_of(groups[0])
    figure.suptitle(f"{_machine(groups)}: linear + {case['activation']}, {case['dtype']}, forward", fontsize=11)
    return _save(figure, path)


def _over_fill(groups: list[Group], path: Path) -> Path:
    """Draw a panel for each model, with and without a head, and a line for each way to leave out work, over the fill.

    Of a model with several shapes the one measured at most fills is drawn.
    """
    panels: dict[str, dict[float, Group]] = {}
    for group in groups:
        panels.setdefault(_label(group).replace(" ragged", ""), {})[next(iter(group.values()))["fill"]] = group
    kinds: dict[str, str] = {}
    for label in sorted(panels, key=lambda label: -len(panels[label])):
        if len(panels[label]) > 1 or not kinds:
            kinds.setdefault(label.split(" B=")[0], label)
    size = 1.5 + 3.6 * len(kinds), 3.6
    figure, axes = plt.subplots(1, len(kinds), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, label in zip(axes[0], kinds.values(), strict=True):
        for name, colour in UNPADDED.items():
            found = {fill: speedup(group, "eager", over=name) for fill, group in sorted(panels[label].items())}
            points = {fill: point for fill, point in found.items() if point}
            fills = list(points)
            axis.plot(fills, [points[fill].median for fill in fills], color=colour, label=name, marker="o", ms=4)
            low, high = [points[fill].low for fill in fills], [points[fill].high for fill in fills]
            axis.fill_between(fills, low, high, color=colour, alpha=0.15, lw=0)
        axis.axhline(1, color=COLOURS["eager"], linewidth=1, linestyle="--")
        axis.set(title=label, xlabel="share of tokens that are real", xlim=(0, 1.02), ylim=(0, None))
        axis.title.set_fontsize(9)
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("speed-up over eager")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(_machine(groups), fontsize=10)
    return _save(figure, path)


def _against_rivals(groups: list[Group], suite: str, path: Path) -> list[tuple[str, Path]]:
    """Draw a panel for each rival and a row for each case: the rival's time over ours.

    Red where ours is slower, grey where the rival computes another function.
    """
    found = {
        name: {i: r for i, group in enumerate(groups) if (r := against_ours(group, name))} for name in rivals(groups)
    }
    found = {name: of_rival for name, of_rival in found.items() if of_rival}
    rows = [i for i in range(len(groups)) if any(i in of_rival for of_rival in found.values())]
    if not rows:
        return []
    size = max(6.5, 3.2 + 2.1 * len(found)), 1.5 + 0.24 * len(rows)
    shared = {"sharex": True, "sharey": True, "squeeze": False, "layout": "constrained"}
    figure, panels = plt.subplots(1, len(found), figsize=size, **shared)
    for panel, (name, of_rival) in zip(panels[0], found.items(), strict=True):
        for y, i in enumerate(rows):
            if i in of_rival:
                r = of_rival[i]
                other = not same_function(groups[i][name])
                colour = COLOURS["F.linear"] if other else LOST if is_slower(r) else COLOURS[OURS]
                panel.plot([r.low, r.high], [y, y], color=colour, linewidth=1.5)
                panel.plot([r.median], [y], "o", color=colour, ms=4)
        panel.axvline(1, color=COLOURS["eager"], linewidth=1, linestyle="--")
        panel.set_title(name, fontsize=8)
        panel.grid(axis="x", alpha=0.25)
        panel.tick_params(labelsize=8)
    panels[0][0].set_yticks(range(len(rows)), [_label(groups[i]) for i in rows], fontsize=8)
    panels[0][0].invert_yaxis()
    title = f"{_machine(groups)}: {suite}, each rival's time over ours"
    figure.suptitle(f"{title}\nred: ours is slower, grey: the rival computes another function", fontsize=9)
    return [(f"Ours against each rival, {suite}", _save(figure, path))]


def _label(group: Group) -> str:
    case = case_of(group)
    shape = f"M={case['M']}" if case["batch"] is None else f"B={case['batch']} S={case['sequence']}"
    kind = "" if case["suite"] in ("models", "pooler") else f" {case['activation']}"
    rivals = f" ({case['rivals']})" if case["rivals"] == "max-autotune" else ""
    head = " classifier" if case.get("head") else ""
    return f"{case['model']}{head} {shape}{' ragged' if case['ragged'] else ''} {case['dtype']}{kind}{rivals}"


def _machine(groups: list[Group]) -> str:
    device = next(iter(groups[0].values()))["device"]
    name = str(device["name"]).replace("$", r"\$")
    return name if device["type"] == "cuda" else f"{name}, {threads(device)}"


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path)
    plt.close(figure)
    return path
