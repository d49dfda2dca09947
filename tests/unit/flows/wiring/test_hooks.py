"""When the hooks of a model are called in a deletion, and what they add to its commit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from sisa.core.domain import RecordRow
from sisa.core.hooks import Contribution, Copies, Removal
from sisa.core.ports import Change
from sisa.flows.context.context import Context
from sisa.flows.reconcile import reconcile
from tests.crash import Crash, crash
from tests.fakes.ports import FakeModel, changed, fake_trained


@pytest.fixture
def fake() -> FakeModel:
    return fake_trained(range(6), 2)


class Noting:
    """A hook that records when it is called, and what the ledger holds then."""

    def __init__(self, name: str, calls: list[tuple[str, str, list[str]]]) -> None:
        self.name = name
        self.calls = calls

    def _note(self, context: Context, call: str) -> None:
        self.calls.append((self.name, call, [each.state for each in context.stores.ledger.requests()]))

    def copies(self, context: Context, rows: Sequence[RecordRow]) -> Sequence[Copies]:
        del context, rows
        return ()

    def contribute(self, context: Context, removal: Removal) -> Contribution:
        assert len(removal.rows) == 1
        self._note(context, "contribute")
        change = Change(meta={self.name: "contributed"})
        return Contribution(change, finish=lambda: self._note(context, "finish"))

    def reconcile(self, context: Context) -> None:
        self._note(context, "reconcile")

    def complete(self, context: Context) -> None:
        self._note(context, "complete")

    def export(self, context: Context, name: str, files: Mapping[str, bytes]) -> Mapping[str, bytes]:
        del name
        self._note(context, "export")
        return files


def test_hooks_join_the_commit_of_a_deletion_and_finish_when_it_is_done(fake: FakeModel) -> None:
    calls: list[tuple[str, str, list[str]]] = []
    fake.context = changed(fake.context, hooks=(Noting("one", calls), Noting("two", calls)))
    fake.forget(0)
    assert calls == [
        ("one", "contribute", []),
        ("two", "contribute", []),
        ("one", "reconcile", ["erased"]),
        ("two", "reconcile", ["erased"]),
        ("one", "complete", ["completed"]),
        ("two", "complete", ["completed"]),
        ("one", "finish", ["completed"]),
        ("two", "finish", ["completed"]),
    ]
    assert [fake.ledger.meta()[name] for name in ("one", "two")] == ["contributed"] * 2


def test_a_crash_before_a_hook_finishes_leaves_the_deletion_to_the_next_command(fake: FakeModel) -> None:
    """The next command finishes it, and settles every hook."""
    calls: list[tuple[str, str, list[str]]] = []
    fake.context = changed(fake.context, hooks=(Noting("one", calls),))
    fake.before_run.append(crash)
    with pytest.raises(Crash):
        fake.forget(0)
    fake.before_run.remove(crash)
    reconcile(fake.context)
    assert [call for _, call, _ in calls] == ["contribute", "reconcile", "reconcile", "complete"]
    assert [each.state for each in fake.ledger.requests()] == ["completed"]
