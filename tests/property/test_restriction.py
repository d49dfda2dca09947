"""Restrictions over random histories, with fakes: what is restricted is not served, and no more.

A history of additions, appended slices and deletions is lived twice, with and without restrictions and
releases in between. The fake trainer's weights confess every record that they saw, so
what is served is read from bytes.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sisa.core.checkpoint_files import ADAPTER_FILE
from sisa.core.domain import Head, Part
from sisa.core.errors import ConfigConflict, UnknownRecord
from sisa.core.hooks import Contribution, Removal
from sisa.flows.answers.routing import routing_hits
from sisa.flows.answers.serving import ServedHeads
from sisa.flows.context.commit import is_behind
from sisa.flows.context.context import Context
from sisa.flows.context.served import restricted_rows, restrictions, servable, served_heads, served_keys
from sisa.flows.ingest import rectify
from sisa.flows.patches.on_deletion import PatchesHook
from sisa.flows.reconcile import reconcile
from sisa.flows.restored_backup import catch_up
from sisa.flows.rights.restriction import lift, restrict
from tests.crash import Fuse
from tests.examples import num_examples
from tests.fakes.ports import FakeModel, changed, fake_embed
from tests.property.histories import (
    COMMITS,
    SUBJECTS,
    History,
    Model,
    assert_equal,
    attempt,
    histories,
    subject_of,
    wire,
)

NUM_HISTORIES, NUM_CRASHES = num_examples(400), num_examples(200)
WHO = tuple(filter(None, SUBJECTS))
MANY = 100  # more than there are records

Right = tuple[str, str]  # restrict or release, and whom


class Restricted(Model):
    """The system under test beside the plain set of whose records may not be served."""

    def __init__(self, history: History) -> None:
        self.restricted: set[str] = set()
        super().__init__(history)
        self.fake.before_run.append(self.check_served)

    def change(self, right: Right) -> None:
        what, subject = right
        held = any(subject_of(number) == subject for number in self.remaining)
        if what == "restrict":
            if held:
                assert restrict(self.fake.context, subject).since
                self.restricted.add(subject)
            else:
                with pytest.raises(UnknownRecord):
                    restrict(self.fake.context, subject)
        elif subject in self.restricted:
            assert lift(self.fake.context, subject).since is None
            self.restricted.discard(subject)
        else:
            with pytest.raises((ConfigConflict, UnknownRecord)):
                lift(self.fake.context, subject)
        self.check_served()

    def step(self, kind: str, numbers: tuple[int, ...]) -> None:
        super().step(kind, numbers)
        if kind in ("forget", "subject"):  # a deletion of the last record ends a restriction
            self.restricted &= {subject_of(number) or "" for number in self.remaining}
        self.check_served()

    def check_served(self) -> None:
        """Check by bytes that nothing restricted is served, and that what is served is the deepest."""
        ledger = self.fake.ledger
        silent = {row.id_digest for row in restricted_rows(ledger)}
        names = {self.fake.context.settings.assigner.subject_digest(each) for each in self.restricted}
        assert silent == {e for e, row in ledger.tables.records.items() if row.subject_digest in names}
        for head, served in zip(ledger.heads(), served_heads(ledger), strict=True):
            clean = {e.key: len(e.prefix) for e in ledger.checkpoints(head.shard) if not self.saw(e.key)}
            assert clean.keys() == servable(ledger) & {e.key for e in ledger.checkpoints(head.shard)}
            if head.key is None or head.key in clean:
                assert served == head
            else:
                assert served.depth == max(clean.values(), default=0) == clean.get(served.key or "", 0)
        assert served_keys(ledger) == {e.shard: e.key for e in served_heads(ledger) if e.key}
        self.check_routes()

    def saw(self, key: str) -> bool:
        """Return whether a checkpoint saw a restricted record that the ledger holds."""
        id_digest, held = self.fake.context.settings.assigner.id_digest, self.fake.ledger.tables.records
        confessed = [
            id_digest(e) for e in json.loads(self.fake.checkpoints.stored[key][ADAPTER_FILE])["touched"]
        ]
        silent = {row.id_digest for row in restricted_rows(self.fake.ledger)}
        return any(each in silent and each in held for each in confessed)

    def check_routes(self) -> None:
        """Check that prompts are routed as if no restricted record were in the index."""
        context, queries = self.fake.context, fake_embed(["question 1", "question 7"])
        hidden = {(row.shard, row.vector_id) for row in restricted_rows(self.fake.ledger)}
        for top_k in (1, 4):
            indexes = context.stores.ledger.indexes()
            every = context.stores.index.search(indexes, queries, MANY, by="prompts")
            left = [[e for e in hits if (e.shard, e.vector_id) not in hidden][:top_k] for hits in every]
            assert routing_hits(context, queries, top_k) == left


rights = st.tuples(st.sampled_from(["restrict", "restrict", "release"]), st.sampled_from(WHO))


@pytest.mark.slow
@settings(max_examples=NUM_HISTORIES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(histories(), st.data())
def test_a_restriction_changes_what_is_served_and_nothing_else(
    history: History, data: st.DataObject
) -> None:
    model, plain = Restricted(history), Model(history)
    for kind, numbers in history.steps:
        for right in data.draw(st.lists(rights, max_size=3)):
            model.change(right)
        model.step(kind, numbers)
        plain.step(kind, numbers)
    assert_equal(model.fake, plain.fake)
    for subject in sorted(model.restricted):
        model.change(("release", subject))
    assert served_heads(model.fake.ledger) == plain.fake.ledger.heads()


@pytest.mark.slow
@settings(max_examples=NUM_CRASHES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(histories(), st.lists(rights, min_size=1, max_size=4), st.integers(1, 6), st.booleans())
def test_a_crash_leaves_a_restriction_made_or_not_made_and_the_witness_agrees(
    history: History, asked: Sequence[Right], at: int, after: bool
) -> None:
    model = Restricted(history)
    wire(model.fake, Fuse(at, after), COMMITS)
    for what, subject in asked:
        if not attempt(partial(model.change, (what, subject))):
            catch_up(model.fake.context)
            name = model.fake.context.settings.assigner.subject_digest(subject)
            now = restrictions(model.fake.ledger).since
            model.restricted = (
                (model.restricted | {subject}) if name in now else model.restricted - {subject}
            )
        model.check_served()
        assert model.fake.witness.testimony.restrictions == restrictions(model.fake.ledger)


@pytest.mark.slow
@settings(max_examples=NUM_CRASHES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    histories(), st.lists(rights, max_size=2), st.lists(rights, min_size=1, max_size=3), st.booleans()
)
def test_a_restored_backup_does_not_serve_what_was_restricted_since(
    history: History, before: Sequence[Right], since: Sequence[Right], deleted_too: bool
) -> None:
    model = Restricted(replace(history, steps=()))
    for right in before:
        model.change(right)
    backup = copy.deepcopy(held_in(model.fake))
    for right in since:
        model.change(right)
    if deleted_too and model.remaining:
        model.step("forget", (min(model.remaining),))
    model.fake.ledger.tables = backup[0]
    for files, held in zip(held_in(model.fake)[1:], backup[1:], strict=True):
        files.clear()
        files.update(held)
    changed = restrictions(model.fake.ledger).number < model.fake.witness.testimony.restrictions.number
    assert is_behind(model.fake.context) >= changed
    catch_up(model.fake.context)
    reconcile(model.fake.context)
    assert not is_behind(model.fake.context)
    assert restrictions(model.fake.ledger) == model.fake.witness.testimony.restrictions
    model.check_served()
    model.check_no_residue()


def held_in(fake: FakeModel) -> list[Any]:
    return [fake.ledger.tables, fake.records.stored, fake.checkpoints.stored, fake.index.stored]


def first(*numbers: int, orders: int = 1) -> Restricted:
    return Restricted(History(2, 3, "cumulative", numbers or tuple(range(12)), orders=orders))


def heads_of(model: Restricted, subject: str) -> list[Head]:
    rows = model.rows({n for n in model.remaining if subject_of(n) == subject})
    return [e for e in served_heads(model.fake.ledger) if e.shard in {row.shard for row in rows}]


def test_a_shard_serves_another_order_that_lacks_the_slice() -> None:
    """With several orders, more than the prefix before the slice can be served."""
    found = []
    for model in (first(), first(orders=3)):
        for subject in WHO:
            model.change(("restrict", subject))
            found.append(sum(head.depth for head in heads_of(model, subject)))
            model.change(("release", subject))
    one, several = found[: len(WHO)], found[len(WHO) :]
    assert all(a <= b for a, b in zip(one, several, strict=True))
    assert one != several


def test_a_rectification_keeps_the_restriction_of_a_subject_with_one_record() -> None:
    model = first(0, 1, 2)
    model.change(("restrict", "ada"))
    before = restrictions(model.fake.ledger)
    parts = (Part("prompt", "question 2"), Part("completion", "corrected"))
    rectify(model.fake.context, [replace(model.record(2), parts=parts)])
    assert restrictions(model.fake.ledger) == before
    model.check_served()
    assert len(restricted_rows(model.fake.ledger)) == 1


def test_a_deletion_of_the_last_record_alone_ends_a_restriction() -> None:
    model = first()
    for subject in ("ada", "bob"):
        model.change(("restrict", subject))
    model.step("forget", (2,))
    assert len(restrictions(model.fake.ledger).since) == 2
    model.step("subject", (7,))
    assert list(restrictions(model.fake.ledger).since) == [
        model.fake.context.settings.assigner.subject_digest("bob")
    ]
    assert model.fake.witness.testimony.restrictions == restrictions(model.fake.ledger)


def test_a_head_that_saw_a_restricted_record_may_not_be_served_any_more() -> None:
    """A service compares what it has loaded with this."""
    model = first()
    before = ServedHeads.read(model.fake.ledger)
    model.change(("restrict", "ada"))
    during = ServedHeads.read(model.fake.ledger)
    gone = set(before.heads.values()) - set(during.heads.values())
    assert gone
    assert gone.isdisjoint(during.manifests)
    model.change(("release", "ada"))
    assert replace(ServedHeads.read(model.fake.ledger), seq=before.seq) == before


class Meddling(PatchesHook):
    """Restrict somebody in the middle of a deletion, before its commit."""

    name = "meddling"

    def contribute(self, model: Context, removal: Removal) -> Contribution:
        del removal
        restrict(model, "ada")
        return Contribution()


@pytest.mark.parametrize(("subject", "left"), [("bob", 1), ("ada", 0)])
def test_a_restriction_in_the_middle_of_a_deletion_is_kept_or_ends_with_it(
    subject: str, left: int
) -> None:
    model = first()
    model.fake.context = changed(model.fake.context, hooks=(Meddling(), PatchesHook()))
    model.restricted = {"ada"} if left else set()
    model.step("subject", tuple(n for n in model.remaining if subject_of(n) == subject))
    assert len(restrictions(model.fake.ledger).since) == left
    assert model.fake.witness.testimony.restrictions == restrictions(model.fake.ledger)


def test_restricting_twice_keeps_the_first_time() -> None:
    model = first()
    restrict(model.fake.context, "ada")
    later = replace(model.fake.context, now=lambda: "2027-01-01T00:00:00+00:00")
    again = restrict(later, " ada ")
    assert (again.since, again.changed) == (model.fake.context.now(), False)
    assert restrictions(model.fake.ledger).number == 1
