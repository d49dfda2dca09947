"""Publish which adapters deletions revoked, so that holders of copies learn what must go.

    certificates in the log, drafts of those that are pending  ->  a signed feed beside the log

`sisa/verifier/feed.py` checks a feed. All of it follows from log, drafts and ledger, so nothing else is
kept. Its number is that of the log's entries, with those that deletions under way will add. An adapter
that was made again to the same bytes, since the same records were given again, is reinstated.

>>> revoked = {"aa": {"certificate": "c1", "date": "2026-11-01"}, "bb": {"certificate": "", "date": ""}}
>>> now = datetime(2026, 11, 2)
>>> feed = feed_statement("0f", Checkpoint("log", 4, bytes(32)), 1, revoked, {"aa"}, now)["predicate"]
>>> feed["sequence"], list(feed["revoked"]), feed["reinstated"], feed["next_update"]
(5, ['bb'], ['aa'], '2026-11-09T00:00:00Z')
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from sisa.evidence.log.log import origin, statement_in
from sisa.evidence.open_evidence import OpenEvidence, open_evidence
from sisa.evidence.statements import statement
from sisa.model import Model
from sisa.store.areas import LOG
from sisa.store.blobs.files import write_atomic
from sisa.verifier.certificate import REVOCATIONS
from sisa.verifier.feed import TIME_FORMAT
from sisa.verifier.note import Checkpoint

FEED = "revocations.json"  # beside the log
VALID_DAYS = 7

Revoked = dict[str, dict[str, str]]  # certificate and date by adapter


@dataclass(frozen=True)
class PublishedFeed:
    """Where a feed was published, its number and times, and how many adapters it names."""

    feed: str
    sequence: int
    published: str
    next_update: str
    revoked: int
    pending: int  # of these, by deletions whose certificates are not issued yet
    reinstated: int


def publish(model: Model, to: Path | None = None, days: int = VALID_DAYS) -> PublishedFeed:
    """Sign a feed and write it to a file, by default beside the log. Raise InvalidInput without keys."""
    with open_evidence(model) as evidence:
        feed, beside = feed_of(evidence, days), evidence.context.stores.blobs[LOG]
        envelope = evidence.keys.sign(feed)
        if to is None:
            beside.put(FEED, envelope)
        else:
            write_atomic(to, envelope, mode=0o644)
    predicate = feed["predicate"]
    return PublishedFeed(
        feed=str(to or beside.location(FEED)),
        sequence=predicate["sequence"],
        published=predicate["published"],
        next_update=predicate["next_update"],
        revoked=len(predicate["revoked"]),
        pending=sum(not each["certificate"] for each in predicate["revoked"].values()),
        reinstated=len(predicate["reinstated"]),
    )


def feed_of(evidence: OpenEvidence, days: int = VALID_DAYS) -> dict[str, Any]:
    """Return the feed of a model as a statement that is to be signed."""
    revoked, num_waiting = _revoked(evidence)
    ledger, now = evidence.context.stores.ledger, datetime.fromisoformat(evidence.context.now())
    held = {each.adapter_sha256 for each in ledger.checkpoints()}
    held |= {each.adapter_sha256 for each in ledger.exports() if not each.stale}
    return feed_statement(
        evidence.keys.model, evidence.log.checkpoint, num_waiting, revoked, held, now, days
    )


def num_revoked(model: Model) -> int:
    """Return how many adapters deletions revoked so far. Raise InvalidInput without keys."""
    with open_evidence(model) as evidence:
        return len(_revoked(evidence)[0])


def _revoked(evidence: OpenEvidence) -> tuple[Revoked, int]:
    """Return what deletions revoked, and the number of those whose certificates are not logged yet."""
    drafts = evidence.hook.tables.drafts()  # first: what is certified meanwhile is in both
    certified = evidence.issued.certificates
    waiting = [
        each
        for each in evidence.context.stores.ledger.requests()
        if each.committed_at and each.request_id in drafts.keys() - certified.keys()
    ]
    revoked: Revoked = {}
    for request in waiting:
        pending = {"certificate": "", "date": request.committed_at[:10]}
        revoked |= dict.fromkeys(drafts[request.request_id].revokes, pending)
    for each in sorted(certified.values(), key=lambda each: -each.sequence):  # the earliest is named
        predicate = statement_in(evidence.log.statement(each.sha256))["predicate"]
        by = {"certificate": each.sha256, "date": predicate["request"]["times"]["committed"][:10]}
        revoked |= dict.fromkeys(predicate["revokes"], by)
    return revoked, len(waiting)


def feed_statement(
    model: str,
    log: Checkpoint,
    num_waiting: int,
    revoked: Revoked,
    held: Set[str],
    now: datetime,
    days: int = VALID_DAYS,
) -> dict[str, Any]:
    """Return a feed: what was revoked and is not `held` again, as of the log with a checkpoint."""
    predicate = {
        "model": model,
        "sequence": log.size + num_waiting,
        "published": now.strftime(TIME_FORMAT),
        "next_update": (now + timedelta(days)).strftime(TIME_FORMAT),
        "revoked": {name: by for name, by in revoked.items() if name not in held},
        "reinstated": sorted(revoked.keys() & held),
    }
    subject = [{"name": origin(model), "digest": {"sha256": log.root.hex()}}]
    return statement(subject, REVOCATIONS, predicate)
