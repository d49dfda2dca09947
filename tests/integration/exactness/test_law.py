"""The law of exactness on real LoRA training, with dropout and warm-up.

After any additions and deletions, in any batches, every file of a model (adapters, optimizer states,
slices, index) has the bytes of a model that was trained from scratch on what remains, in this process,
in another one, and in any number of Ray workers. What a deletion does not concern is not even
rewritten.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

import sisa
from cluster.ray.executor import open_executor
from sisa.core.ports import Executor
from sisa.flows.chains import Site
from sisa.flows.wiring.executors import OpenExecutor
from sisa.store.areas import CHECKPOINTS, INDEX, RECORDS
from tests.models.programs.forked import run_forked
from tests.models.tiny_model import (
    PEOPLE,
    Row,
    Tiny,
    adapters,
    held_files,
    identities,
    ids_of,
    of_people,
    train_scratch,
    without,
    write_rows,
    write_run,
)
from tests.pinned import model_lines

pytestmark = pytest.mark.torch

SCHEDULES = ("cumulative", "sequential")
LATER = ids_of(of_people("p009", "p011"))
FIRST, ADDED = without(PEOPLE, LATER), of_people("p009", "p011")
ONE, BATCH, SUBJECT = ["p002-q1"], ["p001-q2", "p006-q1", "p011-q1"], "p005"
REMAINING = [row for row in without(PEOPLE, [*ONE, *BATCH]) if row["subject_id"] != SUBJECT]
IN_A_FRESH_PROCESS = (
    "import json, sys, sisa\n"
    "from pathlib import Path\n"
    "from tests.models.tiny_model import held_files\n"
    "model, _ = sisa.train_model(sys.argv[1], executor='serial')\n"
    "found = [model.status().model_digest, held_files(model.directory)]\n"
    "Path(sys.argv[1]).with_name('found.json').write_text(json.dumps(found))\n"
)


def live_a_life(run_file: Path, executor: str | OpenExecutor = "serial") -> sisa.Model:
    """Train, add, and forget one record, a batch and a subject."""
    model, _ = sisa.train_model(run_file, executor=executor, allow_deleted=True)
    model.add(write_rows(run_file.parent / "later.jsonl", ADDED))
    model.forget(ONE)
    model.forget(BATCH)
    model.forget(subject=SUBJECT)
    return model


def run_file_of(folder: Path, base: Path, rows: list[Row], schedule: str, **cluster: int) -> Path:
    block = {"slices": 3, "schedule": schedule}
    return write_run(folder, base, rows, sisa_block=block, cluster=cluster)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_history_ends_in_the_bytes_of_training_from_scratch_here_and_in_a_fresh_process(
    tmp_path: Path, tiny_base: Path, schedule: str
) -> None:
    model = live_a_life(run_file_of(tmp_path / "a", tiny_base, FIRST, schedule))
    assert len(adapters(model.directory)) == 8  # of 9 slices, one was left empty
    scratch = run_file_of(tmp_path / "b", tiny_base, REMAINING, schedule)
    assert run_forked(IN_A_FRESH_PROCESS, scratch) == 0
    digest, files = json.loads((tmp_path / "b" / "found.json").read_text())
    assert held_files(model.directory) == files
    assert model.status().model_digest == digest
    proof = model.verify(replay="all")  # trains in this process
    assert proof.ok
    assert [each.equal for each in proof.shards] == [True, True, True]
    assert [each.equal_apart for each in proof.shards].count(True) == 1


@pytest.mark.ray
@pytest.mark.slow
def test_a_history_on_ray_ends_in_the_bytes_of_serial_training(tmp_path: Path, tiny_base: Path) -> None:
    scratch = run_file_of(tmp_path / "serial", tiny_base, REMAINING, "cumulative")
    expected = held_files(sisa.train_model(scratch, executor="serial")[0].directory)
    numbers = cycle((2, 1))

    def open_on_ray(site: Site, options: Mapping[str, Any]) -> Executor:
        return open_executor(site, {**options, "num_workers": next(numbers)})

    model = live_a_life(run_file_of(tmp_path / "ray", tiny_base, FIRST, "cumulative"), open_on_ray)
    assert held_files(model.directory) == expected
    assert next(numbers) == 1  # each number trained


def test_other_records_give_other_bytes(tmp_path: Path, tiny_base: Path, tiny: Tiny) -> None:
    """The comparison can fail: one record less changes its shard's adapters and no other's."""
    less = train_scratch(tmp_path / "less", tiny_base, without(PEOPLE, ONE))
    with_it = {each.shard: each.adapter_sha256 for each in tiny.open().status().shards}
    without_it = {each.shard: each.adapter_sha256 for each in less.status().shards}
    assert [shard for shard in with_it if with_it[shard] != without_it[shard]] == [0]
    assert held_files(tiny.directory) != held_files(less.directory)


def test_a_deletion_rewrites_nothing_that_it_does_not_concern(tiny: Tiny) -> None:
    """p009 is in shard 0, slice 1: slice 0's checkpoint there and all of shards 1 and 2 stay."""
    model = tiny.open()
    before = identities(tiny.directory)
    touched = {each.key for each in model.where(["p009-q1"])[0].checkpoints}
    assert len(touched) == 1
    model.forget(["p009-q1"])
    after = identities(tiny.directory)
    kept = {
        name: identity
        for name, identity in before.items()
        if name.split("/")[0] == CHECKPOINTS and name.split("/")[1] not in touched
    }
    kept |= {
        name: identity
        for name, identity in before.items()
        if name.startswith((f"{RECORDS}/", f"{INDEX}/"))
        and not name.startswith((f"{RECORDS}/shard-00000-slice-00001", f"{INDEX}/shard-00000"))
    }
    assert len({name.split("/")[1] for name in kept if name.startswith(CHECKPOINTS)}) == 5
    assert {name: after.get(name) for name in kept} == kept
    assert not [name for name in after if name.split("/")[1:2] and name.split("/")[1] in touched]


def test_what_a_refactoring_is_compared_by_is_the_same_each_time(tmp_path: Path) -> None:
    found = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        found.append(model_lines(tmp_path / name))
    assert found[0] == found[1]
    assert found[0][-4:] != found[0][:4]
