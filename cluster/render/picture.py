"""Draw a model: shards down, slices across, the served adapters at the end of each row.

    before = model.status()
    model.forget(subject="p001")
    draw_layout(before, model.status()).savefig("layout.png")

The picture is derived from two `Status` objects alone, and shows no ids and no text. A shard whose head
changed was trained again from its first changed slice on. If none of its record counts changed (one
record out, one in; another run file), it was trained again from its first slice on. Every mark has its
own hatching, so the picture is readable without colour.

Source: SISA, Bourtoule et al. 2021, figure 2 (shards and slices); colours of Okabe and Ito 2008.
"""

from __future__ import annotations

from enum import Enum
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from sisa.core.errors import InvalidInput

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sisa.flows.status import ShardStatus, Status

Place = tuple[int, int]
DIGEST_CHARS = 8
CELL_INCHES = (1.25, 0.8)
HEAD_CELLS = 1.6  # width of the column of adapters, in cells
GAP_CELLS = 0.3


class Mark(Enum):
    """Name what happened to one slice of one shard, and how it is drawn."""

    KEPT = ("untouched", "#f4f4f4", "")
    DELETED = ("records deleted here", "#e69f00", "xx")
    RETRAINED = ("trained again without them", "#9fd3f5", "//")
    WAITING = ("waiting to be trained", "#f0e442", "..")
    APPENDED = ("appended and trained", "#b5dfcd", "||")

    def __init__(self, label: str, colour: str, hatch: str) -> None:
        self.label = label
        self.look: dict[str, Any] = {"facecolor": colour, "edgecolor": "#333333", "hatch": hatch}


def cell_marks(before: Status, after: Status) -> dict[Place, Mark]:
    """Return the mark of every (shard, slice). Raise InvalidInput if the states differ in shards."""
    shards = [[each.shard for each in state.shards] for state in (before, after)]
    if shards[0] != shards[1]:
        raise InvalidInput(
            "the two states have different shards",
            expected=f"{len(before.shards)} shards",
            got=f"{len(after.shards)} shards",
            next_step="draw each of them alone",
        )
    return {
        (old.shard, slice_): mark
        for old, new in zip(before.shards, after.shards, strict=True)
        for slice_, mark in enumerate(_row(old, new))
    }


def _row(old: ShardStatus, new: ShardStatus) -> list[Mark]:
    pairs = list(zip_longest(old.slice_records, new.slice_records, fillvalue=0))
    changed = [slice_ for slice_, (had, has) in enumerate(pairs) if had != has]
    if old.head == new.head and not changed:
        return [Mark.KEPT] * len(pairs)
    first = changed[0] if changed else 0
    trained = Mark.RETRAINED if new.converged else Mark.WAITING
    marks = []
    for slice_, (had, has) in enumerate(pairs):
        if has < had:
            marks.append(Mark.DELETED)
        elif slice_ >= old.num_slices and has and new.converged:
            marks.append(Mark.APPENDED)
        else:  # an empty slice is not trained
            marks.append(trained if slice_ >= first and has else Mark.KEPT)
    return marks


def draw_layout(before: Status, after: Status | None = None, title: str = "") -> Figure:
    """Draw slices and served adapters, and how they changed. Raise InvalidInput if the shards differ."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    marks = cell_marks(before, after or before)
    num_shards = len(before.shards)
    num_slices = max((slice_ + 1 for _, slice_ in marks), default=0)
    width = num_slices + GAP_CELLS + HEAD_CELLS
    size = (CELL_INCHES[0] * (width + 0.8), CELL_INCHES[1] * (num_shards + 1.6))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    for row, (old, new) in enumerate(zip(before.shards, (after or before).shards, strict=True)):
        counts = zip_longest(old.slice_records, new.slice_records, fillvalue=0)
        for slice_, (had, has) in enumerate(counts):
            label = f"{had}" if had == has else f"{had} → {has}"
            _draw_cell(axes, row, slice_, label, marks[old.shard, slice_])
            axes.patches[-1].set_gid(f"cell-{old.shard}-{slice_}")
        _draw_head(axes, row, num_slices + GAP_CELLS, old, new)
    names = [f"slice {slice_}" for slice_ in range(num_slices)]
    middles = [*(each + 0.5 for each in range(num_slices)), width - HEAD_CELLS / 2]
    axes.set_xticks(middles, [*names, "served adapter"])
    shards = [f"shard {each.shard}" for each in before.shards]
    axes.set_yticks([each + 0.5 for each in range(num_shards)], shards)
    axes.set(xlim=(-0.05, width + 0.05), ylim=(num_shards + 0.05, -0.05))
    axes.set_title(title, pad=14)
    axes.set_xlabel("records in each slice; training goes from left to right")
    axes.tick_params(length=0, top=False, labeltop=True, bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)
    if after is not None:
        found = set(marks.values())
        keys = [Patch(label=mark.label, **mark.look) for mark in Mark if mark in found]
        figure.legend(handles=keys, loc="outside lower center", ncols=2, frameon=False, handleheight=1.4)
    return figure


def _draw_cell(axes: Any, row: int, column: float, label: str, mark: Mark, width: float = 1) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((column + 0.04, row + 0.05), width - 0.08, 0.9, **mark.look))
    plate = {"facecolor": "white", "edgecolor": "none", "boxstyle": "round,pad=0.25"}
    axes.text(column + width / 2, row + 0.5, label, ha="center", va="center", bbox=plate)


def _draw_head(axes: Any, row: int, column: float, old: ShardStatus, new: ShardStatus) -> None:
    """Draw the digest of a shard's served adapter. A changed one has a thick frame and both digests."""
    digests = [each.adapter_sha256 for each in (old, new)]
    label = [digest[:DIGEST_CHARS] if digest else "the base" for digest in digests]
    same = old.head == new.head
    _draw_cell(axes, row, column, label[0] if same else "\n→ ".join(label), Mark.KEPT, HEAD_CELLS)
    axes.patches[-1].set(linewidth=1 if same else 2.5, gid=f"head-{old.shard}")
    axes.texts[-1].set(family="monospace")
