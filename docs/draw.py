"""The pictures of docs/how-it-works.md, as SVG: ``python docs/draw.py``. The same source gives the same file."""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from bert_fused.kernels.configs import Config
from bert_fused.tune.candidates import EPILOGUE, ISSUE, LATENCY, step_clocks

FOLDER = Path(__file__).parent / "pictures"
STYLE = {"svg.hashsalt": "bert_fused", "svg.fonttype": "none", "font.size": 9, "font.family": "sans-serif"}

BLUE, ORANGE, GREY, LIGHT = "#1565c0", "#ef6c00", "#9e9e9e", "#eceff1"

# BERT-base's intermediate layer.
M, N, K = 2048, 3072, 768
TILE = Config("tma", "bfloat16", 128, 128, 64, 4, 3)
ARCH = 90
TILES_PER_SM = 4

# start, length in clocks, what
Span = tuple[float, float, str]


def timelines() -> dict[str, list[list[Span]]]:
    """What the blocks on one SM do, by the tuner's cycle model (tune/candidates.py): spans for each block."""
    product = K / TILE.block_k * step_clocks(TILE, ARCH)
    epilogue = TILE.block_m * TILE.block_n * EPILOGUE / ISSUE
    alone: list[Span] = []
    for _ in range(TILES_PER_SM):
        start = alone[-1][0] + alone[-1][1] if alone else 0.0
        alone += [
            (start, LATENCY, "load"),
            (start + LATENCY, product, "product"),
            (start + LATENCY + product, epilogue, "epilogue"),
        ]
    pair: list[list[Span]] = [[], []]
    free = float(LATENCY)  # when the tensor cores are
    for tile in range(TILES_PER_SM):
        block = pair[tile % 2]
        start = block[-1][0] + block[-1][1] if block else 0.0
        block += [(start, LATENCY, "load"), (free, product, "product"), (free + product, epilogue, "epilogue")]
        free += product
    return {"two blocks per SM: one's epilogue behind the other's product": pair, "one block per SM": [alone]}


def draw_timelines(out: Path) -> None:
    both = timelines()
    figure, axes = plt.subplots(2, 1, figsize=(8, 3.2), sharex=True, height_ratios=(2, 1.2), layout="constrained")
    colours = {"load": GREY, "product": BLUE, "epilogue": ORANGE}
    for ax, (title, blocks) in zip(axes, both.items(), strict=True):
        for row, spans in enumerate(blocks):
            for start, length, what in spans:
                ax.barh(-row, length, left=start, height=0.6, color=colours[what])
        end = max(start + length for spans in blocks for start, length, _ in spans)
        ax.axvline(end, color="black", linewidth=0.8, linestyle=":")
        ax.set_title(f"{title}: {end:,.0f} clocks", loc="left", fontsize=9)
        ax.set_yticks([-row for row in range(len(blocks))], [f"block {row + 1}" for row in range(len(blocks))])
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.tick_params(left=False)
    axes[1].set_xlabel(
        f"clocks, MODELLED, not measured: {TILES_PER_SM} tiles of {TILE.block_m}x{TILE.block_n}, K = {K}, "
        f"bf16, on one SM of sm_{ARCH}"
    )
    names = {"load": "first loads on their way", "product": "matrix product", "epilogue": "activation and store"}
    handles = [plt.Rectangle((0, 0), 1, 1, color=colours[what]) for what in names]
    figure.legend(handles, list(names.values()), loc="outside upper center", ncols=3, frameon=False)
    _save(figure, out)


def draw_data_flow(out: Path) -> None:
    figure, ax = plt.subplots(figsize=(8, 3.1), layout="constrained")
    ax.set_xlim(0, 100)
    ax.set_ylim(0, 40)
    ax.axis("off")
    mebi = 2 / 2**20
    x, w, y = M * K * mebi, N * K * mebi, M * N * mebi
    ax.text(0, 38, "eager PyTorch: two kernels; the pre-activation is written and read again", weight="bold")
    _box(ax, 0, 27, 15, f"x {x:.0f} MiB\nW {w:.1f} MiB, b", LIGHT)
    _arrow(ax, 15, 22, 31)
    _box(ax, 22, 27, 15, "x @ W.T + b", BLUE, "white")
    _arrow(ax, 37, 44, 31, f"{y:.0f}")
    _box(ax, 44, 27, 15, f"pre-activation\n{y:.0f} MiB", LIGHT)
    _arrow(ax, 59, 66, 31, f"{y:.0f}")
    _box(ax, 66, 27, 12, "GELU", ORANGE, "white")
    _arrow(ax, 78, 85, 31, f"{y:.0f}")
    _box(ax, 85, 27, 15, f"y {y:.0f} MiB", LIGHT)
    ax.text(0, 18, "bert_fused: one kernel", weight="bold")
    _box(ax, 0, 7, 15, f"x {x:.0f} MiB\nW {w:.1f} MiB, b", LIGHT)
    _arrow(ax, 15, 22, 11)
    _box(ax, 22, 7, 56, "GELU(x @ W.T + b), in fp32 in registers, rounded once", BLUE, "white")
    _arrow(ax, 78, 85, 11, f"{y:.0f}")
    _box(ax, 85, 7, 15, f"y {y:.0f} MiB", LIGHT)
    ax.text(
        0,
        1,
        f"Sizes of BERT-base's intermediate layer with {M} tokens in bf16, counted from shapes. "
        "Training stores the pre-activation as well.",
        fontsize=8,
    )
    _save(figure, out)


def _box(ax: Axes, x: float, y: float, width: float, text: str, colour: str, ink: str = "black") -> None:
    ax.add_patch(FancyBboxPatch((x, y), width, 8, boxstyle="round,pad=0,rounding_size=1", color=colour))
    ax.text(x + width / 2, y + 4, text, ha="center", va="center", color=ink)


def _arrow(ax: Axes, start: float, end: float, y: float, text: str = "") -> None:
    ax.annotate("", (end, y), (start, y), arrowprops={"arrowstyle": "->"})
    ax.text((start + end) / 2, y + 1, text, ha="center", fontsize=8)


def _save(figure: plt.Figure, out: Path) -> None:
    figure.savefig(out, metadata={"Date": None})
    plt.close(figure)
    # matplotlib ends some lines with a space.
    out.write_text("\n".join(line.rstrip() for line in out.read_text().splitlines()) + "\n")


def main(folder: Path = FOLDER) -> None:
    with matplotlib.rc_context(STYLE):
        draw_data_flow(folder / "data-flow.svg")
        draw_timelines(folder / "tile-timeline.svg")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
