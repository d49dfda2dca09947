"""A healthy head serves until its successor is ready: adding, reconfiguring, another environment.

Each change is observed from inside its training: what served before still serves, by name and byte.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sisa.flows.wiring import wiring
from sisa.flows.wiring.ledger_place import LEDGER
from sisa.store.areas import CHECKPOINTS
from sisa.store.checkpoints import FileCheckpoints
from sisa.store.ledger.ledger import SqlLedger
from tests.crash import Crash
from tests.fakes.keyring import PLAIN
from tests.models.tiny_model import (
    PEOPLE,
    Tiny,
    change_run,
    cut_short,
    held_files,
    ids_of,
    looking,
    of_people,
    train_scratch,
    without,
    write_run,
)

pytestmark = pytest.mark.torch
LAYOUT = {"sisa__shards": 2, "sisa__slices": 3}


def served(directory: Path) -> dict[int, tuple[str | None, bytes]]:
    """Return the served adapters, checked against the ledger."""
    ledger, store = SqlLedger(directory / LEDGER), FileCheckpoints(directory / CHECKPOINTS, PLAIN)
    try:
        manifests = {each.key: each.manifest_sha256 for each in ledger.checkpoints()}
        return {
            head.shard: (
                head.key,
                b""
                if head.key is None
                else store.load(head.key, manifests[head.key])["adapter_model.safetensors"],
            )
            for head in ledger.heads()
        }
    finally:
        ledger.close()


def add_people(tiny: Tiny, look: Callable[[], None], _patch: pytest.MonkeyPatch) -> None:
    rows = [{**row, "id": f"{row['id']}-new"} for row in of_people("p001", "p004", "p008")]
    tiny.open(looking(look)).add(tiny.file("more.jsonl", rows))


def change_rate(tiny: Tiny, look: Callable[[], None], _patch: pytest.MonkeyPatch) -> None:
    change_run(tiny.run_file, learning_rate=0.02)
    tiny.train(looking(look), accept_differences=True)


def upgrade_and_add(tiny: Tiny, look: Callable[[], None], patch: pytest.MonkeyPatch) -> None:
    patch.setattr(wiring, "fingerprint", lambda *_: "f" * 64)
    add_people(tiny, look, patch)


@pytest.mark.parametrize("change", [add_people, change_rate, upgrade_and_add])
def test_what_served_before_serves_during(
    tiny: Tiny, change: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = served(tiny.directory)
    seen: list[dict[int, tuple[str | None, bytes]]] = []
    change(tiny, lambda: seen.append(served(tiny.directory)), monkeypatch)
    assert seen
    assert all(each == before for each in seen)
    after = served(tiny.directory)
    assert after != before
    assert all(each.converged for each in tiny.open().status().shards)


def test_another_layout_is_trained_before_it_is_taken(
    tmp_path: Path, tiny_base: Path, tiny: Tiny
) -> None:
    """An interrupted move changes nothing; the same command continues; one commit moves the model."""
    gone = ["p007-q1"]
    tiny.open().forget(gone)
    change_run(tiny.run_file, **LAYOUT)
    before, shards = served(tiny.directory), tiny.open().status().shards
    with pytest.raises(Crash):
        tiny.train(cut_short(3), accept_differences=True)
    assert served(tiny.directory) == before
    assert tiny.open().status().shards == shards
    taken: list[Any] = []
    tiny.train(looking(lambda: taken.append(served(tiny.directory))), accept_differences=True)
    assert taken == [before]
    scratch = Tiny(tmp_path / "scratch", tiny_base)
    change_run(write_run(scratch.folder, tiny_base, without(PEOPLE, gone)), **LAYOUT)
    scratch.train()
    assert held_files(tiny.directory) == held_files(scratch.directory)
    assert tiny.open().verify().ok


def test_a_deletion_after_a_cut_move_is_of_the_old_layout(
    tmp_path: Path, tiny_base: Path, tiny: Tiny
) -> None:
    change_run(tiny.run_file, **LAYOUT)
    with pytest.raises(Crash):
        tiny.train(cut_short(3), accept_differences=True)
    gone = ids_of(of_people("p004"))
    tiny.open().forget(gone)
    scratch = train_scratch(tmp_path / "scratch", tiny_base, without(PEOPLE, gone))
    assert held_files(tiny.directory) == held_files(scratch.directory)


def test_a_cut_deletion_is_erased_and_completed_by_a_move(tiny: Tiny) -> None:
    """Its shards do not exist any more, and its bytes are gone before anything is trained."""
    gone = ids_of(of_people("p003"))
    with pytest.raises(Crash):
        tiny.open(cut_short(1)).forget(gone)
    change_run(tiny.run_file, **LAYOUT)
    states: list[str] = []
    tiny.train(
        looking(lambda: states.extend(r.request.state for r in tiny.open().status().requests)),
        accept_differences=True,
    )
    assert states == ["erased"]
    assert [each.request.state for each in tiny.open().status().requests] == ["completed"]
