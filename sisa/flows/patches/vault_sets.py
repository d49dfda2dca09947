"""Texts in the vault: put there by consent, filtered by deletions, erased when no patch needs them.

A set's file is written before the commit that makes it known; a file that no commit knows is erased,
its key first. Rows name records by keyed ids: the set's own, and those of held records with the same
text, so that `where` and a deletion find them whatever id the text came under. A set that can't be read
any more counts as erased: it never stops a deletion. `planning/patch_plan.py` says which sets are
needed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from sisa.core.domain import Record, RecordRow, Request
from sisa.core.errors import ConfigConflict, InvalidInput, Problem, SisaError, UnknownRecord
from sisa.core.patch import WRITTEN, SetRole, VaultSet
from sisa.core.ports import Change, Removal
from sisa.core.requests import unvaulted
from sisa.flows.wiring.context import Context, commit, held_rows, slices_of, stored_in, trained_over
from sisa.planning.patch_plan import unneeded_sets


@dataclass(frozen=True)
class Put:
    """Sets that were written and are not in the ledger yet."""

    sets: tuple[VaultSet, ...] = ()
    pairs: tuple[tuple[str, str], ...] = ()  # (set, keyed id)

    def __add__(self, other: Put) -> Put:
        return Put((*self.sets, *other.sets), (*self.pairs, *other.pairs))

    def only(self, names: Collection[str]) -> Put:
        """Return some sets alone; the files of the others are erased by the next reconciliation."""
        sets = tuple(each for each in self.sets if each.name in names)
        return Put(sets, tuple(each for each in self.pairs if each[0] in names))

    def by_request(self) -> dict[str, str]:
        """Return the names of the sets that hold what requests removed, by request."""
        return {each.request_id: each.name for each in self.sets if each.role == "forget"}


def put(
    context: Context, role: SetRole, records: Sequence[Record], consent: str, request_id: str = ""
) -> Put:
    """Write a set. Raises EnvironmentFault."""
    name = context.settings.assigner.set_name(role, records)
    sha256, num_bytes = context.stores.vault.put(name, records)
    found = VaultSet(
        name, role, len(records), consent, context.now(), sha256, num_bytes, request_id=request_id
    )
    return Put((found,), tuple((name, each) for each in _touching(context, records)))


def _touching(context: Context, records: Sequence[Record]) -> list[str]:
    rows = [context.settings.assigner.row(record, 0) for record in records]
    held, _ = context.stores.ledger.by_text({row.text_digest for row in rows})
    return sorted({row.id_digest for row in (*rows, *held)})


def put_removed(context: Context, removal: Removal) -> Put:
    """Write the texts that requests with consent remove, before the commit that removes them."""
    found = Put()
    for request in removal.requests:
        rows = removal.named[request.request_id]
        if request.consent and rows:
            stored = stored_in(context, slices_of(context, rows), rows)
            records = [each.record for each in sorted(stored, key=lambda each: each.id_digest)]
            found += put(context, "forget", records, request.consent, request.request_id)
    return found


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


def without_removed(context: Context, removed: Mapping[str, RecordRow]) -> tuple[dict[str, str], Put]:
    """Write retain sets anew without removed records (by keyed id); return, by its name, the set that
    takes the place of each, and what was written. A set that can't be read takes its own place, and is
    held no longer."""
    names = {name for found in context.stores.ledger.sets_with(removed).values() for name in found}
    instead: dict[str, str] = {}
    written = Put()
    texts = {row.text_digest for row in removed.values()}
    for found in context.stores.ledger.vault():
        if found.role != "retain" or found.name not in names:
            continue
        instead[found.name] = found.name
        if not found.held:
            continue
        try:
            records = context.stores.vault.read(found)
        except SisaError:
            continue
        rows = [context.settings.assigner.row(each, 0) for each in records]
        left = [
            record
            for record, row in zip(records, rows, strict=True)
            if row.id_digest not in removed and row.text_digest not in texts
        ]
        instead[found.name] = WRITTEN
        if left:
            written += (again := put(context, "retain", left, found.consent, found.request_id))
            instead[found.name] = again.sets[0].name
    return instead, written


def exported(context: Context) -> frozenset[str]:
    """Return the keys of the patches that are in exports."""
    return frozenset(key for each in context.stores.ledger.exports() for key in each.patches)


def erase_unneeded(context: Context) -> tuple[int, int]:
    """Erase the texts that no patch needs: numbers of sets erased and kept."""
    ledger = context.stores.ledger
    sets = ledger.vault()
    elsewhere = {*trained_over(ledger), *exported(context)}
    erased, gone = unneeded_sets(
        ledger.patches(), context.settings.patch_mode, sets, deletable(context), elsewhere
    )
    if erased or gone:
        cleared = [unvaulted(each) for each in ledger.requests() if each.vaulted in set(gone)]
        commit(context, Change(vault=erased, unvaulted=gone, requests=cleared))
    names = {each.name for each in erased} | set(gone)
    context.stores.vault.erase(sorted(names))
    before = {each.name for each in sets if each.held}
    return len(before & names), len(before - names)


def set_of_request(context: Context, request: Request) -> VaultSet:
    """Return the set of a request's texts. Raises ConfigConflict when there is none."""
    for found in context.stores.ledger.vault():
        if found.name == request.vaulted and found.held:
            return found
    said = "by consent, but it was erased since" if request.consent else "without consent to keep it"
    raise ConfigConflict(
        "the text of this request is not in the vault",
        where=request.request_id,
        got=f"the text was given {said}",
        next_step="give the text by --forget with --consent, if you may have it",
    )


def check_consent(consent: str) -> None:
    """Raises InvalidInput where texts are given without a word on who allowed to keep them."""
    if not consent.strip():
        raise InvalidInput(
            "texts are kept, encrypted, until a patch is made from them: that needs a recorded consent",
            expected="who allowed it, or on what ground",
            next_step="give --consent",
        )


def chosen(context: Context, names: Sequence[str], request_ids: Sequence[str]) -> list[VaultSet]:
    """Return held sets by (a beginning of) their names and by requests.

    Raises UnknownRecord that lists all unknown ones.
    """
    sets = [each for each in context.stores.ledger.vault() if each.held]
    found: dict[str, VaultSet] = {}
    problems = []
    for number, name in enumerate(names, 1):
        hits = [each for each in sets if each.name.startswith(name)] if len(name) >= 8 else []
        if len(hits) != 1:
            problems.append(Problem(f"set {number}", "names no set, or several"))
        found |= {each.name: each for each in hits}
    by_id = {
        each: request
        for request in context.stores.ledger.requests()
        for each in (request.request_id, request.external_id)
        if each is not None
    }
    for number, name in enumerate(request_ids, 1):
        request = by_id.get(name)
        hits = [] if request is None else [each for each in sets if each.name == request.vaulted]
        if not hits:
            problems.append(Problem(f"request {number}", "has no text in the vault"))
        found |= {each.name: each for each in hits}
    if problems:
        raise UnknownRecord(
            "some of these are not in the vault; nothing was changed",
            next_step="`sisa approx patches` lists what is",
            problems=problems,
        )
    return list(found.values())
