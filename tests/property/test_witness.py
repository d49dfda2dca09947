"""The law of the witness over random histories with backups: what was deleted stays deleted.

Each history adds, deletes, allows in again, saves the whole model and restores an older save, in any
order, with a crash at any effect. After the next command the model holds exactly what the save held
without what is deleted, its bytes equal training from scratch on that, and no other trace is left.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sisa.core.errors import InvalidInput
from sisa.flows.context.commit import is_behind
from sisa.flows.ingest import add, train
from sisa.flows.reconcile import reconcile
from sisa.flows.restored_backup import catch_up
from sisa.planning.plan import Schedule
from tests.crash import Crash, Fuse, crashing
from tests.examples import num_examples
from tests.fakes.ports import fake_model, fake_recipe
from tests.property.histories import COMMITS, Model, Saved, assert_equal, effects_of, record, wire

NUM_HISTORIES, NUM_CRASHES = num_examples(300), num_examples(300)
Step = tuple[str, tuple[int, ...]]
KINDS = ("add", "forget", "readmit", "save", "restore", "restore")


@st.composite
def histories(draw: st.DrawFn) -> list[Step]:
    numbers = st.lists(st.integers(0, 25), unique=True, min_size=1, max_size=8).map(tuple)
    steps = st.lists(st.tuples(st.sampled_from(KINDS), numbers), min_size=2, max_size=9)
    return [("add", draw(numbers)), ("save", (0,)), *draw(steps)]


class History:
    """The system under test beside plain sets: what each save held, and what stands deleted."""

    def __init__(self, num_shards: int, num_slices: int, schedule: Schedule) -> None:
        self.recipe, self.num_shards = fake_recipe(num_slices, schedule), num_shards
        self.fake = fake_model(num_shards, self.recipe)
        train(self.fake.context, [])
        self.saves: list[Saved] = []
        self.saved: list[set[int]] = []
        self.deleted: set[int] = set()

    def live(self) -> set[int]:
        return {number for number in range(26) if self.fake.rows(number)}

    def next_command(self) -> None:
        catch_up(self.fake.context)
        reconcile(self.fake.context)

    def step(self, kind: str, numbers: tuple[int, ...]) -> None:
        context, asked = self.fake.context, set(numbers)
        if kind == "save":
            self.saves.append(Saved(self.fake))
            self.saved.append(self.live())
            return
        if kind == "restore":
            self.saves[min(numbers) % len(self.saves)].restore(self.fake)
        catch_up(context)
        if kind == "restore":  # a reading command stops here
            self.check_clean(self.live())
            reconcile(context)
        elif kind == "add":
            add(context, [record(n) for n in sorted(asked - self.deleted)])
        elif kind == "readmit":
            add(context, [record(n) for n in sorted(asked)], allow_deleted=True)
            self.deleted -= asked
        elif self.fake.rows(*asked):
            self.fake.forget(*asked)

    def expected(self, kind: str, numbers: tuple[int, ...], before: set[int]) -> set[int]:
        """Return what is held after a step that was not interrupted."""
        if kind == "restore":
            return self.saved[min(numbers) % len(self.saved)] - self.deleted
        if kind == "forget":
            return before - set(numbers)
        return before if kind == "save" else before | (set(numbers) - self.deleted)

    def check_clean(self, expected: set[int]) -> None:
        model = Model.__new__(Model)
        model.fake, model.remaining = self.fake, expected
        model.check_no_residue()
        model.check_heads_are_clean()

    def check(self, expected: set[int]) -> None:
        assert self.live() == expected
        assert not is_behind(self.fake.context)
        testimony = self.fake.witness.testimony
        assert testimony.head == self.fake.ledger.event_head()
        digest = self.fake.context.settings.assigner.id_digest
        assert set(testimony.tombstones) == {digest(record(n).id) for n in self.deleted}
        self.check_clean(expected)
        scratch = fake_model(self.num_shards, self.recipe)
        train(scratch.context, [record(n) for n in sorted(expected)])
        assert_equal(self.fake, scratch)
        assert all(each.state == "completed" for each in self.fake.ledger.requests())


SHAPES = (st.integers(1, 3), st.integers(1, 3), st.sampled_from(["cumulative", "sequential"]))


@pytest.mark.slow
@settings(max_examples=NUM_HISTORIES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(histories(), *SHAPES)
def test_what_was_deleted_stays_deleted(
    steps: list[Step], num_shards: int, num_slices: int, schedule: Schedule
) -> None:
    history = History(num_shards, num_slices, schedule)
    for kind, numbers in steps:
        before = history.live()
        history.step(kind, numbers)
        expected = history.expected(kind, numbers, before)
        if kind == "forget":
            history.deleted |= before - expected
        history.check(expected)


@pytest.mark.slow
@settings(max_examples=NUM_CRASHES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(histories(), *SHAPES, st.integers(1, 40), st.booleans())
def test_a_crash_at_any_effect_forgets_no_deletion(
    steps: list[Step], num_shards: int, num_slices: int, schedule: Schedule, at: int, after: bool
) -> None:
    history = History(num_shards, num_slices, schedule)
    wire(history.fake, Fuse(at, after))
    for kind, numbers in steps:
        before, deleted = history.live(), set(history.deleted)
        expected = history.expected(kind, numbers, before)
        try:
            history.step(kind, numbers)
            if kind == "readmit":
                expected = before | set(numbers)
        except Crash:
            history.next_command()
            done = before | set(numbers) if kind == "readmit" else expected
            expected = done if kind == "restore" or history.live() == done else before
            history.deleted = deleted - (expected if kind == "readmit" else set())
        if kind == "forget":
            history.deleted |= before - expected
        history.check(expected)


@given(st.lists(st.integers(0, 25), unique=True, min_size=2, max_size=8), st.data())
def test_a_restored_model_refuses_what_was_deleted(numbers: list[int], data: st.DataObject) -> None:
    """Deleted after the backup, or added and deleted after it: neither comes in again unnoticed."""
    early = set(data.draw(st.sets(st.sampled_from(numbers))))
    history = History(2, 2, "cumulative")
    history.step("add", tuple(early))
    history.step("save", ())
    history.step("add", tuple(numbers))
    history.step("forget", tuple(numbers))
    history.step("restore", (0,))
    assert history.live() == set()
    for number in numbers:
        with pytest.raises(InvalidInput) as refused:
            add(history.fake.context, [record(number)])
        assert "was deleted" in refused.value.problems[0].what
    taken = add(history.fake.context, [record(n) for n in numbers], allow_deleted=True)
    assert taken.added == len(numbers)


def test_catching_up_does_not_call_deleted_what_was_allowed_in_again() -> None:
    history = History(2, 2, "cumulative")
    for kind, numbers in (("add", (1, 2)), ("forget", (1,)), ("readmit", (1,))):
        history.step(kind, numbers)
    with crashing((history.fake.witness, "append")):
        history.step("forget", (2,))
    history.next_command()
    history.deleted = {2}
    history.check({1})


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_readmission_is_recorded_after_a_crash(at: int) -> None:
    """It moves no event, so the heads of ledger and witness are equal after the crash, too."""
    history = History(2, 2, "cumulative")
    for kind, numbers in (("add", (1, 2)), ("forget", (1,))):
        history.step(kind, numbers)
    with crashing(*effects_of(history.fake, COMMITS), at=at, after=True):
        history.step("readmit", (1,))
    history.next_command()
    history.deleted = set()
    history.check({1, 2})


def test_a_backup_from_a_crash_keeps_what_was_allowed_in_again() -> None:
    history = History(2, 2, "cumulative")
    for kind, numbers in (("add", (1, 2, 3)), ("forget", (1,))):
        history.step(kind, numbers)
    with crashing((history.fake.ledger, "commit"), after=True):
        history.step("readmit", (1,))
    history.step("save", ())
    history.next_command()
    for kind, numbers in (("forget", (2,)), ("restore", (0,))):
        history.step(kind, numbers)
    history.deleted = {2}
    history.check({1, 3})


def test_a_restored_ledger_knows_which_deletion_of_a_record_was_the_last() -> None:
    history = History(2, 2, "cumulative")
    steps: tuple[Step, ...] = (
        *(("add", (1, 2)), ("forget", (1,)), ("save", ())),
        *(("readmit", (1,)), ("forget", (1,)), ("restore", (0,))),
    )
    for kind, numbers in steps:
        history.step(kind, numbers)
    history.deleted = {1}
    history.check({2})
    assert history.fake.witness.testimony.tombstones == history.fake.ledger.tables.tombstones
