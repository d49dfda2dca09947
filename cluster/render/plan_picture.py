"""Draw the costs of choices of shards and slices: a panel for each cost, a line for each layout.

    draw_choices(advise(demand, limits), best).savefig("plan.png")

The panels are of as many orders as the recommended choice has; the last one compares numbers of orders.
Lines have different markers, so the picture is readable without colour. A choice over a limit is drawn
hollow; the recommended choice has a ring.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sisa.planning.layout_advice import Advice

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKS = "osD^v<>ph*"
MAX_LINES = len(MARKS)
ROWS, WIDE = 2, 10  # a panel is logarithmic if its largest value is over WIDE times its smallest
Panel = tuple[str, Callable[[Advice], float]]
PANELS: tuple[Panel, ...] = (
    ("a month's deletions, each alone\n(share of a full training)", lambda each: each.one_by_one),
    ("a month's deletions, as one batch", lambda each: each.together),
    ("all orders, each alone", lambda each: each.one_by_one + each.others_one_by_one),
    ("slices still served right\nafter a deletion (share)", lambda each: each.serving_depth),
    ("checkpoints, GB", lambda each: each.stored_bytes / 1e9),
    ("training all orders once\n(full trainings of order 0)", lambda each: each.training),
)
EPOCHS: Panel = (
    "record-epochs until\na deletion is trained",
    lambda each: each.record_epochs_to_utility,
)
HOURS: Panel = ("hours of one worker until\na deletion is trained", lambda each: each.hours_to_utility)


def draw_choices(advised: Sequence[Advice], best: Advice | None) -> Figure:
    """Draw two rows of panels, with lines for at most MAX_LINES numbers of shards."""
    from matplotlib.figure import Figure

    num_orders = 1 if best is None else best.num_orders
    everything, advised = advised, [each for each in advised if each.num_orders == num_orders]
    shown = [*PANELS, EPOCHS if any(math.isnan(each.hours_to_utility) for each in advised) else HOURS]
    columns = -(-len(shown) // ROWS)
    figure = Figure(figsize=(4.2 * columns, 3.8 * ROWS), layout="constrained")
    axes = list(figure.subplots(ROWS, columns, squeeze=False).flat)
    lines = sorted({each.num_shards for each in advised})
    thinned = lines[:: -(-len(lines) // (MAX_LINES - 1))]
    lines = sorted({*thinned, *([best.num_shards] if best else [])})
    for axis, (title, cost) in zip(axes, shown, strict=False):
        for number, num_shards in enumerate(lines):
            here = [each for each in advised if each.num_shards == num_shards]
            _line(axis, sorted(here, key=lambda each: each.num_slices), cost, number)
        if best is not None:
            axis.plot(best.num_slices, cost(best), "o", ms=16, mfc="none", mec="black", label=None)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("slices")
        costs = [cost(each) for each in advised]
        if min(costs) * WIDE < max(costs) and min(costs) > 0:
            axis.set_yscale("log")
        else:
            axis.set_ylim(0, 1.1 * max(costs))
    _orders(axes[len(shown)], everything, best or everything[0])
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, title="shards", fontsize=8, loc="outside right center")
    return figure


def _line(axis: Any, here: Sequence[Advice], cost: Callable[[Advice], float], number: int) -> None:
    mark, colour = MARKS[number], f"C{number}"
    slices, costs = [each.num_slices for each in here], [cost(each) for each in here]
    axis.plot(slices, costs, mark, ls="-", lw=1, ms=5, color=colour, label=str(here[0].num_shards))
    for each in here:
        if each.over:
            axis.plot(each.num_slices, cost(each), mark, ms=5, mfc="white", mec=colour)


def _orders(axis: Any, advised: Sequence[Advice], chosen: Advice) -> None:
    """Draw the benefit and the cost of orders in the chosen layout: a point for each number."""
    layout = (chosen.num_shards, chosen.num_slices)
    here = [each for each in advised if (each.num_shards, each.num_slices) == layout]
    for each in sorted(here, key=lambda each: each.num_orders):
        at = (each.training, each.serving_depth)
        axis.plot(*at, "o", ms=5, color="black", mfc="white" if each.over else "black")
        axis.annotate(str(each.num_orders), at, xytext=(5, 5), textcoords="offset points")
    axis.set_title(
        f"orders at {layout[0]} x {layout[1]}: slices\nstill served after a deletion", fontsize=10
    )
    axis.set_xlabel("training all orders once")
    axis.set_ylim(0, 1)
