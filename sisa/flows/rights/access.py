"""Collect what is held of a person, for them to read and to take along (GDPR Art. 15 and 20).

The result is one JSON object, described by `access.schema.json`. It holds every record of the person as
`sisa add` reads it, where each is and what it touched, what is left of deleted ones, the requests that
named them, and who received what they touched. It holds nothing of anybody else: of requests and sets of
texts that others share, only what concerns this person, and nothing that staff wrote.

What a controller must say and a program can't know comes from the run file's block `privacy`; what is
missing there is null, to be filled in before the file is handed out. Records without the person's
subject, and other people's records that mention them, are not found: look these up by content, and ask
for them by their ids.

Recipients (Art. 19) are exports. An export holds what its checkpoint saw and what its patches were made
from. A stale one is listed until it is erased, since somebody may still use it. Copies that others made
are not known here; `sisa revocations publish` informs their holders.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

from sisa.core.domain import GENERATION_COLUMN, Export, ExportForm, Record, RecordRow, Tombstone
from sisa.core.patches import VaultSet
from sisa.flows.context.context import Context
from sisa.flows.context.served import model_digest, restrictions
from sisa.flows.context.slices import records_of
from sisa.flows.context.stale_exports import by_directory, export_standing
from sisa.flows.locations import where
from sisa.planning.patch_plan import patches_from
from sisa.planning.plan import touched

ACCESS_FILE = "deletion-ready-model/access/v1"
RECIPIENTS_FILE = "deletion-ready-model/recipients/v1"
USE = (
    "Language models (LoRA adapters over a frozen base) are trained on the records and answer prompts; "
    "an index of the records chooses the models that answer."
)
RIGHTS = (
    "Art. 16: to have a record corrected",
    "Art. 17: to have a record deleted, exactly, from the data and from the model",
    "Art. 18: to have records stored and not used in answers",
    "Art. 20: to take the records along: they are in this file",
    "Art. 21: to object to the processing",
    "Art. 77: to complain to a supervisory authority",
)


@dataclass(frozen=True)
class Recipient:
    """Describe an export: its location, what it contains of the model, and whether it is still there.

    `standing` is "held", "gone", "changed" or "unreadable"; `stale` means that a deletion touched it.
    """

    path: str
    form: ExportForm
    shards: tuple[int, ...]  # -1: of a former layout
    adapter_sha256: str
    made_at: str
    stale: bool
    standing: str


def held_of(
    context: Context,
    rows: Sequence[RecordRow],
    deleted: Sequence[Tombstone],
    subject: str | None = None,
) -> dict[str, Any]:
    """Return what is held of a person, given the rows of their held and deleted records."""
    since = restrictions(context.stores.ledger).since
    owners = {row.subject_digest or "" for row in rows}
    config = context.settings.config
    own = config.sisa
    return {
        **_header(context, ACCESS_FILE, subject),
        "restricted_since": min((since[each] for each in owners & since.keys()), default=None),
        "model": {
            "name": context.stores.ledger.meta().get("model", ""),
            "digest": model_digest(context),
            "base": config.base_name,
            "base_digest": context.settings.base,
            "program": f"deletion-ready-model {metadata.version('deletion-ready-model')}",
        },
        "processing": {
            "controller": config.privacy.model_dump(mode="json"),
            "use": USE,
            "settings": {"shards": own.shards, "slices": own.slices, **config.training()},
        },
        "records": _records(context, rows),
        "deleted": _deleted(context, deleted),
        "requests": _requests(context, rows, deleted),
        "recipients": [asdict(each) for each in recipients(context, rows, deleted)],
        "rights": list(RIGHTS),
    }


def recipients_of(
    context: Context, rows: Sequence[RecordRow], deleted: Sequence[Tombstone], subject: str | None = None
) -> dict[str, Any]:
    """Return who received what these records touched: the recipients of `held_of` alone."""
    found = [asdict(each) for each in recipients(context, rows, deleted)]
    return {**_header(context, RECIPIENTS_FILE, subject), "recipients": found}


def _header(context: Context, kind: str, subject: str | None) -> dict[str, Any]:
    """Return how a file begins; because of the salt, a published digest of it confirms no guess."""
    salt = secrets.token_hex(32)
    return {"type": kind, "salt": salt, "made_at": context.now(), "subject": subject}


def as_file(found: dict[str, Any]) -> bytes:
    """Return the bytes of an access file: JSON in ASCII, so that no reader changes a character."""
    return json.dumps(found, indent=2).encode() + b"\n"


def row_of(record: Record) -> dict[str, Any]:
    """Return a record as a line of JSON that `sisa add` reads.

    >>> from sisa.core.domain import Part
    >>> row_of(Record("r1", None, "text", (Part("text", "Ada wrote."),)))
    {'id': 'r1', 'text': 'Ada wrote.'}
    """
    body: dict[str, Any] = {each.role: each.text for each in record.parts}
    if record.kind == "chat":
        body = {"messages": [{"role": each.role, "content": each.text} for each in record.parts]}
    placed = {"deletion_risk": record.deletion_risk, GENERATION_COLUMN: record.generation}
    named = {"id": record.id, "subject_id": record.subject_id, **body, **placed}
    return {name: each for name, each in named.items() if each is not None}


def _records(context: Context, rows: Sequence[RecordRow]) -> list[dict[str, Any]]:
    records = records_of(context, rows)
    locations = where(context, [record.id for record in records])
    return [
        {
            "data": row_of(record),
            "num_tokens": row.num_tokens,
            "shard": found.shard,
            "slice": found.slice,
            "state": found.state,
            "checkpoints": [asdict(each) for each in found.checkpoints],
            "num_cached_states": len(found.kept_states),
            "patches": [asdict(each) for each in found.patches],
            "vault": [_set_values(each) for each in found.vault],
        }
        for record, row, found in zip(records, rows, locations, strict=True)
    ]


def _set_values(found: VaultSet) -> dict[str, Any]:
    """Return the role, the consent and the time of a set of texts in the vault."""
    return {"role": found.role, "consent": found.consent, "put_at": found.put_at}


def _deleted(context: Context, deleted: Sequence[Tombstone]) -> list[dict[str, Any]]:
    """Return what is left of deleted records; their texts, if somebody consented to keep them."""
    ledger, digest = context.stores.ledger, context.settings.assigner.id_digest
    names = ledger.sets_with([each.id_digest for each in deleted])
    named = {name for each in names.values() for name in each}
    sets = {each.name: each for each in ledger.vault() if each.name in named and each.held}
    texts: dict[str, Record] = {}
    for each in sets.values():
        for record in context.stores.vault.read(each):
            if (key := digest(record.id)) in names:
                texts.setdefault(key, record)
    return [
        {
            "request_id": row.request_id,
            "deleted_at": row.deleted_at,
            "shard": row.shard,
            "slice": row.slice,
            "num_checkpoints_erased": row.checkpoints_erased,
            "data": row_of(texts[row.id_digest]) if row.id_digest in texts else None,
            "vault": [_set_values(sets[name]) for name in names.get(row.id_digest, ()) if name in sets],
        }
        for row in deleted
    ]


def _requests(
    context: Context, rows: Iterable[RecordRow], deleted: Iterable[Tombstone]
) -> list[dict[str, Any]]:
    """Return the requests that named one of these records, with how many of them each named."""
    ledger = context.stores.ledger
    own = {row.id_digest for row in rows} | {each.id_digest for each in deleted}
    counts = {r: len(own.intersection(ledger.named_by(r.request_id))) for r in ledger.requests()}
    return [
        {
            "request_id": request.request_id,
            "external_id": request.external_id,
            "regime": request.regime,
            "state": request.state,
            "created_at": request.created_at,
            "received_on": request.received_on,
            "due": request.due,
            "committed_at": request.committed_at,
            "num_records": count,
        }
        for request, count in counts.items()
        if count
    ]


def recipients(
    context: Context, rows: Sequence[RecordRow], deleted: Sequence[Tombstone]
) -> list[Recipient]:
    """Return the exports that hold what held or deleted records touched, by path."""
    ledger = context.stores.ledger
    named = [*(row.id_digest for row in rows), *(each.id_digest for each in deleted)]
    sets = {name for names in ledger.sets_with(named).values() for name in names}
    patches = {each.key for each in patches_from(ledger.patches(), sets)}
    deleted_by = {each.request_id for each in deleted}

    def concerned(export: Export) -> bool:
        return (
            any(touched(export, row) for row in rows)
            or not patches.isdisjoint(export.patches)
            or (export.stale and export.request_id in deleted_by)
        )

    return [
        Recipient(
            path=first.path,
            form=first.form,
            shards=shards,
            adapter_sha256=first.adapter_sha256,
            made_at=first.made_at,
            stale=first.stale,
            standing=export_standing(context, first),
        )
        for (first, *others), shards in by_directory(ledger.exports())
        if any(map(concerned, [first, *others]))
    ]
