"""Training orders, bands and generations under the real trainer.

A deletion whose retraining is deferred erases, and serves what another order has of the other slices.
The next command trains to the bytes of a model that never had the record, in all orders. Under a
budget fewer stages are kept, and what is served has the same bytes. With bands, appended slices or
blocks of layers, a deletion leaves the bytes of training from scratch on the remaining records.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import sisa
from sisa.core.errors import ConfigConflict
from tests.models.tiny_model import (
    PEOPLE,
    Row,
    adapters,
    command,
    held_files,
    ids_of,
    train_scratch,
    without,
    write_rows,
)

pytestmark = pytest.mark.torch

BLOCK = {"shards": 1, "slices": 3, "schedule": "sequential", "orders": 2}


def in_slice(model: sisa.Model, number: int) -> str:
    """Return a record of some slice."""
    return next(each.id for each in model.where([row["id"] for row in PEOPLE]) if each.slice == number)


def test_what_another_order_holds_serves_while_retraining_waits(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = train_scratch(tmp_path / "a", tiny_base, PEOPLE, sisa_block=BLOCK)
    assert len(adapters(model.directory)) == 5  # three of order 0, two of the other
    gone = in_slice(model, 0)  # order 0 loses everything; the other began with another slice
    done = command(capsys, "forget", "-m", model.directory, gone, "--defer", "--executor", "serial")
    assert (done.code, done.json["deferred"]) == (0, True)
    assert done.json["served"] == [{"shard": 0, "slices_served": 2, "of": 3}]
    assert done.json["serving_depth"] == pytest.approx(2 / 3)
    status = sisa.open_model(model.directory).status()
    assert [(each.depth, each.converged) for each in status.shards] == [(2, False)]
    assert sisa.open_model(model.directory).generate("Who lives here?", max_new_tokens=2).shards == (0,)
    assert command(capsys, "run", "-m", model.directory, "--executor", "serial").code == 0
    scratch = train_scratch(tmp_path / "b", tiny_base, without(PEOPLE, [gone]), sisa_block=BLOCK)
    assert held_files(model.directory) == held_files(scratch.directory)
    assert sisa.open_model(model.directory).verify(replay="all", apart=False).ok


def test_a_budget_keeps_fewer_stages_and_serves_the_same_bytes(tmp_path: Path, tiny_base: Path) -> None:
    every = train_scratch(tmp_path / "all", tiny_base, PEOPLE, sisa_block=BLOCK)
    tight = {**BLOCK, "checkpoint_budget_bytes": 1}
    least = train_scratch(tmp_path / "least", tiny_base, PEOPLE, sisa_block=tight)
    assert len(adapters(least.directory)) == 2  # where each order ends
    gone = in_slice(every, 1)
    for each in (every, least):
        each.forget([gone])
    assert least.status().model_digest == every.status().model_digest
    assert set(adapters(least.directory)) < set(adapters(every.directory))


@pytest.mark.parametrize("layerwise", [False, True])
def test_bands_generations_and_blocks_leave_what_training_from_scratch_gives(
    tmp_path: Path, tiny_base: Path, layerwise: bool
) -> None:
    bands = {"thresholds": [0.1], "classes": {"trial": 0.5}, "unknown": 0.02}
    block = {"shards": 2, "slices": 2, "orders": 2, "bands": bands, "layerwise": layerwise}
    risks = {"p001": "trial", "p004": 0.3, "p006": 0.01}
    rows: list[Row] = [{**row, "deletion_risk": risks.get(row["subject_id"])} for row in PEOPLE]
    late = [row for row in rows if row["subject_id"] in ("p004", "p009")]
    first = [row for row in rows if row not in late]
    model = train_scratch(tmp_path / "a", tiny_base, first, sisa_block=block)
    if layerwise:
        with pytest.raises(ConfigConflict, match="none are left"):
            model.add(write_rows(tmp_path / "late.jsonl", late), append=True)
    model.add(write_rows(tmp_path / "late.jsonl", late), append=not layerwise)
    where = {each.id: each for each in model.where(ids_of(rows))}
    banded = {0, 1} if layerwise else {0, 1, 2, 3}
    assert {each.slice for each in where.values()} == banded
    for row in rows:
        appended = not layerwise and row in late
        assert where[row["id"]].slice == 2 * appended + (
            risks.get(row["subject_id"], 0) in ("trial", 0.3)
        )
    model.forget(subject="p001")
    model.forget(ids_of(late[:1]))
    gone = [*late[:1], *(row for row in rows if row["subject_id"] == "p001")]
    left = without(rows, ids_of(gone))
    kept = [{**row, "generation": int(not layerwise and row in late)} for row in left]
    scratch = train_scratch(tmp_path / "b", tiny_base, kept, sisa_block=block)
    assert held_files(model.directory) == held_files(scratch.directory)
    assert model.verify(replay="all", apart=False).ok
