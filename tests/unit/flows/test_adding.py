"""Records that are trained or added, over fakes: bad ones are refused whole, with every problem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from sisa.core.domain import Record, Risk, SliceFile
from sisa.core.errors import InvalidInput, Problem
from sisa.core.ports import StoredRecord
from sisa.flows.ingest import add, check_same_records, train
from sisa.flows.locations import of_subject
from sisa.planning.bands import Bands
from tests.fakes.ports import changed, fake_model, fake_recipe, fake_record

BANDS = Bands(thresholds=(0.01, 0.1), classes={"staff": 0.0, "trial": 0.3}, unknown=0.05)


def record(number: int, risk: Risk, subject: str | None = None) -> Record:
    return replace(fake_record(number, subject), deletion_risk=risk)


def test_subjects_of_records_from_python_have_one_spelling() -> None:
    fake = fake_model()
    spellings = ("Jos\u00e9", " Jose\u0301 ")
    train(fake.context, [fake_record(number, each) for number, each in enumerate(spellings)])
    for each in spellings:
        live, _ = of_subject(fake.context, each)
        assert len(live) == 2


def test_what_is_held_of_a_subject_binds_what_is_added() -> None:
    fake = fake_model(2, fake_recipe(4), bands=BANDS)
    train(fake.context, [record(0, 0.3, "ada"), record(1, None)])
    before = fake.ledger.heads()
    for risk in (0.2, "trial", None):  # in the same band or not
        with pytest.raises(InvalidInput, match="deletion risk") as caught:
            add(fake.context, [record(2, None), record(3, risk, "ada")])
        assert [each.where for each in caught.value.problems] == ["record 2"]
        assert fake.ledger.heads() == before
    with pytest.raises(InvalidInput, match="deletion risk"):
        add(fake.context, [record(4, "vip")])
    assert add(fake.context, [record(3, 0.3, "ada")]).added == 1


def test_every_problem_of_an_addition_is_reported_at_once() -> None:
    fake = fake_model(2, fake_recipe(4), bands=BANDS)
    train(fake.context, [record(0, 0.3, "ada"), record(1, None), record(2, None)])
    fake.forget(2)
    before = fake.ledger.heads()
    asked = [
        record(5, None),
        record(2, None),  # deleted
        record(3, 0.2, "ada"),  # held with another risk
        record(4, "vip"),  # of no class
        replace(record(1, None), parts=record(6, None).parts),  # another text under a held id
        replace(record(2, None), id="new"),  # a deleted text under a new id
    ]
    with pytest.raises(InvalidInput, match="5 records can't be added") as caught:
        add(fake.context, asked)
    assert [each.where for each in caught.value.problems] == [f"record {n}" for n in (2, 3, 4, 5, 6)]
    for advice in ("sisa rectify", "sisa.bands.classes", "--allow-deleted"):
        assert advice in str(caught.value.next_step)
    with pytest.raises(InvalidInput, match="3 records") as caught:
        add(fake.context, asked, allow_deleted=True)
    assert [each.where for each in caught.value.problems] == [f"record {n}" for n in (3, 4, 5)]
    assert fake.ledger.heads() == before


def test_unfit_and_repeated_records_are_reported_with_the_rest() -> None:
    fake = fake_model(2, fake_recipe(4), bands=BANDS)
    train(fake.context, [record(0, 0.3, "ada")])

    def long(records: Sequence[Record]) -> list[int]:
        problems = [Problem(f"record {n}", "long") for n, r in enumerate(records, 1) if r.id > "id-0005"]
        if problems:
            raise InvalidInput("1 records can't be trained on", next_step="cut", problems=problems)
        return [1] * len(records)

    def guard(_: Sequence[Record]) -> None:
        raise InvalidInput("shared", next_step="take out", problems=[Problem("record 1", "shared")])

    before = fake.ledger.heads()
    asked = [record(7, None), record(3, "vip"), record(4, 0.2, "ada"), record(3, "vip")]
    with pytest.raises(InvalidInput, match="4 records can't be added") as caught:
        add(changed(fake.context, count_tokens=long), asked, checks=[guard])
    assert [(each.where, each.what) for each in caught.value.problems] == [
        ("record 1", "long"),
        ("record 1", "shared"),
        ("record 2", "its 'deletion_risk' is not a class of sisa.bands.classes"),
        ("record 3", "its deletion risk differs from its subject's held records"),
        ("record 4", "it has the id of record 2"),
        ("record 4", "its 'deletion_risk' is not a class of sisa.bands.classes"),
    ]
    with pytest.raises(InvalidInput, match="can't be trained on"):
        add(changed(fake.context, count_tokens=long), asked[:1])
    assert fake.ledger.heads() == before


def test_a_changed_record_and_a_risk_without_a_class_are_reported_together() -> None:
    fake = fake_model(2, fake_recipe(4), bands=BANDS)
    train(fake.context, [record(0, 0.3), record(1, None)])
    changed = replace(record(1, None), parts=record(6, None).parts)
    with pytest.raises(InvalidInput, match="2 records can't be added") as caught:
        train(fake.context, [record(0, "vip"), changed])
    assert [each.where for each in caught.value.problems] == ["record 1", "record 1", "record 2"]


def test_a_class_that_the_run_file_does_not_name_yet_hinders_no_comparison() -> None:
    fake = fake_model(2, fake_recipe(4), bands=BANDS)
    train(fake.context, [record(0, 0.3)])
    check_same_records(fake.context, [record(0, 0.3), record(9, "vip")])
    with pytest.raises(InvalidInput, match="differ") as caught:
        check_same_records(fake.context, [record(9, "vip"), record(0, "vip")])
    assert [each.where for each in caught.value.problems] == ["record 2"]
    with pytest.raises(InvalidInput, match="is not a class of"):
        fake.context.settings.assigner.place(record(9, "vip"))


def test_one_held_record_of_a_subject_gives_its_risk(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = fake_model(2, fake_recipe(4))
    train(fake.context, [record(n, 0.3, "ada") for n in range(3)])
    add(fake.context, [record(3, 0.3, "ada"), record(4, None)], append=True)
    read, reading = [], fake.records.read

    def watched(file: SliceFile) -> tuple[StoredRecord, ...]:
        read.append(file.name)
        return reading(file)

    monkeypatch.setattr(fake.records, "read", watched)
    with pytest.raises(InvalidInput, match="deletion risk"):
        add(fake.context, [record(5, 0.2, "ada"), record(6, None, "eve")])
    assert len(read) == 1
