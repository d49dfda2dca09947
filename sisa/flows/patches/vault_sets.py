"""Keep texts in the vault: put there by consent, filtered by deletions, erased when no patch needs them.

A set's file is written before the commit that lists it; a file that no commit lists is erased, its key
first. Rows name records by keyed id: those of the set, and held records with the same text, so that
`where` and a deletion find them whatever the id of the given text. A set that can't be read any more
counts as erased: it never stops a deletion. `planning/patch_plan.py` decides which sets are needed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from sisa.core.domain import Record, RecordRow
from sisa.core.errors import ConfigConflict, Problem, SisaError, UnknownRecord
from sisa.core.hooks import Removal
from sisa.core.patches import WRITTEN, SetRole, VaultSet
from sisa.core.ports import Change
from sisa.core.requests import Request
from sisa.flows.context.commit import commit
from sisa.flows.context.context import Context, trained_over
from sisa.flows.context.slices import held_rows, slices_of, stored_in
from sisa.planning.patch_plan import unneeded_sets


@dataclass(frozen=True)
class WrittenSets:
    """Hold sets that are written but not in the ledger yet."""

    sets: tuple[VaultSet, ...] = ()
    pairs: tuple[tuple[str, str], ...] = ()  # (set, keyed id)

    def __add__(self, other: WrittenSets) -> WrittenSets:
        return WrittenSets((*self.sets, *other.sets), (*self.pairs, *other.pairs))

    def only(self, names: Collection[str]) -> WrittenSets:
        """Return the named sets alone; the next reconciliation erases the files of the others."""
        sets = tuple(each for each in self.sets if each.name in names)
        return WrittenSets(sets, tuple(each for each in self.pairs if each[0] in names))

    def by_request(self) -> dict[str, str]:
        """Return the names of the sets that hold removed texts, by request."""
        return {each.request_id: each.name for each in self.sets if each.role == "forget"}


def put(
    context: Context, role: SetRole, records: Sequence[Record], consent: str, request_id: str = ""
) -> WrittenSets:
    """Write a set. Raise EnvironmentFault."""
    assigner, now = context.settings.assigner, context.now()
    name = assigner.set_name(role, records)
    stored = context.stores.vault.put(name, records)
    found = VaultSet(name, role, len(records), consent, now, *stored, request_id=request_id)
    held, _ = context.stores.ledger.by_text({assigner.text_digest(each) for each in records})
    ids = {*(assigner.id_digest(each.id) for each in records), *(row.id_digest for row in held)}
    return WrittenSets((found,), tuple((name, each) for each in sorted(ids)))


def put_removed(context: Context, removal: Removal) -> WrittenSets:
    """Write the texts that requests with consent remove, before the commit that removes them."""
    written = WrittenSets()
    for request in removal.requests:
        rows = removal.named[request.request_id]
        if request.consent and rows:
            stored = stored_in(context, slices_of(context, rows), rows)
            records = [each.record for each in sorted(stored, key=lambda each: each.id_digest)]
            written += put(context, "forget", records, request.consent, request.request_id)
    return written


def held_sets(context: Context) -> frozenset[str]:
    """Return the names of the sets whose texts are held."""
    return frozenset(each.name for each in context.stores.ledger.vault() if each.held)


def deletable(context: Context) -> frozenset[str]:
    """Return the names of the retain sets that hold records of the model."""
    return frozenset(
        each.name
        for each in context.stores.ledger.vault()
        if each.role == "retain" and any(held_rows(context, context.stores.ledger.vaulted(each.name)))
    )


def without_removed(
    context: Context, removed: Mapping[str, RecordRow]
) -> tuple[dict[str, str], WrittenSets]:
    """Write retain sets again without removed records (by keyed id).

    Return the name of the set that replaces each of them, and what was written. A set that can't be read
    replaces itself and is no longer held.
    """
    ledger, assigner = context.stores.ledger, context.settings.assigner
    names = {name for found in ledger.sets_with(removed).values() for name in found}
    texts = {row.text_digest for row in removed.values()}
    instead: dict[str, str] = {}
    written = WrittenSets()
    for found in ledger.vault():
        if found.role != "retain" or found.name not in names:
            continue
        instead[found.name] = found.name
        if not found.held:
            continue
        try:
            records = context.stores.vault.read(found)
        except SisaError:
            continue
        left = [
            record
            for record in records
            if assigner.id_digest(record.id) not in removed and assigner.text_digest(record) not in texts
        ]
        instead[found.name] = WRITTEN
        if left:
            written += (again := put(context, "retain", left, found.consent, found.request_id))
            instead[found.name] = again.sets[0].name
    return instead, written


def erase_unneeded(context: Context) -> tuple[int, int]:
    """Erase the texts that no patch needs; return the number of sets erased and kept."""
    ledger = context.stores.ledger
    sets = ledger.vault()
    elsewhere = {*trained_over(ledger), *(key for each in ledger.exports() for key in each.patches)}
    erased, gone = unneeded_sets(
        ledger.patches(), context.settings.config.patch_mode, sets, deletable(context), elsewhere
    )
    if erased or gone:
        with ledger.exclusive():
            held = [each for each in ledger.requests() if each.vaulted in set(gone)]
            cleared = [replace(each, vaulted="") for each in held]
            commit(context, Change(vault=erased, unvaulted=gone, requests=cleared))
    names = {each.name for each in erased} | set(gone)
    context.stores.vault.erase(sorted(names))
    before = {each.name for each in sets if each.held}
    return len(before & names), len(before - names)


def set_of_request(context: Context, request: Request) -> VaultSet:
    """Return the set of a request's texts. Raise ConfigConflict if there is none."""
    for found in context.stores.ledger.vault():
        if found.name == request.vaulted and found.held:
            return found
    kept = "with consent, but was erased since" if request.consent else "without consent to keep it"
    raise ConfigConflict(
        "the text of this request is not in the vault",
        where=request.request_id,
        got=f"the text was given {kept}",
        next_step="give the text by --forget with --consent, if you may have it",
    )


def chosen(context: Context, names: Sequence[str], request_ids: Sequence[str]) -> list[VaultSet]:
    """Return held sets by the first 8 letters or more, and by request. Raise UnknownRecord with all."""
    ledger = context.stores.ledger
    sets = [each for each in ledger.vault() if each.held]
    vaulted = {
        name: request.vaulted
        for request in ledger.requests()
        for name in (request.request_id, request.external_id)
        if name is not None
    }
    asked = []
    for number, name in enumerate(names, 1):
        hits = [each for each in sets if each.name.startswith(name)] if len(name) >= 8 else []
        asked.append((f"set {number}", "names no set, or several", hits))
    for number, name in enumerate(request_ids, 1):
        hits = [each for each in sets if each.name == vaulted.get(name)]
        asked.append((f"request {number}", "has no text in the vault", hits))
    problems = [Problem(where, what) for where, what, hits in asked if len(hits) != 1]
    if problems:
        raise UnknownRecord(
            "some of these are not in the vault; nothing was changed",
            next_step="`sisa approx patches` lists the sets that are",
            problems=problems,
        )
    return list({each.name: each for _, _, (each,) in asked}.values())
