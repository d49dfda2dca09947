"""Check records before they are added, and report every problem at once, by position.

Nothing is changed, and no message contains an id, a subject or a text.

>>> def check(where):
...     raise InvalidInput("bad", next_step="fix it", problems=[Problem(where, "is bad")])
>>> try:
...     check_all(lambda: check("record 2"), lambda: check("record 1"), lambda: None)
... except InvalidInput as error:
...     print(error)
2 records can't be added, for several reasons; nothing was changed
  - record 1: is bad
  - record 2: is bad
  next step: fix it
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sisa.core.domain import Record, RecordRow, Tombstone
from sisa.core.errors import ConfigConflict, InvalidInput, Problem
from sisa.flows.context.context import Context
from sisa.flows.context.slices import slices_of, stored_in
from sisa.planning.bands import Bands, risk_problems
from sisa.planning.layout import Assigner
from sisa.planning.plan import LAYERWISE

HeldOrDeleted = Mapping[str, RecordRow | Tombstone]  # from the ledger, by keyed id
RecordCheck = Callable[[Sequence[Record]], object]  # raises InvalidInput with every problem


def check_all(*checks: Callable[[], object]) -> None:
    """Run all checks. Raise the InvalidInput of one, or one with the problems of several."""
    met: list[InvalidInput] = []
    for check in checks:
        try:
            check()
        except InvalidInput as error:
            met.append(error)
    if len(met) == 1 or not all(error.problems for error in met):
        raise next((error for error in met if not error.problems), met[0])
    if met:
        found = [problem for error in met for problem in error.problems]
        problems = sorted(found, key=lambda problem: int(problem.where.rpartition(" ")[2]))
        raise InvalidInput(
            f"{_records(problems)} can't be added, for several reasons; nothing was changed",
            next_step="; ".join(dict.fromkeys(error.next_step for error in met)),
            problems=problems,
        ) from None


def _raise_problems(problems: Sequence[Problem], what: str, next_step: str) -> None:
    if problems:
        raise InvalidInput(
            f"{_records(problems)} {what}; nothing was changed", next_step=next_step, problems=problems
        )


def check_first(
    training: Mapping[str, Any],
    assigner: Assigner,
    records: Sequence[Record],
    deleted: Sequence[Tombstone],
    checks: Iterable[RecordCheck],
) -> None:
    """Raise InvalidInput or ConfigConflict for records that a first training can't take.

    `deleted` are those of other models under the same partition key.
    """
    check_generations(training, records)
    check_all(
        lambda: _check_unique_ids(records),
        lambda: check_risks(assigner.layout.bands, records),
        lambda: _check_not_deleted(assigner, enumerate(records), deleted, "trained"),
        *(lambda check=check: check(records) for check in checks),
    )


def _records(problems: Sequence[Problem]) -> str:
    count = len({each.where for each in problems})
    return f"{count} record{'s' * (count != 1)}"


def check_added(
    context: Context,
    records: Sequence[Record],
    found: HeldOrDeleted,
    checks: Iterable[RecordCheck],
    *,
    allow_deleted: bool,
) -> None:
    """Raise InvalidInput with every problem of records that can't be added, those of `checks` too."""
    assigner = context.settings.assigner
    fresh = [
        (n, record)
        for n, record in enumerate(records)
        if not isinstance(found.get(assigner.id_digest(record.id)), RecordRow)
    ]

    def check_new() -> None:
        texts = {assigner.text_digest(record) for _, record in fresh}
        _, by_text = context.stores.ledger.by_text(texts, full_scan=True)
        by_id = [each for each in found.values() if isinstance(each, Tombstone)]
        _check_not_deleted(assigner, fresh, [*by_text, *by_id], "added")

    check_all(
        lambda: _check_unique_ids(records),
        lambda: check_unchanged(context, records, found),
        lambda: check_risks(assigner.layout.bands, records, _other_risks(context, fresh)),
        *(() if allow_deleted else (check_new, lambda: _check_identities(context, fresh))),
        *(lambda check=check: check(records) for check in checks),
    )


def check_trained(context: Context, records: Sequence[Record], found: HeldOrDeleted) -> None:
    """Raise InvalidInput for records that differ from the held ones, or whose risks fit no class."""
    check_all(
        lambda: check_risks(context.settings.assigner.layout.bands, records),
        lambda: check_unchanged(context, records, found),
    )


def _check_unique_ids(records: Sequence[Record]) -> None:
    first: dict[str, int] = {}
    problems = [
        Problem(f"record {n}", f"it has the id of record {first[record.id]}")
        for n, record in enumerate(records, start=1)
        if first.setdefault(record.id, n) != n
    ]
    _raise_problems(problems, "have the id of another", "give each record its own id")


def check_generations(
    training: Mapping[str, Any], records: Sequence[Record], *, append: bool = False
) -> None:
    """Raise ConfigConflict if slices would be appended to chains trained layer by layer."""
    problems = [
        Problem(f"record {n}", "it has a generation")
        for n, record in enumerate(records, start=1)
        if record.generation
    ]
    if LAYERWISE in training and (append or problems):
        raise ConfigConflict(
            "layers are trained slice by slice: none are left for appended slices; nothing was changed",
            where="sisa.layerwise",
            expected="records without a generation",
            next_step="`sisa add` without --append, or train without sisa.layerwise",
            problems=problems,
        )


def check_unchanged(context: Context, records: Sequence[Record], found: HeldOrDeleted) -> None:
    """Raise InvalidInput if a record differs from the held record of the same id."""
    assigner = context.settings.assigner
    problems = [
        Problem(f"record {n}", "its content differs from the held record")
        for n, record in enumerate(records, start=1)
        if isinstance(held := found.get(assigner.id_digest(record.id)), RecordRow)
        and held.record_digest != assigner.record_digest(record)
    ]
    _raise_problems(
        problems,
        "differ from the held ones of the same id",
        "`sisa rectify` replaces the held ones; if they are right, correct the source",
    )


def check_risks(bands: Bands | None, records: Sequence[Record], further: Iterable[Problem] = ()) -> None:
    """Raise InvalidInput if a risk fits no class, or if a subject has several risks."""
    _raise_problems(
        [*risk_problems(bands, records), *further],
        "can't be placed by their deletion risk",
        "name the class in sisa.bands.classes, and give all records of a subject one risk",
    )


def _other_risks(context: Context, fresh: Sequence[tuple[int, Record]]) -> list[Problem]:
    """Return new records with another risk than their subject's held records, which have one risk.

    Held records that new versions replace do not count.
    """
    assigner = context.settings.assigner
    given = {assigner.id_digest(record.id) for _, record in fresh}
    rows: list[RecordRow] = []
    for subject in {record.subject_id for _, record in fresh if record.subject_id is not None}:
        digest, shard = assigner.subject_digest(subject), assigner.shard_of_subject(subject)
        held, _ = context.stores.ledger.by_subject(digest, shard)
        rows += [row for row in held if row.id_digest not in given][:1]
    stored = [each.record for each in stored_in(context, slices_of(context, rows), rows)]
    known = {record.subject_id: record.deletion_risk for record in stored}
    return [
        Problem(f"record {n + 1}", "its deletion risk differs from its subject's held records")
        for n, record in fresh
        if known.get(record.subject_id, record.deletion_risk) != record.deletion_risk
    ]


def _check_identities(context: Context, fresh: Sequence[tuple[int, Record]]) -> None:
    """Raise InvalidInput for records of people who are on a deletion list or were deleted by one."""
    ledger, assigner = context.stores.ledger, context.settings.assigner
    keys = {n: {each.key for each in assigner.identities(record)} for n, record in fresh}
    asked = {key for each in keys.values() for key in each}
    if not asked:
        return
    kept = ledger.identities(keys=asked)
    found = ledger.lookup(each.id_digest for each in kept)
    why = {
        each.key: f"its person was deleted at {gone.deleted_at} by request {gone.request_id}"
        for each in kept
        if isinstance(gone := found.get(each.id_digest), Tombstone)
    }
    why |= {each.key: "its person is on a deletion list of DROP" for each in ledger.work_items(asked)}
    problems = [
        Problem(f"record {n + 1}", why[min(its & why.keys())])
        for n, its in keys.items()
        if its & why.keys()
    ]
    _raise_problems(
        problems,
        "are of persons who had themselves deleted",
        "leave them out of the file, or say --allow-deleted",
    )


def _check_not_deleted(
    assigner: Assigner,
    records: Iterable[tuple[int, Record]],  # with their positions
    deleted: Sequence[Tombstone],
    done: str,
) -> None:
    """Raise InvalidInput for records whose id or normalised text was deleted; name the request."""
    ids = {each.id_digest: each for each in deleted}
    texts = {each.text_digest: each for each in deleted}
    problems = []
    for position, record in records:
        by_id = ids.get(assigner.id_digest(record.id))
        gone = by_id or texts.get(assigner.text_digest(record))
        if gone is not None:
            what = "was deleted" if by_id else "has the text of a record that was deleted"
            what += f" at {gone.deleted_at} by request {gone.request_id}"
            problems.append(Problem(f"record {position + 1}", what))
    _raise_problems(
        problems,
        f"can't be {done}",
        "leave them out of the file, give new content a new id, or say --allow-deleted",
    )
