"""What choices of shards and slices cost, as a picture: a panel for each cost, a line for each layout.

    draw_choices(advise(demand, limits), best).savefig("plan.png")

Rules: what is drawn follows from the advice alone, and is of as many orders as the recommended choice
has. Lines differ in their marks too, so that the picture reads without colour; what is over a limit is
drawn hollow, the recommended choice has a ring. matplotlib (extra `notebook`) is imported when
something is drawn; a figure belongs to the caller.

Not covered: the advice (`sisa/advice.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sisa.advice import Advice

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKS = "osD^v<>ph*"
MAX_LINES = len(MARKS)
PANELS: tuple[tuple[str, Callable[[Advice], float]], ...] = (
    ("a month's deletions, each alone\n(share of a full training)", lambda each: each.one_by_one),
    ("a month's deletions, as one batch", lambda each: each.together),
    ("all orders, each alone", lambda each: each.one_by_one + each.others_one_by_one),
    ("slices still served right\nafter a deletion (share)", lambda each: each.serving_depth),
    ("checkpoints, GB", lambda each: each.stored_bytes / 1e9),
    ("hours of one worker to train all", lambda each: each.training_hours),
    ("hours of one worker until\na deletion is trained", lambda each: each.hours_to_utility),
)


def draw_choices(advised: Sequence[Advice], best: Advice | None) -> Figure:
    """Panels side by side, slices across; numbers of shards are thinned out to a few lines."""
    from matplotlib.figure import Figure

    num_orders = 1 if best is None else best.num_orders
    advised = [each for each in advised if each.num_orders == num_orders]
    shown = [each for each in PANELS if not any(math.isnan(each[1](one)) for one in advised)]
    figure = Figure(figsize=(4.2 * len(shown), 4.0), layout="constrained")
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    lines = _thinned(sorted({each.num_shards for each in advised}), best)
    for axis, (title, cost) in zip(axes, shown, strict=True):
        for mark, num_shards in zip(MARKS, lines, strict=False):
            here = sorted(
                (each for each in advised if each.num_shards == num_shards),
                key=lambda each: each.num_slices,
            )
            _line(axis, here, cost, mark)
        if best is not None:
            axis.plot(best.num_slices, cost(best), "o", ms=16, mfc="none", mec="black", label=None)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("slices")
        if all(cost(each) > 0 for each in advised):
            axis.set_yscale("log")
    axes[0].legend(title="shards", fontsize=8, loc="upper right")
    return figure


def _line(axis: Any, here: Sequence[Advice], cost: Callable[[Advice], float], mark: str) -> None:
    slices, costs = [each.num_slices for each in here], [cost(each) for each in here]
    (line,) = axis.plot(slices, costs, lw=1, label=str(here[0].num_shards))
    for each, value in zip(here, costs, strict=True):
        fill = "none" if each.over else line.get_color()
        axis.plot(each.num_slices, value, mark, mfc=fill, mec=line.get_color(), ms=5)


def _thinned(shards: Sequence[int], best: Advice | None) -> list[int]:
    """At most MAX_LINES numbers, the recommended one among them."""
    step = -(-len(shards) // (MAX_LINES - 1))
    kept = set(shards[::step])
    if best is not None:
        kept.add(best.num_shards)
    return sorted(kept)
