"""The law of exactness over random histories, with fakes.

Each history is a first training, then additions, appended slices and deletions (single, batch, by
subject) in any order and batching. After each step no deleted record is reachable in any held object,
no untouched shard was retrained, and only suffixes of affected shards were. At the end all held bytes
equal those of training from scratch on what remains.
"""

from __future__ import annotations

import dataclasses
import json
from typing import get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sisa.core.checkpoint_files import ADAPTER_FILE
from sisa.flows.context.context import Stores
from sisa.flows.context.served import model_digest
from sisa.flows.ingest import train
from tests.examples import num_examples
from tests.property.histories import (
    EFFECTS,
    History,
    Model,
    assert_equal,
    histories,
    like,
    lived_through_a_crash,
    record,
)

NUM_HISTORIES, NUM_CRASHES = num_examples(2_000), num_examples(500)
READS = """
by_subject by_text by_vector check checkpoints contents counts describe event_head events events_of
exclusive exports has_event head heads held identities indexes kinds load location lookup lost meta
named_by num_bytes num_restrictions num_tombstones num_without_subject patches read read_only
requests rows runs search seq sets_with slices snapshot standing tombstones vault vaulted vectors
work_items
"""
BELOW = {"keyring", "blobs"}  # of stores on a disk: `tests/endurance/kills.py` kills the process there


@pytest.mark.slow
@settings(max_examples=NUM_HISTORIES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(histories())
def test_any_history_equals_training_from_scratch(history: History) -> None:
    model = Model(history)
    model.check_no_residue()
    for kind, numbers in history.steps:
        model.step(kind, numbers)
    scratch = like(history)
    train(scratch.context, [model.record(n) for n in sorted(model.remaining, reverse=True)])
    assert_equal(model.fake, scratch)
    adapters = [
        json.loads(files[ADAPTER_FILE])["touched"] for files in scratch.checkpoints.stored.values()
    ]
    assert {each for touched in adapters for each in touched} == {
        record(number).id for number in model.remaining
    }
    if history.orders > 1:
        one = like(dataclasses.replace(history, orders=1))
        train(one.context, [model.record(n) for n in sorted(model.remaining)])
        assert one.ledger.heads() == model.fake.ledger.heads()
        assert model_digest(one.context) == model_digest(model.fake.context)


def test_every_effect_of_a_store_is_one_to_crash_at() -> None:
    """Name a new method of a port in EFFECTS if it changes something, else in READS."""
    ports, reads = get_type_hints(Stores), set(READS.split())
    assert EFFECTS.keys() == ports.keys() - BELOW
    for name, effects in EFFECTS.items():
        assert {each for each in dir(ports[name]) if each[0] != "_"} - reads == {*effects}


@pytest.mark.slow
@settings(max_examples=NUM_CRASHES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(histories(), st.integers(1, 60), st.booleans())
def test_a_crash_at_any_effect_changes_no_byte(history: History, at: int, after: bool) -> None:
    model = lived_through_a_crash(history, at, after)
    scratch = like(history)
    train(scratch.context, [model.record(number) for number in sorted(model.remaining)])
    assert_equal(model.fake, scratch)
    assert all(request.state == "completed" for request in model.fake.ledger.requests())
    testimony = model.fake.witness.testimony
    assert not model.fake.ledger.events() or testimony.head == model.fake.ledger.event_head()
    assert testimony.tombstones == model.fake.ledger.tables.tombstones
