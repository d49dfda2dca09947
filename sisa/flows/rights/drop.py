"""Answer the deletion lists of California's DROP: import them, submit requests, report statuses.

    sisa drop import    match the work items with the identities of held records; one request a consumer
    (approve, run)      as any request
    sisa drop report    a status for each work item that is settled

A *consumer* is a subject, or a record without one. A work item that matches one consumer becomes a
request under `delete-act` for all of the consumer's records; further work items of the same consumer
join it. One that matches several consumers deletes nobody: the broker must opt all of them out of sale
and sharing, so this status is reported only when the caller confirms that it was done.

    no consumer held                  5  not found
    one, the request completed        3  deleted
    one, the request denied           2  exempted
    several, and opted out            4  opted out

Every import matches all work items again, those of earlier downloads too, except those whose request
waits, runs or was denied: a consumer who was not found may have been added since. A status that changed
is reported as an amendment. What is removed from the lists is withdrawn: its requests are cancelled
unless they were carried out, and it no longer keeps records out.

The ledger holds DROP's ids of work items, and keyed digests in place of the hashes, which anybody can
compute from a guess.

Source: privacy.ca.gov, DROP for data brokers: "Processing DROP requests", "Integration workflow",
"Working with the data", "Reference"; California Code of Regulations, title 11, section 7613 (match,
several consumers, kept identifiers).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, timedelta
from functools import partial
from itertools import count
from pathlib import Path

from sisa.core.domain import RecordRow, WorkItem
from sisa.core.errors import ConfigConflict, EnvironmentFault, InvalidInput, Problem, Problems
from sisa.core.ledger_meta import CYCLE
from sisa.core.ports import Change, merged
from sisa.core.requests import CLOSED, DROP, Request, days_left, event, may_become, moved
from sisa.data.drop_lists import (
    CYCLE_DAYS,
    DELETED,
    DOWNLOAD_AGAIN,
    EXEMPTED,
    NOT_FOUND,
    OPTED_OUT,
    Download,
    Listed,
    day_of,
    due_day,
    is_suffix,
    list_of,
    responses,
    upload_name,
)
from sisa.flows.context.commit import commit
from sisa.flows.context.context import Context
from sisa.flows.context.slices import held_rows, ids_of
from sisa.flows.requests import NewRequest, Terms, new_request
from sisa.store.blobs import files

AMEND = "amend"  # folder of the responses that correct earlier ones
FEW_KEYS = 1000  # above, all identities are read at once


@dataclass(frozen=True)
class Imported:
    """Describe an import: counts of work items, and the requests that it made or cancelled."""

    downloaded: str
    broker: str
    new: int
    known: int  # from an earlier import of the same lists
    withdrawn: int
    matched: int  # of those that were matched, by one consumer each
    shared: int  # by several consumers
    not_found: int
    requests: tuple[str, ...]
    cancelled: tuple[str, ...]


@dataclass(frozen=True)
class Matched:
    """A work item that somebody's records match, with their ids if they were asked for."""

    item: str
    kind: str
    consumers: int
    request_id: str
    due: str
    ids: tuple[str, ...] = ()


@dataclass(frozen=True)
class Standing:
    """Describe where the 45-day cycle stands."""

    broker: str
    downloaded: str
    next_access: str
    days_left: int  # until then
    work_items: int  # on the lists now
    withdrawn: int
    open: int  # without a reported status
    overdue: int  # of these
    to_report: int  # settled, or changed since the report
    to_opt_out: int  # matched by several consumers, not reported as opted out


@dataclass(frozen=True)
class Details:
    """Hold where the cycle stands, and what waits for a decision, a run or an opt-out."""

    standing: Standing
    matched: tuple[Matched, ...]
    records_without_identity: int


@dataclass(frozen=True)
class Reported:
    """Describe a report: names of the files to upload and to amend, and work items by status."""

    directory: str
    upload: tuple[str, ...]
    amend: tuple[str, ...]
    statuses: Mapping[int, int]
    open: int  # work items that have no status yet


def import_lists(
    context: Context, download: Download, approver: str | None = None, submitter: str = ""
) -> Imported:
    """Take in a download, match work items, and submit requests, in one commit.

    The same download again changes nothing. Raise InvalidInput with every contradiction to what was
    imported before, ConfigConflict for another broker's download.
    """
    ledger = context.stores.ledger
    known = {each.item: each for each in ledger.work_items()}
    _check_known(context, download, known)
    arrived = {each.item: each for each in _arrived(context, download, known)}
    withdrawn = {each.item: each for each in _withdrawn(download, known)}
    items = known | arrived | withdrawn
    requests = {each.request_id: each for each in ledger.requests()}
    ended = _ended(items.values(), withdrawn)  # before work items that are left get other requests
    cancelled = _cancelled(ended, requests)
    requests |= {each.request_id: each for each in cancelled}
    matched = _match(context, items.values(), requests)
    asked = Terms(reason=DROP, regime="delete-act", approver=approver, submitter=submitter)
    new_requests, joined = _requests(context, matched, requests, download.day, asked)
    for item, consumers in matched.items():
        request = joined.get(item, items[item].request_id)
        items[item] = replace(items[item], num_consumers=len(consumers), request_id=request)
    own = Change(
        work_items=[each for item, each in sorted(items.items()) if each != known.get(item)],
        requests=cancelled,
        events=[event(each, context.now(), "withdrawn at DROP") for each in cancelled],
        unidentified=_lifted(context, ended, requests),
        meta=_cycle_meta(context, download),
    )
    if own.work_items or own.meta[CYCLE] != ledger.meta().get(CYCLE):
        commit(context, merged([*(each.change() for each in new_requests), own]))
    if withdrawn:
        ledger.scrub(None)  # nothing is left of the keys of those who withdrew
    sizes = Counter(min(len(each), 2) for each in matched.values())
    return Imported(
        downloaded=download.day.isoformat(),
        broker=download.broker,
        new=len(arrived),
        known=sum(map(len, download.lists.values())) - len(arrived),
        withdrawn=len(withdrawn),
        matched=sizes[1],
        shared=sizes[2],
        not_found=sizes[0],
        requests=tuple(each.request.request_id for each in new_requests),
        cancelled=tuple(each.request_id for each in cancelled),
    )


def _check_known(context: Context, download: Download, known: Mapping[str, WorkItem]) -> None:
    """Raise InvalidInput for work items that came before with another hash, or of another broker."""
    before = _cycle(context)
    if before and before["broker"] != download.broker:
        raise ConfigConflict(
            "the download is another data broker's; nothing was imported",
            expected=f"data broker {before['broker']}",
            got=f"data broker {download.broker}",
            next_step="give the download of this model's broker",
        )
    problems = Problems(1000)
    listed = {each.item for rows in download.lists.values() for each in rows}
    for file, rows in [*download.lists.items(), (download.removed_file, download.removed)]:
        for number, each in enumerate(rows, start=1):
            held, where = known.get(each.item), f"{file}.csv, row {number}"
            if held is not None and held.key not in ("", _key(context, each)):
                problems.add(where, "the ID came before with another hash or list")
            if file == download.removed_file and each.item in listed:
                problems.add(where, "the ID is on a list of the same download")
    problems.refuse("in the download; nothing was imported", DOWNLOAD_AGAIN)


def _key(context: Context, listed: Listed) -> str:
    return context.settings.assigner.identity_key(listed.list_name, listed.hash)


def _arrived(context: Context, download: Download, known: Mapping[str, WorkItem]) -> Iterable[WorkItem]:
    """Yield the work items that are new, or were withdrawn before this download's day."""
    for file, rows in download.lists.items():
        for each in rows:
            held = known.get(each.item)
            if held is None or (not held.key and day_of(held.file) < download.day):
                yield WorkItem(each.item, _key(context, each), file)


def _withdrawn(download: Download, known: Mapping[str, WorkItem]) -> Iterable[WorkItem]:
    """Yield the work items that this download removes, without their keys."""
    for each in download.removed:
        held = known.get(each.item)
        if held is None:
            yield WorkItem(each.item, "", download.removed_file)
        elif held.key and day_of(held.file) <= download.day:
            yield replace(held, key="", file=download.removed_file)


def _match(
    context: Context, items: Iterable[WorkItem], requests: Mapping[str, Request]
) -> dict[str, list[list[RecordRow]]]:
    """Return the consumers, as their held rows, whom each work item matches that may be matched."""
    free = [each for each in items if each.key and _is_free(each, requests)]
    by_key: dict[str, list[WorkItem]] = {}
    for each in free:
        by_key.setdefault(each.key, []).append(each)
    ledger = context.stores.ledger
    pairs = ledger.identities(keys=by_key) if len(by_key) <= FEW_KEYS else ledger.identities()
    pairs = [each for each in pairs if each.key in by_key]
    rows = {row.id_digest: row for row in held_rows(context, {each.id_digest for each in pairs})}
    consumers: dict[str, list[RecordRow]] = {}
    matches: dict[str, set[str]] = {each.item: set() for each in free}
    for pair in pairs:
        if (row := rows.get(pair.id_digest)) is not None:
            consumer = row.subject_digest or row.id_digest
            if consumer not in consumers:
                consumers[consumer] = _all_of(context, row)
            for each in by_key[pair.key]:
                matches[each.item].add(consumer)
    return {item: [consumers[each] for each in sorted(found)] for item, found in matches.items()}


def _is_free(item: WorkItem, requests: Mapping[str, Request]) -> bool:
    """Return whether no request stands for a work item, or one that was cancelled or completed."""
    request = requests.get(item.request_id)
    return request is None or request.state in ("cancelled", "completed")


def _all_of(context: Context, row: RecordRow) -> list[RecordRow]:
    """Return all held records of a record's consumer."""
    if row.subject_digest is None:
        return [row]
    return context.stores.ledger.by_subject(row.subject_digest, row.shard)[0]


def _requests(
    context: Context,
    matched: Mapping[str, Sequence[Sequence[RecordRow]]],
    requests: Mapping[str, Request],
    downloaded: date,
    asked: Terms,
) -> tuple[list[NewRequest], dict[str, str]]:
    """Return a new request for each consumer without an open one, and the request of each work item."""
    named = {
        frozenset(context.stores.ledger.named_by(each.request_id)): each.request_id
        for each in requests.values()
        if each.reason == DROP and each.state not in CLOSED
    }
    used = {each.external_id for each in requests.values()}
    due = (downloaded + timedelta(days=CYCLE_DAYS)).isoformat()
    new_requests, joined = [], {}
    for item, consumers in sorted(matched.items()):
        if len(consumers) != 1:
            continue
        rows = consumers[0]
        ids = frozenset(row.id_digest for row in rows)
        if ids not in named:
            name = next(each for each in _external_ids(item) if each not in used)
            new = new_request(context, rows, (), replace(asked, external_id=name))
            new_requests.append(replace(new, request=replace(new.request, due=due)))  # due may be past
            named[ids] = new.request.request_id
            used.add(name)
        joined[item] = named[ids]
    return new_requests, joined


def _external_ids(item: str) -> Iterator[str]:
    """Yield the external ids that a work item's requests may have, in their order."""
    yield f"DROP-{item}"
    yield from (f"DROP-{item}-{number}" for number in count(2))


def _ended(items: Iterable[WorkItem], withdrawn: Mapping[str, WorkItem]) -> list[str]:
    """Return the requests that stood for withdrawn work items alone."""
    wanted = {each.request_id for each in items if each.key}
    return sorted({each.request_id for each in withdrawn.values()} - wanted - {""})


def _cancelled(ended: Iterable[str], requests: Mapping[str, Request]) -> list[Request]:
    """Return requests whose work items are withdrawn, cancelled unless they were carried out."""
    held = [requests[each] for each in ended if each in requests]
    return [moved(each, "cancelled") for each in held if may_become(each, "cancelled")]


def _lifted(context: Context, ended: Iterable[str], requests: Mapping[str, Request]) -> list[str]:
    """Return the deleted records that requests kept out of the model, now that these have ended."""
    named = [
        record
        for each in ended
        if each in requests and requests[each].committed_at
        for record in context.stores.ledger.named_by(each)
    ]
    return sorted(set(named) - {row.id_digest for row in held_rows(context, named)})


def stray_identities(context: Context) -> list[str]:
    """Return the records with identities that are not held and that no such request deleted."""
    ledger = context.stores.ledger
    kept = {each.id_digest for each in ledger.identities()}
    kept -= {row.id_digest for row in held_rows(context, kept)}
    for request in ledger.requests() if kept else ():
        if request.regime == "delete-act" and request.committed_at:
            kept.difference_update(ledger.named_by(request.request_id))
    return sorted(kept)


def _cycle(context: Context) -> dict[str, str]:
    found: dict[str, str] = json.loads(context.stores.ledger.meta().get(CYCLE, "{}"))
    return found


def _cycle_meta(context: Context, download: Download) -> dict[str, str]:
    latest = max(_cycle(context).get("downloaded", ""), download.day.isoformat())
    return {CYCLE: json.dumps({"broker": download.broker, "downloaded": latest}, sort_keys=True)}


def _outcome(item: WorkItem, requests: Mapping[str, Request], *, opted_out: bool) -> int:
    """Return the status of a work item; 0 while it is not settled."""
    if not item.key:
        return 0
    if item.num_consumers > 1:
        return OPTED_OUT if opted_out else 0
    request = requests.get(item.request_id)
    if item.num_consumers == 0 and (request is None or request.state == "cancelled"):
        return NOT_FOUND
    state = request.state if request else ""
    return {"completed": DELETED, "denied": EXEMPTED}.get(state, 0)


def cycle_standing(context: Context) -> Standing | None:
    """Return where the cycle stands; None before the first import."""
    cycle = _cycle(context)
    if not cycle:
        return None
    ledger, now = context.stores.ledger, context.now()
    items = ledger.work_items()
    requests = {each.request_id: each for each in ledger.requests()}
    listed = [each for each in items if each.key]
    open_ = [each for each in listed if not each.status]
    next_access = (date.fromisoformat(cycle["downloaded"]) + timedelta(days=CYCLE_DAYS)).isoformat()
    settled = partial(_outcome, requests=requests, opted_out=False)
    return Standing(
        broker=cycle["broker"],
        downloaded=cycle["downloaded"],
        next_access=next_access,
        days_left=days_left(next_access, now),
        work_items=len(listed),
        withdrawn=len(items) - len(listed),
        open=len(open_),
        overdue=sum(due_day(each.file).isoformat() < now[:10] for each in open_),
        to_report=sum(settled(each) not in (0, each.status) for each in listed),
        to_opt_out=sum(each.num_consumers > 1 and each.status != OPTED_OUT for each in listed),
    )


def details(context: Context, *, show_ids: bool = False) -> Details | None:
    """Return where the cycle stands and what waits, with the ids of records if asked for."""
    found = cycle_standing(context)
    if found is None:
        return None
    ledger = context.stores.ledger
    requests = {each.request_id: each for each in ledger.requests()}
    waiting = [
        each
        for each in ledger.work_items()
        if each.num_consumers and not _outcome(each, requests, opted_out=each.status == OPTED_OUT)
    ]
    rows_by_item = _match(context, waiting, {}) if show_ids else {}
    matched = [
        Matched(
            item=each.item,
            kind=list_of(each.file),
            consumers=each.num_consumers,
            request_id=each.request_id if each.num_consumers == 1 else "",
            due=due_day(each.file).isoformat(),
            ids=tuple(
                ids_of(context, [row for rows in rows_by_item.get(each.item, ()) for row in rows])
            ),
        )
        for each in waiting
        if each.key
    ]
    identified = held_rows(context, {each.id_digest for each in ledger.identities()})
    return Details(found, tuple(matched), sum(ledger.counts().values()) - len(identified))


def report(
    context: Context,
    directory: Path,
    *,
    opted_out: bool = False,
    again: bool = False,
    suffix: str = "",
) -> Reported:
    """Write the responses that are due into a directory, then note in the ledger what they say.

    A list's first response has the list's name; a further one, and each amendment (in the folder
    `amend`), has a suffix of its own. With `again`, what was reported before is written once more, for
    files that were lost. If the process is killed before the ledger notes it, the same statuses are
    written again. Raise InvalidInput if a file exists already.
    """
    ledger, now = context.stores.ledger, context.now()
    requests = {each.request_id: each for each in ledger.requests()}
    items = [each for each in ledger.work_items() if each.key]
    if suffix and not is_suffix(suffix):
        raise InvalidInput("a suffix has up to 10 letters and digits", got=f"{len(suffix)} characters")
    answered = {each.file for each in items if each.status}
    moment = "".join(each for each in now[2:16] if each.isdigit())
    contents: dict[str, dict[str, int]] = {}
    changed = []
    for each in items:
        status = _outcome(each, requests, opted_out=opted_out) or each.status
        if status == 0 or (status == each.status and not again):
            continue
        name = upload_name(each.file, suffix or (moment if each.file in answered else ""))
        amends = each.status not in (0, status)
        contents.setdefault(f"{AMEND}/{name}" if amends else name, {})[each.item] = status
        if status != each.status:
            changed.append(replace(each, status=status, reported_at=now))
    _write(directory, {name: responses(statuses) for name, statuses in contents.items()})
    if changed:
        commit(context, Change(work_items=changed))
    settled = {each.item for each in changed}
    written = Counter(status for each in contents.values() for status in each.values())
    return Reported(
        directory=str(directory),
        upload=tuple(sorted(each for each in contents if "/" not in each)),
        amend=tuple(sorted(each for each in contents if "/" in each)),
        statuses=dict(sorted(written.items())),
        open=sum(not each.status for each in items if each.item not in settled),
    )


def _write(directory: Path, contents: Mapping[str, bytes]) -> None:
    problems = [Problem(name, "exists already") for name in contents if (directory / name).exists()]
    if problems:
        raise InvalidInput(
            "responses are not overwritten; nothing was reported",
            where=str(directory),
            next_step="name another directory",
            problems=problems,
        )
    if directory.exists() and not directory.is_dir():
        raise EnvironmentFault("the directory is a file", where=str(directory))
    for name, data in sorted(contents.items()):
        files.write_atomic(directory / name, data)
