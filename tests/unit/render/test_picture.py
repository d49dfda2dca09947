"""The picture of a model: which cells are marked, readable without colour."""

from __future__ import annotations

import io
from typing import Any

import pytest

from cluster.render.picture import Mark, cell_marks, draw_layout
from sisa.core.errors import InvalidInput
from sisa.flows.status import ShardStatus, Status


def shard(number: int, head: str | None, *counts: int, converged: bool = True) -> ShardStatus:
    return ShardStatus(
        shard=number,
        head=head,
        depth=len(counts) if head else 0,
        num_slices=len(counts),
        records=sum(counts),
        slice_records=counts,
        converged=converged,
        adapter_path=None,
        adapter_sha256=head and f"{head}0123456789abcdef",
    )


def status(*shards: ShardStatus) -> Status:
    records = sum(each.records for each in shards)
    return Status("model", records, 0, "digest", "base", "b", "hashing", "cumulative", shards, (), {})


BEFORE = status(shard(0, "aa", 5, 10, 15), shard(1, "bb", 5, 5, 5))
AFTER = status(shard(0, "cc", 5, 7, 15), shard(1, "bb", 5, 5, 5))


def marks_of(old: ShardStatus, new: ShardStatus) -> list[Mark]:
    found = cell_marks(status(old), status(new))
    return [found[old.shard, slice_] for slice_ in range(old.num_slices)]


def patches(figure: Any) -> dict[str, Any]:
    return {each.get_gid(): each for each in figure.axes[0].patches}


def test_a_deletion_marks_its_slice_and_those_after_it() -> None:
    assert cell_marks(BEFORE, AFTER) == {
        (0, 0): Mark.KEPT,
        (0, 1): Mark.DELETED,
        (0, 2): Mark.RETRAINED,
        (1, 0): Mark.KEPT,
        (1, 1): Mark.KEPT,
        (1, 2): Mark.KEPT,
    }


def test_nothing_changed_nothing_marked() -> None:
    assert set(cell_marks(BEFORE, BEFORE).values()) == {Mark.KEPT}


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (shard(0, None, 0, 0, 0), [Mark.DELETED, Mark.KEPT, Mark.DELETED]),
        (shard(0, "cc", 0, 0, 4), [Mark.DELETED, Mark.KEPT, Mark.RETRAINED]),
        (shard(0, "cc", 3, 0, 3), [Mark.KEPT, Mark.KEPT, Mark.DELETED]),
        (shard(0, "cc", 2, 0, 3), [Mark.DELETED, Mark.KEPT, Mark.DELETED]),
        (shard(0, "cc", 3, 1, 4), [Mark.KEPT, Mark.RETRAINED, Mark.RETRAINED]),
        (shard(0, "cc", 3, 0, 4), [Mark.RETRAINED, Mark.KEPT, Mark.RETRAINED]),
        (shard(0, None, 1, 0, 4, converged=False), [Mark.DELETED, Mark.KEPT, Mark.WAITING]),
    ],
    ids=["all gone", "emptied", "last slice", "two slices", "added", "other run file", "cut short"],
)
def test_histories_of_a_shard_with_an_empty_slice(after: ShardStatus, expected: list[Mark]) -> None:
    assert marks_of(shard(0, "aa", 3, 0, 4), after) == expected


def test_other_shards_are_refused() -> None:
    with pytest.raises(InvalidInput, match="different shards"):
        draw_layout(BEFORE, status(shard(0, "aa", 5, 10, 15)))


def test_appended_slices_are_drawn_beside_those_that_were_there() -> None:
    after = status(shard(0, "cc", 5, 10, 15, 3, 0), shard(1, "bb", 5, 4, 5, 0, 2, converged=False))
    marks = [[cell_marks(BEFORE, after)[row, slice_] for slice_ in range(5)] for row in (0, 1)]
    kept = [Mark.KEPT] * 3
    assert marks[0] == [*kept, Mark.APPENDED, Mark.KEPT]
    assert marks[1] == [Mark.KEPT, Mark.DELETED, Mark.WAITING, Mark.KEPT, Mark.WAITING]
    figure = draw_layout(BEFORE, after)
    assert {"cell-0-3", "cell-1-4"} <= patches(figure).keys()
    assert {"0 → 3", "0 → 2"} <= {each.get_text() for each in figure.axes[0].texts}
    assert cell_marks(after, BEFORE)[0, 3] is Mark.DELETED  # and the other way round


def test_the_drawing_shows_marks_by_hatching_and_in_words() -> None:
    figure = draw_layout(BEFORE, AFTER, title="One deletion")
    drawn = patches(figure)
    hatches = {gid: patch.get_hatch() for gid, patch in drawn.items() if patch.get_hatch()}
    assert hatches == {"cell-0-1": Mark.DELETED.look["hatch"], "cell-0-2": Mark.RETRAINED.look["hatch"]}
    assert len({mark.look["hatch"] for mark in Mark}) == len(Mark)
    assert drawn["head-0"].get_linewidth() > drawn["head-1"].get_linewidth()
    texts = [each.get_text() for each in figure.axes[0].texts]
    assert texts == ["5", "10 → 7", "15", "aa012345\n→ cc012345", "5", "5", "5", "bb012345"]
    (legend,) = figure.legends
    assert [each.get_text() for each in legend.get_texts()] == [
        mark.label for mark in (Mark.KEPT, Mark.DELETED, Mark.RETRAINED)
    ]
    assert figure.axes[0].get_title() == "One deletion"


def test_one_state_is_drawn_without_marks_or_legend() -> None:
    figure = draw_layout(status(shard(0, None, 0, 0), shard(1, "bb", 4, 2)))
    assert not figure.legends
    assert not any(patch.get_hatch() for patch in patches(figure).values())
    assert "the base" in [each.get_text() for each in figure.axes[0].texts]


def test_it_can_be_saved_without_a_screen() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    made = io.BytesIO()
    FigureCanvasAgg(draw_layout(BEFORE, AFTER, title="x")).print_png(made)
    assert made.getvalue().startswith(b"\x89PNG")
