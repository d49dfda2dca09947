"""The driver's work grows in proportion to the model: counted in operations and rows, never in seconds.

A flow over four times as many shards and records may take little more than four times as many bytecode
instructions in this package. A transaction about one shard reads equally many rows of the ledger,
however many shards there are.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import sisa
from sisa.audit.verify import verify
from sisa.core import event_chain
from sisa.core.digest import digest_of
from sisa.core.domain import Head, HeldCheckpoint, Record, RecordRow, SliceFile
from sisa.core.errors import IntegrityError
from sisa.core.hooks import Removal
from sisa.core.ports import Change
from sisa.core.requests import Request, event
from sisa.flows.deletion import commit_removed, rows_named
from sisa.flows.ingest import add, train
from sisa.flows.locations import where
from sisa.flows.reconcile import reconcile
from sisa.flows.requests import Terms, carry_out, ready, submit, views
from sisa.store.ledger import rows
from sisa.store.ledger.ledger import SqlLedger
from tests.fakes.ledger import FakeLedger
from tests.fakes.ports import FakeModel, fake_model, fake_record

PACKAGE = str(Path(sisa.__file__).parent)
FEWER, TIMES = 20, 4
PER_SHARD = 6


def operations(work: Callable[[], object]) -> int:
    """Count bytecode instructions that this package executes, without those of the fakes."""
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
    train(model.context, records(num_shards))
    return model


def requests(model: FakeModel) -> list[Request]:
    """Return one approved request for a record of each shard."""
    chosen: dict[int, RecordRow] = {}
    for shard in range(model.context.settings.assigner.layout.num_shards):
        chosen.update({row.shard: row for row in model.ledger.rows(shard)[:1]})
    terms = Terms(approver="dpo")
    return [submit(model.context, [row], (), terms) for row in chosen.values()]


def first_training(num_shards: int) -> Callable[[], object]:
    model = fake_model(num_shards)
    return lambda: train(model.context, records(num_shards))


def addition(num_shards: int) -> Callable[[], object]:
    model = trained(num_shards)
    return lambda: add(model.context, records(num_shards, start=num_shards * PER_SHARD))


def batch(num_shards: int) -> Callable[[], object]:
    model = trained(num_shards)
    approved = requests(model)
    return lambda: carry_out(model.context, approved)


def look_at_what_waits(num_shards: int) -> Callable[[], object]:
    model = trained(num_shards)
    requests(model)
    return lambda: ready(model.context)


@pytest.mark.parametrize("flow", [first_training, addition, batch, look_at_what_waits])
def test_work_grows_in_step_with_shards_and_records(flow: Callable[[int], Callable[[], object]]) -> None:
    fewer, more = (operations(flow(num)) for num in (FEWER, FEWER * TIMES))
    assert more < fewer * TIMES * 1.25


def counted(patch: pytest.MonkeyPatch, target: object, *names: str) -> list[str]:
    """Record calls of some functions of an object or a module."""
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
    assert len(ready(model.context)) > 10
    assert len(calls) == 1


def test_a_reconciliation_does_not_ask_for_each_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for num_shards in (20, 80):
        model = trained(num_shards)
        asked = counted(monkeypatch, model.ledger, "slices", "checkpoints")
        reconcile(model.context)
        calls.append(len(asked))
    assert calls[0] == calls[1] > 0


def checkpoint(shard: int, slice_: int) -> HeldCheckpoint:
    return HeldCheckpoint(
        digest_of([shard, slice_]), shard, tuple(range(slice_ + 1)), 1, "f", "m", "a", 1, 0.5, 1
    )


def ledger_of(path: Path, num_shards: int) -> SqlLedger:
    """Return a trained model's ledger, without the last stage of shard 0."""
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
    totals = []
    for num_shards in (5, 200):
        ledger = ledger_of(tmp_path / f"{num_shards}.db", num_shards)
        stage = checkpoint(0, 2)
        with counting_rows(monkeypatch) as read:
            ledger.commit(Change(checkpoints=[stage], heads=[Head(0, stage.key, 3, stage.key)]))
        totals.append(sum(read))
        assert len(ledger.checkpoints(0)) == 3
        assert ledger.lost() == []
        ledger.close()
    assert totals[0] == totals[1] > 0


@contextlib.contextmanager
def counting_rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Record how many rows of any table are read, query by query."""
    read: list[int] = []
    checked = rows.checked_rows

    def counting(table: Any, found: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        read.append(len(found))
        return checked(table, found)

    with monkeypatch.context() as patch:
        patch.setattr(rows, "checked_rows", counting)
        yield read


def digest(what: str, number: int) -> str:
    return digest_of([what, number])


def record_row(number: int) -> RecordRow:
    id_digest, subject, record, text = (
        digest(what, number) for what in ("id", "subject", "record", "text")
    )
    return RecordRow(id_digest, subject, record, text, "text", number % 4, 0, number, 1)


ABSENT: dict[str, Callable[[SqlLedger, int], object]] = {
    "id": lambda ledger, n: ledger.lookup([digest("id", n)]),
    "subject": lambda ledger, n: ledger.by_subject(digest("subject", n), 0)[0],
    "text": lambda ledger, n: ledger.by_text([digest("text", n)], full_scan=True)[0],
}


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("many") / "ledger.db"
    with contextlib.closing(SqlLedger(path, create=True)) as ledger:
        ledger.commit(Change(added=[record_row(number) for number in range(12_000)]))
    return path


@pytest.mark.parametrize("name", ABSENT)
def test_a_few_rows_show_absence(many: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with contextlib.closing(SqlLedger(many)) as ledger:
        for number in range(12_000, 12_020):
            with counting_rows(monkeypatch) as read:
                assert not ABSENT[name](ledger, number)
            assert sum(read) < 40, "a bucket holds three of 12,000 rows on the mean"


def test_what_another_version_wrote_is_looked_through_and_counted_anew(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An earlier version does not update the counts that prove absence."""
    path = Path(shutil.copy(many, tmp_path))
    with contextlib.closing(SqlLedger(path)) as ledger:

        def rows_read(number: int, *, held: bool) -> int:
            with counting_rows(monkeypatch) as read:
                assert bool(ledger.lookup([digest("id", number)])) == held
            return sum(read)

        with monkeypatch.context() as patch:
            patch.setattr(rows.Writing, "write_keyed_counts", lambda *_: None)
            ledger.commit(Change(added=[record_row(20_000)], removed=[record_row(7)]))
        assert rows_read(7, held=False) > 12_000
        assert rows_read(20_000, held=True) < 40
        ledger.commit(Change(added=[record_row(20_001)], removed=[record_row(8)]))
        assert rows_read(20_001, held=True) < 40
        for absent in (7, 8, 20_002):
            assert rows_read(absent, held=False) < 40
        assert ledger.lost() == []


def test_where_reads_what_records_touched_once_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(3)
    ids = [each.id for each in records(3)]
    calls = []
    for asked in (ids[:6], ids):
        found = counted(monkeypatch, model.ledger, "heads", "checkpoints", "exports", "slices")
        assert {place.state for place in where(model.context, asked)} == {"trained"}
        calls.append(len(found))
    assert calls[0] == calls[1] > 0


def past(ledger: FakeLedger, num_requests: int) -> None:
    """Add requests that are over, with their history."""
    for number in range(num_requests):
        request = Request(f"past-{number}", "2026-01-01", "2026-02-01", 1)
        states = [replace(request, state=state) for state in ("received", "approved", "completed")]
        ledger.commit(Change(requests=states[-1:], events=[event(each, "2026") for each in states]))


def test_the_history_of_all_requests_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(2)
    past(model.ledger, 50)
    calls = counted(monkeypatch, model.ledger, "events", "requests")
    found = views(model.context)
    assert sorted(calls) == ["events", "requests"]
    assert [len(view.events) for view in found] == [3] * 50


def test_a_writer_does_not_hash_the_whole_history_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(2)
    past(model.ledger, 200)
    reconcile(model.context)
    past(model.ledger, 10)
    hashed = counted(monkeypatch, event_chain, "chained")
    reconcile(model.context)
    assert len(hashed) == 30
    model.ledger.tables.events[-2] = replace(model.ledger.tables.events[-2], note="changed")
    with pytest.raises(IntegrityError, match="contradicts"):
        reconcile(model.context)


def test_verify_hashes_the_whole_history() -> None:
    model = trained(2)
    past(model.ledger, 200)
    reconcile(model.context)
    model.ledger.tables.events[3] = replace(model.ledger.tables.events[3], note="changed")
    reconcile(model.context)
    found = verify(model.context, [], None)
    assert [each.where for each in found.findings] == ["ledger"]


def test_a_deletion_looks_for_its_own_rows_and_one_cut_short_for_any(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rewriting a ledger takes time in proportion to its size."""
    model = trained(2)
    looked_for: list[Any] = []
    monkeypatch.setattr(model.ledger, "scrub", lambda removed=(): looked_for.append(removed))
    first, second = requests(model)
    gone = rows_named(model.context, first)
    carry_out(model.context, [first])
    assert [each for each in looked_for if each != ()] == [gone]
    named = {second.request_id: rows_named(model.context, second)}
    commit_removed(model.context, Removal([second], named), Change())
    looked_for.clear()
    reconcile(model.context)
    assert looked_for == [None, ()]
