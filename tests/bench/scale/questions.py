"""CPU seconds of questions to a large ledger, each answered in two ways in one run, as JSON.

    python -m tests.bench.scale.questions --out tests/bench/scale/questions.json

The largest ledger is asked in two ways, the present one and the one before:

    absence    that an id, a subject or a text is not held: by the rows of its bucket, and by a look at
               every row, as a ledger is looked through that an earlier version wrote to last
    where      what many records touched: read once, and once for each record
    requests   the history of all requests: read once, and once for each request
    checking   what a writing command compares before it begins: since the last event that was checked,
               and from the beginning
    deletions  what `forget --dry-run` plans for many ids, and a deletion that puts its training off:
               from the contents of slices, looking for what was removed, and from whole rows, writing
               the ledger anew

Ledgers of all sizes are compared: records loaded a second, in one commit as by a first training and in
several; the median time to commit a training's stage, and of questions that should take as long in each.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np

from sisa.config.config import RunConfig, SisaBlock
from sisa.core.digest import Keyed, digest_of
from sisa.core.domain import Head, HeldCheckpoint, IndexFile, Part, Record, RecordRow, SliceFile
from sisa.core.errors import UnknownRecord
from sisa.core.event_chain import EventChain, contradicted
from sisa.core.ports import Change, StoredRecord
from sisa.core.requests import Request, event
from sisa.flows.context.commit import commit
from sisa.flows.context.context import Context
from sisa.flows.deletion import plan_forget
from sisa.flows.locations import lookup, of_digest, where
from sisa.flows.requests import Terms, forget_at_once, new_request, view_of, views
from sisa.flows.wiring.resources import Named
from sisa.model import Model
from sisa.planning.layout import index_root, root_of, slice_root
from sisa.store.blobs.local_blobs import LocalBlobs
from sisa.store.ledger import rows
from sisa.store.ledger.ledger import SqlLedger
from sisa.store.ledger.sqlite import Sqlite
from sisa.store.ledger.tables import EVENTS_TABLE, REQUESTS_TABLE
from tests.bench.command import arguments, markdown, write
from tests.fakes.ports import SECRET, changed, fake_model, fake_recipe

NUM_SHARDS, NUM_SLICES, PER_COMMIT, NUM_IDS, ROUNDS = 64, 4, 50_000, 1_000, 5
AREAS = ("records", "index", "checkpoints", "log")
Former = Callable[[], AbstractContextManager[None]]
CHAIN = EventChain(Keyed(SECRET))
STATES = ("received", "approved", "committed", "rolled_back", "erased", "retrained", "completed")


def row(keyed: Keyed, number: int) -> RecordRow:
    name = keyed.digest("id", f"r{number}")
    who, what, text = (keyed.digest(purpose, f"{number}") for purpose in ("subject", "record", "text"))
    place = number % NUM_SHARDS, number // NUM_SHARDS % NUM_SLICES
    return RecordRow(name, who, what, text, "text", *place, int(name[:16], 16) >> 1, 1)


def load(ledger: SqlLedger, num_records: int, per_commit: int) -> float:
    """Add records to a ledger; return how many are added in a CPU second of its commits."""
    keyed, loading_s = Keyed(SECRET), 0.0
    for start in range(0, num_records, per_commit):
        several = range(start, min(num_records, start + per_commit))
        added = [row(keyed, number) for number in several]
        loading_s += took(partial(ledger.commit, Change(added=added)))
    return num_records / loading_s


def filled(ledger: SqlLedger, num_records: int, num_requests: int) -> float:
    """Write a ledger; return how many records are added in a CPU second, in one commit."""
    rate = load(ledger, num_records, num_records)
    places = [(shard, slice_) for shard in range(NUM_SHARDS) for slice_ in range(NUM_SLICES)]
    indexes = [IndexFile(shard, "root", 0, "sha", 1) for shard in range(NUM_SHARDS)]
    made = [
        HeldCheckpoint(
            digest_of(place), place[0], tuple(range(place[1] + 1)), 10**6, "f", "m", "a", 1, 0.5, 1
        )
        for place in places
    ]
    tops = {each.shard: each.key for each in made}
    ledger.commit(
        Change(
            slices=[slice_file(ledger, *place) for place in places],
            indexes=indexes,
            heads=[Head(shard, key, NUM_SLICES, key) for shard, key in tops.items()],
            checkpoints=made,
        )
    )
    fill_past(ledger, num_requests)
    return rate


def slice_file(ledger: SqlLedger, shard: int, slice_: int) -> SliceFile:
    with ledger._reading() as connection:
        held = rows.contents(connection, shard, slice_)
    return SliceFile(shard, slice_, root_of(held), len(held), "sha", 1)


def fill_past(ledger: SqlLedger, num_requests: int) -> None:
    """Write finished requests with their events, in one transaction."""
    link, now = "", "2026-01-01T00:00:00+00:00"
    events: list[dict[str, Any]] = []
    requests: list[dict[str, Any]] = []
    for number in range(num_requests):
        request = Request(f"req-{number:08d}", "2026-01-01", "2026-02-01", 1, reason="a person asked")
        for state in STATES:
            request = replace(request, state=state, committed_at=now)  # type: ignore[arg-type]
            (entered,) = CHAIN.linked(link, [event(request, now)])
            link = entered.link
            events.append({**asdict(entered), "position": len(events) + 1})
        body = json.dumps(asdict(request), sort_keys=True)
        requests.append({"request_id": request.request_id, "seq": 1, "num_named": 0, "body": body})
    with ledger.backend.engine.connect() as connection:
        writing = rows.Writing(connection)
        writing.insert(EVENTS_TABLE, events)
        writing.insert(REQUESTS_TABLE, requests)
        writing.write_counts()
        connection.commit()


def make_deletable(ledger: SqlLedger, context: Context, shard: int) -> list[RecordRow]:
    """Give a shard the files that a deletion reads, in the fakes; return its rows."""
    held = ledger.rows(shard)
    record = Record("a record", None, "text", (Part("text", "a text"),))
    files = []
    for slice_ in range(NUM_SLICES):
        here = [row for row in held if row.slice == slice_]
        stored = [StoredRecord(row.id_digest, record) for row in here]
        files.append(context.stores.records.write(shard, slice_, slice_root(here), stored))
    vectors = {row.vector_id: np.zeros((1, 1), np.float32) for row in held}
    index = context.stores.index.build(shard, index_root(held), None, vectors)
    ledger.commit(Change(slices=files, indexes=[index]))
    return held


@contextlib.contextmanager
def before() -> Iterator[None]:
    """Look at every row, as where the counts are not kept up."""
    with patch.object(rows, "counts_keyed", lambda _: False):
        yield


@contextlib.contextmanager
def rewriting() -> Iterator[None]:
    """Plan deletions from whole rows, and write the ledger anew after each."""

    def contents(ledger: SqlLedger, shard: int, slice_: int) -> list[tuple[str, str]]:
        return [(each.id_digest, each.record_digest) for each in ledger.rows(shard, slice_)]

    with (
        patch.object(SqlLedger, "contents", contents),
        patch.object(Sqlite, "holds", lambda _, removed, *__: len(removed) > 0),
    ):
        yield


def took(question: Callable[[], object]) -> float:
    """Return the CPU seconds that a question takes."""
    began = time.process_time()
    question()
    return time.process_time() - began


def compared(now: Callable[[], object], then: Callable[[], object]) -> dict[str, float]:
    """Return the CPU seconds of the present way to answer a question and of the one before."""
    now()  # pages that were never read are no part of the question
    cpu_s, before_s = took(now), took(then)
    return {"cpu_s": cpu_s, "before_cpu_s": before_s, "before_over_now": before_s / cpu_s}


def measured(ledger: SqlLedger, context: Context, num_records: int) -> dict[str, Any]:
    """Return the CPU seconds of each question to a large ledger, and those of the way before."""
    assigner = context.settings.assigner
    absent = [assigner.id_digest(f"absent {n}") for n in range(NUM_IDS)]
    step = (num_records // NUM_IDS - 1) | 1  # odd, so that all shards have some
    held = [f"r{n}" for n in range(0, num_records, step)][:NUM_IDS]

    def both_ways(what: Callable[[], object], former: Former = before) -> dict[str, float]:
        def then() -> None:
            with former():
                what()

        return compared(what, then)

    events = ledger.events()
    known = [each for each in lookup(context, held) if isinstance(each, RecordRow)]
    doomed = iter(make_deletable(ledger, context, NUM_SHARDS - 1))
    terms = Terms(approver="bench", reason="measured")

    def delete() -> None:
        arrival = new_request(context, [next(doomed)], (), terms)
        forget_at_once(context, arrival, defer=True)

    return {
        "absent_id": both_ways(lambda: ledger.lookup(absent[:1])),
        "absent_ids_1000": both_ways(lambda: ledger.lookup(absent)),
        "absent_subject": both_ways(lambda: ledger.by_subject(assigner.subject_digest("nobody"), 0)),
        "absent_text_surely": both_ways(
            lambda: ledger.by_text([assigner.subject_digest("x")], full_scan=True)
        ),
        "where_1000_ids": compared(
            lambda: where(context, held),
            lambda: [where(context, [each]) for each in held],
        ),
        "request_list": {
            **compared(
                lambda: views(context),
                lambda: [view_of(context, each) for each in ledger.requests()[:20]],
            ),
            "before_of_requests": 20,
        },
        "checking": compared(
            lambda: contradicted(
                ledger.requests(), ledger.events(len(events) - 7), CHAIN, events[-8].link
            ),
            lambda: contradicted(ledger.requests(), ledger.events(), CHAIN),
        ),
        "dry_run_1000_ids": both_ways(lambda: plan_forget(context, known), rewriting),
        "deletion_of_one_deferred": both_ways(delete, rewriting),
    }


class OpenModel(Model):
    """A model whose context is given, to be asked as a command asks it."""

    def __init__(self, context: Context, folder: Path) -> None:
        self.directory, self._given, self._group = folder, context, None
        self.config = RunConfig.model_construct(sisa=SisaBlock())
        self.base = self.embedder = Named("name", "digest")

    def _seq(self) -> int:
        return self._given.stores.ledger.seq()

    @contextlib.contextmanager
    def context(self, **_: bool) -> Iterator[Context]:
        yield self._given


def small_questions(ledger: SqlLedger, folder: Path) -> dict[str, Callable[[], object]]:
    """Return what should not take longer where more records are held."""
    areas = {area: LocalBlobs(folder / area) for area in AREAS}
    empty = fake_model(NUM_SHARDS, fake_recipe(NUM_SLICES)).context
    context = changed(empty, ledger=ledger, blobs=areas)
    model, seq = OpenModel(context, folder), count(10**6)
    subject = row(Keyed(SECRET), 7).subject_digest or ""

    def stage() -> None:
        shard = next(seq) % NUM_SHARDS
        (head,) = (each for each in ledger.heads() if each.shard == shard)
        made = HeldCheckpoint(digest_of([next(seq)]), shard, (0,), 10**6, "f", "m", "a", 1, 0.5, 1)
        commit(context, Change(checkpoints=[made], heads=[head]))

    def where_absent() -> None:
        with contextlib.suppress(UnknownRecord):
            model.where(["absent"])

    return {
        "stage_commit_s": stage,
        "status_s": model.status,
        "where_absent_s": where_absent,
        "of_subject_s": lambda: of_digest(context, subject),
        "request_list_s": model.requests,
    }


def grown(ledger: SqlLedger, folder: Path) -> dict[str, float]:
    """Return the median CPU seconds of small questions."""
    found = {}
    for name, question in small_questions(ledger, folder).items():
        question()  # pages that were never read are no part of it
        found[name] = median(took(question) for _ in range(ROUNDS))
    return found


def table(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield what questions to a large ledger cost, against the way before in the same run."""
    titles = {
        "absent_id": "an id that is not held",
        "absent_ids_1000": "1,000 of them",
        "absent_subject": "a subject that is not held",
        "absent_text_surely": "a text that is not held",
        "where_1000_ids": "`where` of 1,000 ids",
        "checking": "what a writing command compares of the requests' history",
        "dry_run_1000_ids": "`forget --dry-run` of 1,000 ids, in all slices",
        "deletion_of_one_deferred": "a deletion of one record, its training put off, files not counted",
    }
    lines = [
        (title, f"{found[name]['cpu_s']:.3f}", f"{found[name]['before_cpu_s']:.2f}")
        for name, title in titles.items()
    ]
    yield from markdown(("question", "CPU seconds", "the way before"), lines)


def growth_table(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield what does not take longer where a ledger holds more records."""
    sizes = found["growth"]
    titles = {
        "stage_commit_s": "the commit of a stage, in a first training",
        "status_s": "`status`",
        "where_absent_s": "`where` of an id that is not held",
        "of_subject_s": "the records of a subject, as `find --subject` looks them up",
        "request_list_s": "`request list`",
    }
    lines = [(title, *(f"{its[name]:.3f}" for its in sizes.values())) for name, title in titles.items()]
    loads = {
        "records_per_s": "records added a second, in one commit, as by a first training",
        "records_per_s_in_parts": "the same, in commits of 50,000",
    }
    lines += [(title, *(f"{its[name]:,.0f}" for its in sizes.values())) for name, title in loads.items()]
    yield from markdown(("CPU seconds", *(f"{int(size):,} records" for size in sizes)), lines)


def main() -> None:
    sizes = {"type": int, "nargs": "+", "default": [10_000, 100_000, 1_000_000]}
    given = arguments(__doc__, sizes=sizes, requests=10_000)
    growth: dict[str, Any] = {}
    largest = max(given.sizes)
    found: dict[str, Any] = {"records": largest, "requests": given.requests}
    for records in sorted(given.sizes):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            with contextlib.closing(SqlLedger(folder / "parts.db", create=True)) as ledger:
                rates = {"records_per_s_in_parts": load(ledger, records, PER_COMMIT)}
            path = folder / "ledger.db"
            with contextlib.closing(SqlLedger(path, create=True)) as ledger:
                rates["records_per_s"] = filled(ledger, records, given.requests)
                growth[str(records)] = {**rates, **grown(ledger, folder)}
                print(records, growth[str(records)], flush=True)
                if records == largest:
                    context = fake_model(NUM_SHARDS, fake_recipe(NUM_SLICES)).context
                    asked = measured(ledger, changed(context, ledger=ledger), records)
            found["ledger_bytes"] = path.stat().st_size
    found |= {**asked, "growth": growth}
    print(json.dumps(found, indent=2))
    write(given.out, found)


if __name__ == "__main__":
    main()
