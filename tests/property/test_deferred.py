"""Deletions with deferred training: erased at once, served from what is clean, trained in the end.

Any number of them may follow one another. After each, nothing of the deleted is left, nothing was
trained, and the deepest clean prefix of any order serves. When training catches up, requests are
completed and all bytes equal those of training from scratch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sisa.core.checkpoint_files import ADAPTER_FILE
from sisa.core.ports import Change
from sisa.flows.ingest import add, train
from sisa.flows.reconcile import reconcile
from tests.crash import Crash
from tests.fakes.ports import fake_model, fake_record
from tests.property.histories import History, Model, assert_equal, histories, like

gone_sets = st.lists(st.sets(st.integers(0, 40), min_size=1, max_size=4), max_size=4)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(histories(), gone_sets)
def test_deferred_deletions_end_as_if_they_had_been_trained(
    history: History, gone_sets: list[set[int]]
) -> None:
    model = Model(dataclasses.replace(history, first=tuple(range(0, 41, 2))))
    context, ledger = model.fake.context, model.fake.ledger
    model.fake.trained.clear()
    for gone in gone_sets:
        rows = model.rows(gone & model.remaining)
        if rows:
            request = model.fake.forget(*gone & model.remaining, defer=True)
            assert request.state in ("erased", "completed")
            assert request.served == tuple(
                (head.shard, head.depth, sum(f.shard == head.shard for f in ledger.slices()))
                for head in ledger.heads()
                if head.shard in {row.shard for row in rows}
            )
        model.remaining -= gone
        model.check_no_residue()
        model.check_heads_are_clean()
        model.check_heads_are_deepest()
    assert model.fake.trained == []
    reconcile(context)
    assert all(each.state == "completed" for each in ledger.requests())
    scratch = like(history)
    train(scratch.context, [model.record(n) for n in sorted(model.remaining)])
    assert_equal(model.fake, scratch)


def test_a_stage_that_is_adopted_after_a_crash_goes_with_the_records_that_came_before_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each stage is stored, and the run is killed before the ledger knows it; the next run adopts it."""
    fake = fake_model(num_shards=1)
    context, ledger = fake.context, fake.ledger
    train(context, [fake_record(number) for number in range(12)])
    commit = ledger.commit

    def dies(change: Change) -> int:
        if any(each.seconds or each.record_epochs for each in change.checkpoints):  # just trained
            raise Crash
        return commit(change)

    monkeypatch.setattr(ledger, "commit", dies)
    newcomer = fake_record(99)
    with pytest.raises(Crash):
        add(context, [newcomer])
    for _ in range(3):
        with contextlib.suppress(Crash):
            reconcile(context)
    (head,) = ledger.heads()
    assert [each.record_epochs for each in ledger.checkpoints() if each.key == head.key] == [0]

    def touched() -> list[str]:
        (head,) = ledger.heads()
        if head.key is None:
            return []
        return list(json.loads(fake.checkpoints.stored[head.key][ADAPTER_FILE])["touched"])

    assert newcomer.id in touched()
    fake.forget(99, defer=True)
    assert newcomer.id not in touched()
    held = [data for files in fake.checkpoints.stored.values() for data in files.values()]
    assert not any(newcomer.id.encode() in data for data in held)
