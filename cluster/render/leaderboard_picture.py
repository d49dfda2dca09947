"""The leaderboard as a picture: what is still known of the forget set against what stays useful.

    draw_leaderboard(body).savefig("leaderboard.png")

What is drawn follows from the JSON of the leaderboard alone. A method is a line from the fine-tuned
model through its settings, the weakest first, with a marker of its own, so that the picture reads
without colour; bars are half of the range over seeds. matplotlib (extra `notebook`) is imported when
something is drawn; no figure is kept.

Source: colours of Okabe and Ito 2008.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from approx.leaderboard.table import FINE_TUNED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#999999")
REFERENCES = ("#000000", "#ffffff")
SIZE_INCHES = (7.5, 5.0)


def draw_leaderboard(body: Mapping[str, Any]) -> Figure:
    """Forget probability across, model utility up; references as stars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    axes = figure.add_subplot()
    before = [_point(row) for row in body["references"] if row["name"] == FINE_TUNED]
    for number, name in enumerate(dict.fromkeys(row["name"] for row in body["curves"])):
        rows = [row for row in body["curves"] if row["name"] == name]
        marker, colour = MARKERS[number % 8], COLOURS[number % 8]
        axes.plot(*zip(*before, *map(_point, rows), strict=True), color=colour, linewidth=1.2)
        for row in rows:
            _draw(axes, row, name if row is rows[0] else None, marker, colour, 8)
    for row, colour in zip(body["references"], REFERENCES, strict=False):
        _draw(axes, row, row["name"], "*", colour, 14)
    axes.set_xlabel("probability of the answers to forget")
    axes.set_ylabel("model utility")
    axes.set_title(f"Unlearning at {body['design']['budget_share']:.0%} of the fine-tuning's operations")
    axes.set_ylim(bottom=-0.02)
    axes.set_xlim(left=-0.02)
    axes.grid(visible=True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(loc="best", frameon=True, fontsize="small")
    return figure


def _point(row: Mapping[str, Any]) -> tuple[float, float]:
    return row["values"]["probability"]["mean"], row["values"]["model_utility"]["mean"]


def _draw(
    axes: Any, row: Mapping[str, Any], label: str | None, marker: str, colour: str, size: int
) -> None:
    across, up = row["values"]["probability"], row["values"]["model_utility"]
    axes.errorbar(
        across["mean"],
        up["mean"],
        xerr=across["spread"],
        yerr=up["spread"],
        fmt=marker,
        color=colour,
        markeredgecolor="#333333",
        ecolor="#777777",
        markersize=size,
        capsize=2,
        label=label,
    )
