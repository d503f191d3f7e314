"""Draw docs/images/engine-speed.svg: tokens a second of each side, row by row, from the record of `bench_engine.py`.

    python scripts/plot_engine.py
    python scripts/plot_engine.py --record engine.json --out engine-speed.svg

The picture has a ground of its own, as the terminals beside it have: it looks the same on a light and on a dark page.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from bench_engine_table import find_best
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

DOCS = Path(__file__).resolve().parent.parent / "docs"

ROWS = {
    "full": "balanced\nfull sequences",
    "real": "balanced\nCodeAlpaca rows",
    "packed": "balanced\nthe same, packed",
    "conservative-full": "conservative\nfull sequences",
    "conservative-real": "conservative\nCodeAlpaca rows",
    "quality-full": "quality\nfull sequences",
    "quality-real": "quality\nCodeAlpaca rows",
    "card-12": "balanced\n12 GiB card",
    "card-8": "balanced\n8 GiB card",
}
SIDES = {
    "engine": ("dsft", "#4fb3a5"),
    "plain": ("dsft, --engine off", "#2f6f68"),
    "unsloth": ("Unsloth", "#d9a441"),
    "seed": ("transformers + peft", "#8a8a8a"),
}
GROUND, TEXT, FAINT = "#0c0c0c", "#d9d9d9", "#8f8f8f"
WIDTH_IN = 7.6
BAR_IN, GAP_IN = 0.24, 0.3
"""Height of a bar, and of the room between two rows' bars."""
EDGE_IN = 0.12
"""Empty room on each side."""
REST_IN = 1.35
"""What title, legend and edges take of the height."""


@dataclass(frozen=True)
class Bar:
    """A bar.

    Attributes:
        side: Whose.
        tok_per_s: Its length.
        place_in: From the top of the first bar to its middle.
    """

    side: str
    tok_per_s: float
    place_in: float


def main() -> None:
    """Read the record and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, default=DOCS / "benchmarks" / "engine-6.7b-h100.json")
    parser.add_argument("--out", type=Path, default=DOCS / "images" / "engine-speed.svg")
    options = parser.parse_args()
    draw(json.loads(options.record.read_text(encoding="utf-8")), options.out)
    print(options.out)


def draw(record: dict[str, Any], out: Path) -> None:
    """Draw a record's rows as groups of horizontal bars."""
    groups = lay_out(record["runs"])
    bars = [bar for group in groups.values() for bar in group]
    height_in = bars[-1].place_in + BAR_IN / 2
    # Text stays text, and nothing in the file depends on when or how often it was drawn.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dsft", "font.family": "sans-serif"}):
        figure = Figure(figsize=(WIDTH_IN, height_in + REST_IN), facecolor=GROUND)
        figure.set_layout_engine("constrained", w_pad=EDGE_IN, h_pad=EDGE_IN)
        axes = figure.add_subplot()
        draw_bars(axes, bars)
        decorate(axes, groups, height_in, str(record["gpu"].get("name", "no GPU")))
        FigureCanvasSVG(figure)
        figure.savefig(out, format="svg", facecolor=GROUND, metadata={"Date": None})


def lay_out(runs: list[dict[str, Any]]) -> dict[str, list[Bar]]:
    """Return each row's bars, those of a side that was measured several times by its best."""
    groups: dict[str, list[Bar]] = {}
    top_in = 0.0
    for row in ROWS:
        found = [(side, best) for side in SIDES if (best := find_best(row, side, runs)) is not None]
        if found:
            groups[row] = [
                Bar(side, best["tok_per_s"], top_in + (index + 0.5) * BAR_IN)
                for index, (side, best) in enumerate(found)
            ]
            top_in += len(found) * BAR_IN + GAP_IN
    if not groups:
        raise SystemExit("the record holds no rate")
    return groups


def draw_bars(axes: Axes, bars: list[Bar]) -> None:
    """Draw bars, each with its rate at its end."""
    longest = max(bar.tok_per_s for bar in bars)
    for bar in bars:
        axes.barh(bar.place_in, bar.tok_per_s, height=BAR_IN * 0.86, color=SIDES[bar.side][1])
        axes.text(
            bar.tok_per_s + longest * 0.012, bar.place_in, f"{bar.tok_per_s:,.0f}", color=TEXT, fontsize=9, va="center"
        )
    axes.set_xlim(0, longest * 1.1)


def decorate(axes: Axes, groups: dict[str, list[Bar]], height_in: float, gpu: str) -> None:
    """Write title, names of rows and legend."""
    axes.set_ylim(height_in, 0)
    axes.set_facecolor(GROUND)
    axes.set_title("Tokens a second, 6.7B QLoRA", loc="left", color=TEXT, fontsize=12, fontweight="bold", pad=24)
    axes.annotate(
        f"{gpu}, each process held to a card of 24 GiB where no other is named", (0, 1), (0, 6),
        xycoords="axes fraction", textcoords="offset points", color=FAINT, fontsize=8.5,
    )  # fmt: skip
    middles = [(group[0].place_in + group[-1].place_in) / 2 for group in groups.values()]
    axes.set_yticks(middles, [ROWS[row] for row in groups], color=TEXT, fontsize=9)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    shown = {bar.side for group in groups.values() for bar in group}
    handles = [
        matplotlib.patches.Patch(color=color, label=name) for side, (name, color) in SIDES.items() if side in shown
    ]
    axes.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=len(handles), frameon=False,
        labelcolor=TEXT, fontsize=9,
    )  # fmt: skip


if __name__ == "__main__":
    main()
