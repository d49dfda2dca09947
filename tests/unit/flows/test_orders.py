"""Several orders of a model: their chains are proven, shown and repaired as order 0 is."""

from __future__ import annotations

import pytest

from sisa.audit.lineage import proves_clean
from sisa.audit.repair import close_gaps
from sisa.core.ports import Change
from sisa.flows.context.plans import view_shard
from sisa.flows.deletion import plan_forget
from sisa.flows.ingest import add
from sisa.flows.reconcile import reconcile
from sisa.flows.requests import Terms, forget_at_once, new_request
from sisa.flows.status import shard_statuses
from sisa.planning.plan import Schedule, gaps, plan_shard
from tests.fakes.ports import fake_recipe, fake_record, fake_trained


@pytest.mark.parametrize("schedule", ["cumulative", "sequential"])
def test_a_chain_of_any_order_and_generation_is_proven_by_its_rows(schedule: Schedule) -> None:
    fake = fake_trained(range(14), 2, fake_recipe(3, schedule, orders=3))
    add(fake.context, [fake_record(number) for number in range(14, 24)], append=True)
    seqs = {each.key: each.seq for each in fake.ledger.checkpoints()}
    assert {job.slice // 3 for job in fake.trained} == {0, 1}
    for job in fake.trained:
        rows = fake.ledger.rows(job.shard)
        assert proves_clean(job, rows, seqs[job.key], 3)
        for row in rows:
            others = [each for each in rows if each is not row]
            assert proves_clean(job, others, seqs[job.key], 3) == (row.slice not in job.prefix)


def test_status_shows_depth_and_cost_separately() -> None:
    fake = fake_trained(range(24), 1, fake_recipe(4, orders=2))
    row = next(each for each in fake.ledger.rows(0) if each.slice == 0)
    planned = plan_forget(fake.context, [row])
    assert planned.served == ((0, 2, 4),)
    assert planned.serving_depth == 0.5
    assert planned.record_epochs_retrained == planned.record_epochs_full
    forget_at_once(fake.context, new_request(fake.context, [row], (), Terms(approver="a")), defer=True)
    (state,) = shard_statuses(fake.context)
    assert (state.depth, state.num_stages, state.converged) == (2, 4, False)
    done = reconcile(fake.context)
    (request,) = fake.ledger.requests()
    assert done.record_epochs_trained == request.record_epochs_retrained
    assert done.record_epochs_others == request.record_epochs_others > 0
    assert request.state == "completed"


def test_gaps_on_every_orders_path_are_closed_to_the_same_bytes() -> None:
    fake = fake_trained(range(24), 1, fake_recipe(4, orders=2))
    whole, rows = dict(fake.checkpoints.stored), fake.ledger.checkpoints()
    lost = [each.key for each in rows if each.prefix in ((0,), (0, 1), (2, 3))]
    fake.context.stores.ledger.commit(Change(dropped=lost))
    fake.checkpoints.erase(lost)
    view = view_shard(fake.context, 0)
    found = plan_shard(view, fake.context.recipe, fake.context.compute.fingerprint)
    assert (found.train, found.all_missing) == ((), ())
    missing = gaps(found, {each.key for each in view.held})
    assert [job.prefix for job in missing] == [(0,), (0, 1), (2, 3)]
    assert close_gaps(fake.context, [found]) == ["trained 3 stages again"]
    assert fake.checkpoints.stored == whole
    assert {each.key for each in fake.ledger.checkpoints()} == {each.key for each in rows}
