"""Exports are in the ledger: a deletion erases those that it touched, and no other, whatever breaks.

The fake trainer's weights name every record that touched them, so that what an export holds is read from
its bytes and not from the plan.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sisa.audit import findings
from sisa.core.checkpoint_files import ADAPTER_FILE
from sisa.core.digest import Keyed, sha256_hex
from sisa.core.domain import ANY_SHARD, Export
from sisa.core.errors import EnvironmentFault, InvalidInput
from sisa.core.ports import Change
from sisa.flows.context.context import Context
from sisa.flows.context.stale_exports import give_up_lost, stale_exports, stale_paths
from sisa.flows.deletion import plan_forget
from sisa.flows.export import export_adapters
from sisa.flows.ingest import add
from sisa.flows.locations import where
from sisa.flows.patches.on_deletion import PatchesHook
from sisa.flows.reconcile import reconcile
from sisa.flows.reconfigure import reset
from sisa.flows.requests import Terms, carry_out, find_request, submit, view_of
from sisa.flows.rights.access import recipients
from sisa.flows.status import export_statuses
from sisa.planning.layout import Assigner, Layout
from sisa.store.exports import CARD, SIGNATURE
from tests.crash import Fuse
from tests.fakes.ports import SECRET, FakeModel, changed, fake_record, fake_trained

NUM_RECORDS = 12


@pytest.fixture
def fake() -> FakeModel:
    return trained()


def trained() -> FakeModel:
    return fake_trained(range(NUM_RECORDS))


def export(fake: FakeModel, name: str, folder: Path = Path("no-such-folder")) -> list[Export]:
    """Return the rows of a new export."""
    before = fake.ledger.exports()
    export_adapters(fake.context, folder / name)
    return [each for each in fake.ledger.exports() if each not in before]


def knows(fake: FakeModel, number: int) -> set[str]:
    """Return paths of the exported adapters that confess to a record."""
    return {
        path
        for path, files in fake.exports.stored.items()
        if fake_record(number).id in json.loads(files[ADAPTER_FILE])["touched"]
    }


def test_an_export_is_known_before_its_files_are_written(fake: FakeModel) -> None:
    known: list[bool] = []
    write = fake.exports.write

    def looking(path: str, content: Any) -> None:
        known.append(path in {each.path for each in fake.ledger.exports()})
        write(path, content)

    fake.exports.write = looking  # type: ignore[method-assign]
    seq = fake.ledger.seq()
    made = export(fake, "a")
    assert known == [True] * len(made) == [True] * 3
    assert fake.ledger.seq() == seq + 2  # before and after the files
    heads = {head.shard: head.key for head in fake.ledger.heads()}
    assert {each.shard: each.key for each in made} == heads
    assert all(fake.exports.standing(each) == "held" for each in made)


class Signing(PatchesHook):
    """A hook that adds a line to each card, and a file over all others."""

    def export(self, context: Context, name: str, files: Mapping[str, bytes]) -> Mapping[str, bytes]:
        files = {**super().export(context, name, files), CARD: files[CARD] + name.encode()}
        return {**files, SIGNATURE: ",".join(sorted(files)).encode()}


def test_hooks_add_to_an_export_and_a_deletion_erases_that_with_it(fake: FakeModel) -> None:
    fake.context = changed(fake.context, hooks=(Signing(),))
    made = export(fake, "a")
    for each in made:
        files = fake.exports.stored[each.path]
        assert files[SIGNATURE] == b"README.md,adapter_config.json,adapter_model.safetensors"
        assert files[CARD].endswith(f"v1-{Path(each.path).name}".encode())
        assert each.adapter_sha256 == sha256_hex(files[ADAPTER_FILE])
    touched = knows(fake, 3)
    fake.forget(3)
    assert {each.path for each in made} - touched == set(fake.exports.stored)


def test_an_emptied_shard_exports_nothing(fake: FakeModel) -> None:
    fake.forget(*(number for number in range(NUM_RECORDS) if fake.rows(number)[0].shard == 1))
    assert [each.shard for each in export(fake, "a")] == [0, 2]


def test_an_export_that_could_not_be_written_is_forgotten(fake: FakeModel) -> None:
    write, written = fake.exports.write, 0

    def full(path: str, content: Any) -> None:
        nonlocal written
        if written:
            raise EnvironmentFault("the disk refused: no space left")
        written += 1
        write(path, content)

    fake.exports.write = full  # type: ignore[method-assign]
    with pytest.raises(EnvironmentFault):
        export(fake, "a")
    assert [each.path for each in fake.ledger.exports()] == list(fake.exports.stored)
    assert len(fake.exports.stored) == 1


def test_a_deletion_erases_what_it_touched_and_no_more(fake: FakeModel) -> None:
    made = export(fake, "a")
    touched = knows(fake, 3)
    assert len(touched) == 1
    (located,) = where(fake.context, [fake_record(3).id])
    assert set(located.exports) == touched
    assert len(plan_forget(fake.context, fake.rows(3)).exports) == 1
    done = fake.forget(3)
    assert done.exports_erased == 1
    assert knows(fake, 3) == set()
    assert {each.path for each in made} - touched == set(fake.exports.stored)
    assert {each.path for each in fake.ledger.exports()} == set(fake.exports.stored)
    assert stale_exports(fake.context) == []


def test_an_export_of_a_retired_checkpoint_is_erased_too(fake: FakeModel) -> None:
    export(fake, "a")
    add(fake.context, [fake_record(number) for number in range(NUM_RECORDS, 2 * NUM_RECORDS)])
    held = {each.key for each in fake.ledger.checkpoints()}
    assert not held & {each.key for each in fake.ledger.exports()}
    export(fake, "b")
    assert len(knows(fake, 3)) == 2
    assert fake.forget(3).exports_erased == 2
    assert knows(fake, 3) == set()


def test_a_record_that_came_later_is_in_no_earlier_export(fake: FakeModel) -> None:
    made = export(fake, "a")
    add(fake.context, [fake_record(99)])
    assert fake.forget(99).exports_erased == 0
    assert fake.ledger.exports() == made


def test_what_was_moved_is_reported_and_erased_when_it_comes_back(fake: FakeModel) -> None:
    export(fake, "a")
    (path,) = knows(fake, 3)
    files = fake.exports.stored.pop(path)
    done = fake.forget(3)
    assert (done.state, done.exports_erased) == ("completed", 0)
    notes = {each.state: each.note for each in view_of(fake.context, done).events}
    assert notes["erased"] == "1 exports could not be found"
    (lost,) = stale_exports(fake.context)
    assert (lost.path, lost.state, lost.request_id) == (path, "tainted", done.request_id)
    standings = {each.path: each.standing for each in export_statuses(fake.context) if each.standing}
    assert standings == {path: "gone"}
    reconcile(fake.context)
    assert [each.path for each in stale_exports(fake.context)] == [path]
    fake.exports.stored[path] = files
    reconcile(fake.context)
    assert stale_exports(fake.context) == []
    assert path not in fake.exports.stored
    assert find_request(fake.context, done.request_id).exports_erased == 1


def test_what_was_changed_since_is_left_alone(fake: FakeModel) -> None:
    export(fake, "a")
    (path,) = knows(fake, 3)
    fake.exports.stored[path][ADAPTER_FILE] += b" and more"
    mine = dict(fake.exports.stored[path])
    assert fake.forget(3).exports_erased == 0
    assert fake.exports.stored[path] == mine
    assert [each.path for each in stale_exports(fake.context)] == [path]


@settings(max_examples=60, deadline=None)
@given(fuse=st.builds(Fuse, st.integers(1, 21), st.booleans()))
def test_a_crash_anywhere_leaves_no_stale_export_behind(fuse: Fuse) -> None:
    """Before or after any commit and any erasure, or between the two files of one."""
    fake = trained()
    export(fake, "a")
    add(fake.context, [fake_record(50)])
    export(fake, "b")
    erase = fake.exports.erase

    def erase_each_file(given: Export) -> bool:
        fake.exports.stored.get(given.path, {}).pop(ADAPTER_FILE, None)
        return bool(fuse.guard(erase)(given))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fake.exports, "erase", erase_each_file)
        with fuse.on((fake.ledger, "commit"), (fake.exports, "erase")):
            fake.forget(3)
    reconcile(fake.context)
    if not fake.ledger.requests():
        assert len(knows(fake, 3)) == 2
        fake.forget(3)
    assert knows(fake, 3) == set()
    assert stale_exports(fake.context) == []
    assert {each.path for each in fake.ledger.exports()} == set(fake.exports.stored)
    (request,) = fake.ledger.requests()
    assert (request.state, request.exports_erased) == ("completed", 2)


def test_one_of_several_requests_is_named(fake: FakeModel) -> None:
    export(fake, "a")
    (one,) = fake.rows(3)
    other = next(each for each in fake.ledger.rows(one.shard) if each != one)
    terms = Terms(approver="dpo")
    waiting = [submit(fake.context, [each], (), terms) for each in (one, other)]
    done = carry_out(fake.context, waiting)
    assert sorted(each.exports_erased for each in done) == [0, 1]


def test_exports_outlive_a_new_layout_and_are_still_erased(fake: FakeModel) -> None:
    """The former positions are unknown: exports that may hold the record are erased, later ones stay."""
    old = export(fake, "a")
    layout = Layout(2, 3)
    context = changed(fake.context, assigner=Assigner(Keyed(SECRET), layout))
    reset(context, {})
    reconcile(context)
    fake.context = context
    assert {each.shard for each in fake.ledger.exports()} == {ANY_SHARD}
    assert len(fake.exports.stored) == len(old)
    export(fake, "b")
    add(context, [fake_record(99)])
    assert fake.forget(99).exports_erased == 0
    assert fake.forget(3).exports_erased == len(old) + 1
    assert knows(fake, 3) == set()


def test_a_target_that_is_no_directory_is_refused_before_anything(
    fake: FakeModel, tmp_path: Path
) -> None:
    (tmp_path / "out").touch()
    seq = fake.ledger.seq()
    with pytest.raises(InvalidInput):
        export(fake, "out", tmp_path)
    assert fake.ledger.seq() == seq


def test_no_version_is_used_twice(fake: FakeModel, tmp_path: Path) -> None:
    first = export(fake, "out", tmp_path)
    (tmp_path / "out" / "v4").mkdir(parents=True)
    (tmp_path / "out" / "mine").touch()
    assert {Path(each.path).parent.name for each in first} == {"v1"}
    assert {Path(each.path).parent.name for each in export(fake, "out", tmp_path)} == {"v5"}
    (tmp_path / "out" / "v4").rmdir()
    assert {Path(each.path).parent.name for each in export(fake, "out", tmp_path)} == {"v6"}


MERGED = "/merged/v1/merged-adapter"


def export_merged(fake: FakeModel) -> None:
    """Leave what a merged form leaves: one directory, a row for each shard that is in it."""
    made = export(fake, "a")
    content = dict(fake.exports.stored[made[0].path])
    fake.exports.stored = {MERGED: content}
    digest = sha256_hex(content[ADAPTER_FILE])
    rows = [replace(e, path=MERGED, adapter_sha256=digest, form="merged-adapter") for e in made]
    fake.ledger.commit(Change(exports=rows, unexported=[each.name for each in made]))


def test_shards_that_were_exported_together_go_together(fake: FakeModel) -> None:
    export_merged(fake)
    planned = plan_forget(fake.context, fake.rows(3))
    assert len(planned.plans) == 1, "one shard is touched"
    assert planned.exports == (MERGED,)
    done = fake.forget(3)
    assert (fake.exports.stored, fake.ledger.exports()) == ({}, [])
    assert done.exports_erased == 1


def test_an_export_of_a_former_layout_is_named_once_for_a_record(fake: FakeModel) -> None:
    export_merged(fake)
    moved = [replace(each, shard=ANY_SHARD, prefix=()) for each in fake.ledger.exports()]
    fake.ledger.commit(Change(exports=moved))
    (found,) = where(fake.context, [fake_record(3).id])
    assert found.exports == (MERGED,)


def test_an_export_of_several_shards_is_listed_once_with_its_shards(fake: FakeModel) -> None:
    export_merged(fake)
    (found,) = export_statuses(fake.context)
    assert (found.path, found.shard, found.shards) == (MERGED, 0, (0, 1, 2))
    (recipient,) = recipients(fake.context, fake.rows(3), ())
    assert (recipient.path, recipient.shards) == (MERGED, (0, 1, 2)), "whichever shard holds the record"
    fake.exports.stored.clear()
    fake.forget(3)
    (found,) = export_statuses(fake.context)
    assert found.standing == "gone"
    assert [each.where for each in findings._exports(fake.context)] == [MERGED]


def test_a_lost_export_of_several_shards_counts_once(fake: FakeModel) -> None:
    export_merged(fake)
    fake.exports.stored.clear()
    done = fake.forget(3)
    assert len(stale_exports(fake.context)) > 1
    assert stale_paths(fake.context) == [MERGED]
    assert give_up_lost(fake.context) == (MERGED,)
    notes = [each.note for each in view_of(fake.context, done).events if "export" in each.note]
    assert notes == ["1 exports could not be found", "1 lost exports were given up"]


def test_the_path_in_the_ledger_has_no_link_in_it(fake: FakeModel, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    made = export(fake, "out", tmp_path / "link")
    assert {Path(each.path).parent for each in made} == {tmp_path.resolve() / "real" / "out" / "v1"}


def test_a_retired_row_of_an_export_is_only_dropped_with_its_files(fake: FakeModel) -> None:
    made = export(fake, "a")
    fake.ledger.commit(Change(exports=[replace(made[0], state="tainted", request_id="req-x")]))
    reconcile(fake.context)
    assert made[0].path not in fake.exports.stored
    assert fake.ledger.exports() == made[1:]
