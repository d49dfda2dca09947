"""Rectification: the old version of a record is deleted exactly, the new one added, in one training."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from sisa.core.checkpoint_files import ADAPTER_FILE
from sisa.core.domain import Part, Record
from sisa.core.errors import InvalidInput, UnknownRecord
from sisa.flows.ingest import rectify, train
from tests.crash import Crash, crash
from tests.fakes.ports import FakeModel, fake_model, fake_record, fake_trained
from tests.property.histories import assert_equal


@pytest.fixture
def fake() -> FakeModel:
    found = fake_trained(range(12))
    found.trained.clear()
    return found


def corrected(number: int) -> Record:
    return replace(
        fake_record(number), parts=(Part("prompt", "who?"), Part("completion", f"not {number}"))
    )


def test_the_result_is_that_of_training_on_the_new_version(fake: FakeModel) -> None:
    done = rectify(fake.context, [corrected(3), fake_record(4)])
    assert (done.taken.added, done.taken.already_held) == (1, 1)
    assert done.request is not None
    assert (done.request.state, done.request.num_records) == ("completed", 1)
    scratch = fake_model()
    train(scratch.context, [corrected(n) if n == 3 else fake_record(n) for n in range(12)])
    assert_equal(fake, scratch)
    keys = [job.key for job in fake.trained]
    assert len(keys) == len(set(keys)) == done.taken.slices_trained


def test_what_is_unchanged_is_left_alone(fake: FakeModel) -> None:
    done = rectify(fake.context, [fake_record(3)])
    assert (done.request, done.taken.added, done.taken.already_held, fake.trained) == (None, 0, 1, [])


def test_a_corrected_identifier_is_taken_without_training(fake: FakeModel) -> None:
    """It is no part of a record's content, but a deletion list must find the person by it."""
    record = replace(fake_record(3), identifiers=(("emails", "the hash of the corrected address"),))
    done = rectify(fake.context, [record])
    assert (done.request, done.taken.already_held, fake.trained) == (None, 1, [])
    assert fake.ledger.identities() == fake.context.settings.assigner.identities(record)


def test_all_records_of_a_subject_may_get_another_risk() -> None:
    def ada(number: int, risk: float) -> Record:
        return replace(fake_record(number, "ada"), deletion_risk=risk)

    fake = fake_model()
    train(fake.context, [ada(0, 0.1), ada(1, 0.1)])
    with pytest.raises(InvalidInput, match="deletion risk"):
        rectify(fake.context, [ada(0, 0.3)])  # the other one keeps its own
    done = rectify(fake.context, [ada(0, 0.3), ada(1, 0.3)])
    assert (done.taken.added, done.taken.records) == (2, 2)


def test_a_record_that_is_not_held_is_refused(fake: FakeModel) -> None:
    fake.forget(5)
    before = fake.ledger.seq()
    with pytest.raises(UnknownRecord) as error:
        rectify(fake.context, [corrected(3), corrected(50), corrected(5)])
    assert [each.where for each in error.value.problems] == ["record 2", "record 3"]
    assert fake.ledger.seq() == before


def test_a_bad_new_version_is_refused_before_anything_is_deleted(fake: FakeModel) -> None:
    before = fake.ledger.seq()
    with pytest.raises(InvalidInput):
        rectify(fake.context, [corrected(3), corrected(3)])

    def refuse(_: object) -> None:
        raise InvalidInput("too long")

    with pytest.raises(InvalidInput, match="too long"):
        rectify(fake.context, [corrected(3)], [refuse])
    assert fake.ledger.seq() == before


def test_a_rectification_that_was_cut_short_is_continued(fake: FakeModel) -> None:
    """A crash after the deletion leaves neither version; the same command adds the new one."""
    context = fake.context
    calls = iter([context.compute.count_tokens, crash])
    broken = replace(
        context, compute=replace(context.compute, count_tokens=lambda some: next(calls)(some))
    )
    with pytest.raises(Crash):
        rectify(broken, [corrected(3)])
    served = [
        json.loads(fake.checkpoints.stored[h.key][ADAPTER_FILE]) for h in fake.ledger.heads() if h.key
    ]
    assert not any(fake_record(3).id in each["touched"] for each in served)
    done = rectify(context, [corrected(3)])
    assert (done.request, done.taken.added) == (None, 1)
    scratch = fake_model()
    train(scratch.context, [corrected(n) if n == 3 else fake_record(n) for n in range(12)])
    assert_equal(fake, scratch)
    assert [each.state for each in fake.ledger.requests()] == ["completed"]
