"""The probe of the base: it runs once, between commit and erasure, and never delays a deletion."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from sisa.core.domain import Record, RecordRow
from sisa.core.errors import EnvironmentFault
from sisa.core.requests import Probed
from sisa.flows.requests import Terms, carry_out, submit
from tests.fakes.ports import FakeModel, changed, fake_trained

TERMS = Terms(approver="a person")


@pytest.fixture
def fake() -> FakeModel:
    return fake_trained(range(12))


class Asked:
    """A probe that inspects the state when it is called."""

    def __init__(self, fake: FakeModel, error: Exception | None = None) -> None:
        self.fake, self.error = fake, error
        self.records: list[list[str]] = []
        fake.context = changed(fake.context, probe=self)

    def __call__(self, records: Sequence[Record]) -> Probed:
        self.records.append(sorted(record.id for record in records))
        digests = [self.fake.context.settings.assigner.id_digest(record.id) for record in records]
        assert not any(isinstance(e, RecordRow) for e in self.fake.ledger.lookup(digests).values())
        assert {each.state for each in self.fake.ledger.requests()} == {"rolled_back"}
        if self.error is not None:
            raise self.error
        return Probed(len(records), len(records), num_known=1, continuation=0.5)


def test_the_base_is_asked_when_the_model_is_clean_and_the_text_still_there(fake: FakeModel) -> None:
    asked = Asked(fake)
    request = fake.forget(3, 4)
    assert asked.records == [["id-0003", "id-0004"]]
    assert request.state == "completed"
    assert request.probed == Probed(2, 2, num_known=1, continuation=0.5)


def test_each_request_of_a_batch_has_its_own_outcome(fake: FakeModel) -> None:
    asked = Asked(fake)
    requests = [submit(fake.context, fake.rows(n), (), TERMS) for n in (1, 2)]
    done = carry_out(fake.context, requests)
    assert sorted(asked.records) == [["id-0001"], ["id-0002"]]
    assert [each.probed.num_records if each.probed else 0 for each in done] == [1, 1]


@pytest.mark.parametrize("error", [EnvironmentFault("no base"), RuntimeError("its text"), MemoryError()])
def test_a_probe_that_fails_does_not_keep_the_text(fake: FakeModel, error: Exception) -> None:
    Asked(fake, error)
    request = fake.forget(3)
    assert request.state == "completed"
    assert request.probed == Probed(1, failure=type(error).__name__)
    held = {each.record.id for stored in fake.records.stored.values() for each in stored}
    assert "id-0003" not in held


def test_nothing_is_asked_of_what_was_deleted_before(fake: FakeModel) -> None:
    fake.forget(3)
    asked = Asked(fake)
    dead = list(fake.ledger.tombstones())
    (done,) = carry_out(fake.context, [submit(fake.context, [], dead, TERMS)])
    assert (asked.records, done.probed, done.state) == ([], None, "completed")


def test_without_a_probe_nothing_is_claimed(fake: FakeModel) -> None:
    assert fake.forget(3).probed is None
