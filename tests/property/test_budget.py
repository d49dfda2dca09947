"""Any budget for checkpoints changes what is held, never what is served.

Histories are those of `test_histories.py`, under a budget that is mostly too small for all stages. At
the end every head has the bytes of training from scratch without a budget, held stages have the bytes
that they have there, and the size is within the budget unless only the last stages of orders are left.
A crash at any effect changes none of this.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sisa.flows.context.served import model_digest
from sisa.flows.ingest import train
from tests.property.histories import History, Model, histories, like, lived_through_a_crash


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(histories(), st.integers(1, 4_000))
def test_any_history_serves_the_same_bytes(history: History, budget: int) -> None:
    model = Model(dataclasses.replace(history, budget=budget))
    for kind, numbers in history.steps:
        model.step(kind, numbers)
    scratch = like(history)
    train(scratch.context, [model.record(n) for n in sorted(model.remaining)])
    assert model.fake.ledger.heads() == scratch.ledger.heads()
    assert model_digest(model.fake.context) == model_digest(scratch.context)
    stored, whole = model.fake.checkpoints.stored, scratch.checkpoints.stored
    assert {key: whole[key] for key in stored} == stored
    held = Counter[int]()
    for each in model.fake.ledger.checkpoints():
        held[each.shard] += each.num_bytes
    heads = {head.key for head in model.fake.ledger.heads()}
    for shard, num_bytes in held.items():
        here = [each for each in model.fake.ledger.checkpoints(shard) if each.key not in heads]
        assert num_bytes <= budget or len(here) <= len(model.fake.context.recipe.other_orders)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(histories(), st.integers(1, 4_000), st.integers(1, 60), st.booleans())
def test_a_crash_at_any_effect_changes_no_byte_that_is_served(
    history: History, budget: int, at: int, after: bool
) -> None:
    model = lived_through_a_crash(dataclasses.replace(history, budget=budget), at, after)
    scratch = like(history)
    train(scratch.context, [model.record(n) for n in sorted(model.remaining)])
    assert model.fake.ledger.heads() == scratch.ledger.heads()
    assert model_digest(model.fake.context) == model_digest(scratch.context)
