"""Name the recipients of a person's data: what left the model with their records in it (GDPR Art. 19).

An export holds what its checkpoint saw, and what the patches in it were made from. One that is stale is
named until it is erased, since somebody may still use it. Copies that others made are not known here;
`sisa revocations publish` informs their holders.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sisa.core.domain import Export, ExportForm, RecordRow, Tombstone
from sisa.flows.reconcile import export_standing
from sisa.flows.wiring.context import Context
from sisa.planning.patch_plan import lineage
from sisa.planning.plan import touched


@dataclass(frozen=True)
class Recipient:
    """Describe an export: where it is, what of the model is in it, and whether it is still there.

    `standing` is "held", "gone", "changed" or "unreadable"; `stale` says that a deletion touched it.
    """

    path: str
    form: ExportForm
    shards: tuple[int, ...]  # -1: of a former layout
    adapter_sha256: str
    made_at: str
    stale: bool
    standing: str


def recipients(
    context: Context, rows: Sequence[RecordRow], dead: Sequence[Tombstone]
) -> list[Recipient]:
    """Return the exports that hold what held or deleted records touched, by path."""
    ledger = context.stores.ledger
    named = [*(row.id_digest for row in rows), *(each.id_digest for each in dead)]
    sets = {name for names in ledger.sets_with(named).values() for name in names}
    patches = {each.key for each in lineage(ledger.patches(), sets)}
    deleted_by = {each.request_id for each in dead}
    found: dict[tuple[str, str], list[Export]] = {}
    for each in ledger.exports():
        if (
            any(touched(each, row) for row in rows)
            or not patches.isdisjoint(each.patches)
            or (each.stale and each.request_id in deleted_by)
        ):
            found.setdefault((each.path, each.adapter_sha256), []).append(each)
    return [_recipient(context, some) for _, some in sorted(found.items())]


def _recipient(context: Context, rows: Iterable[Export]) -> Recipient:
    some = list(rows)
    first = some[0]
    return Recipient(
        path=first.path,
        form=first.form,
        shards=tuple(sorted(each.shard for each in some)),
        adapter_sha256=first.adapter_sha256,
        made_at=first.made_at,
        stale=any(each.stale for each in some),
        standing=export_standing(context, first),
    )
