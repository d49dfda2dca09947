"""What the driver does grows in step with the model: counted in operations and rows, never in seconds.

A flow over four times as many shards and records may take little more than four times as many bytecode
instructions in this package; a transaction about one shard reads as many rows of the ledger, however
many shards there are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import sisa
from sisa import lifecycle
from sisa.deletion import forget
from sisa.digest import digest_of
from sisa.domain import Head, HeldCheckpoint, Record, RecordRow, Request, SliceFile, SliceState
from sisa.lifecycle import Terms
from sisa.plan import jobs
from sisa.ports import Change
from sisa.reconcile import reconcile
from sisa.run import add, train
from sisa.store import rows
from sisa.store.ledger import SqlLedger
from tests.fakes import FakeModel, fake_model, fake_recipe, fake_record

PACKAGE = str(Path(sisa.__file__).parent)
FEWER, TIMES = 20, 4
PER_SHARD = 6


def operations(work: Callable[[], object]) -> int:
    """Bytecode instructions that this package executes; those of the fakes are not counted."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if event == "call" and not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def records(num_shards: int, start: int = 0) -> list[Record]:
    return [fake_record(start + number) for number in range(num_shards * PER_SHARD)]


def trained(num_shards: int) -> FakeModel:
    model = fake_model(num_shards)
    train(model.world, records(num_shards))
    return model


def requests(model: FakeModel) -> list[Request]:
    """One approved request for a record of each shard."""
    chosen: dict[int, RecordRow] = {}
    for shard in range(model.world.assigner.layout.num_shards):
        chosen.update({row.shard: row for row in model.ledger.rows(shard)[:1]})
    terms = Terms(approver="dpo")
    return [lifecycle.submit(model.world, [row], (), terms) for row in chosen.values()]


def first_training(num_shards: int) -> Callable[[], object]:
    model = fake_model(num_shards)
    return lambda: train(model.world, records(num_shards))


def addition(num_shards: int) -> Callable[[], object]:
    model = trained(num_shards)
    return lambda: add(model.world, records(num_shards, start=num_shards * PER_SHARD))


def batch(num_shards: int) -> Callable[[], object]:
    model = trained(num_shards)
    approved = requests(model)
    return lambda: forget(model.world, approved)


def look_at_what_waits(num_shards: int) -> Callable[[], object]:
    model = trained(num_shards)
    requests(model)
    return lambda: lifecycle.approved(model.world)


@pytest.mark.parametrize("flow", [first_training, addition, batch, look_at_what_waits])
def test_work_grows_in_step_with_shards_and_records(flow: Callable[[int], Callable[[], object]]) -> None:
    fewer, more = (operations(flow(num)) for num in (FEWER, FEWER * TIMES))
    assert more < fewer * TIMES * 1.25


def counted(patch: pytest.MonkeyPatch, target: object, *names: str) -> list[str]:
    """Calls of some functions of an object or a module, as they come."""
    calls: list[str] = []

    def call(name: str, inner: Callable[..., Any], *given: Any) -> Any:
        calls.append(name)
        return inner(*given)

    for name in names:
        patch.setattr(target, name, partial(call, name, getattr(target, name)))
    return calls


def test_what_waits_is_read_once_however_much_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(12)
    requests(model)
    calls = counted(monkeypatch, model.ledger, "requests")
    assert len(lifecycle.approved(model.world)) > 10
    assert len(calls) == 1


def test_a_reconciliation_does_not_ask_for_each_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for num_shards in (20, 80):
        model = trained(num_shards)
        asked = counted(monkeypatch, model.ledger, "slices", "checkpoints")
        reconcile(model.world)
        calls.append(len(asked))
    assert calls[0] == calls[1] > 0


def checkpoint(shard: int, slice_: int) -> HeldCheckpoint:
    return HeldCheckpoint(
        digest_of([shard, slice_]), shard, tuple(range(slice_ + 1)), 1, "f", "m", "a", 1, 0.5, 1
    )


def ledger_of(path: Path, num_shards: int) -> SqlLedger:
    """A trained model's ledger, but for the last stage of shard 0."""
    ledger = SqlLedger(path, create=True)
    places = [(shard, slice_) for shard in range(num_shards) for slice_ in range(3)]
    ledger.commit(
        Change(
            slices=[SliceFile(*place, "root", 1, "sha", 1) for place in places],
            heads=[Head(shard, None, 0, "target") for shard in range(num_shards)],
            checkpoints=[checkpoint(*place) for place in places if place != (0, 2)],
        )
    )
    return ledger


def test_a_finished_stage_costs_the_ledger_the_same_in_a_large_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    checked = rows.checked

    def counting(table: Any, found: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        read.append(len(found))
        return checked(table, found)

    monkeypatch.setattr(rows, "checked", counting)
    totals = []
    for num_shards in (5, 200):
        ledger = ledger_of(tmp_path / f"{num_shards}.db", num_shards)
        read.clear()
        stage = checkpoint(0, 2)
        ledger.commit(Change(checkpoints=[stage], heads=[Head(0, stage.key, 3, stage.key)]))
        totals.append(sum(read))
        assert len(ledger.checkpoints(0)) == 3
        assert ledger.lost() == []
        ledger.close()
    assert totals[0] == totals[1] > 0


def test_a_jobs_key_is_the_digest_of_its_fields() -> None:
    """However the key is computed, models that were trained before must find their checkpoints."""
    states = [SliceState(1, slice_, f"root-{slice_}", 3) for slice_ in range(3)]
    recipe = replace(fake_recipe(), training={"a": [1, {"b": None}], "c": 0.1})
    for job in jobs(1, states, recipe, "f"):
        assert job.key == digest_of(asdict(job))
