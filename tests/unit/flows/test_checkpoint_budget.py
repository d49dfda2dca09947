"""A model with a budget for checkpoints: what its shards drop is reported, and is no damage."""

from __future__ import annotations

from sisa.audit.verify import verify
from sisa.core.events import Event, Notice
from sisa.flows.ingest import train
from sisa.flows.locations import where
from tests.fakes.ports import FakeCheckpoints, changed, fake_model, fake_recipe, fake_record


def test_a_budget_that_is_too_small_is_reported_and_exceeded() -> None:
    events: list[Event] = []
    fake = fake_model(2, fake_recipe(3, budget=1))
    train(changed(fake.context, report=events.append), [fake_record(number) for number in range(20)])
    assert len(fake.checkpoints.stored) == 2
    assert ["2 shards keep more bytes" in each.text for each in events if isinstance(each, Notice)] == [
        True
    ]


def test_dropped_stages_are_no_finding() -> None:
    fake = fake_model(2, fake_recipe(3, orders=2, budget=1))
    train(fake.context, [fake_record(number) for number in range(20)])
    found = verify(fake.context, [0, 1], FakeCheckpoints())
    assert found.ok
    assert [(each.equal, each.stages) for each in found.shards] == [(True, 2), (True, 2)]
    (place,) = where(fake.context, ["id-0003"])
    assert place.state == "trained"
    assert 1 <= len(place.checkpoints) <= 2
