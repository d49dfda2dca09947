"""Test the contract of Trainer over the fake (the real one is tested where torch is).

A stage is a pure function of its arguments: the same job, parent and records give the same bytes, and
each of the three affects them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sisa.core.checkpoint_files import ADAPTER_FILE
from sisa.core.domain import SliceJob
from sisa.core.ports import StoredRecord, Tick, Trainer
from tests.fakes.ports import FakeTrainer, fake_record

JOB = SliceJob(0, 1, "parent", ((1, "root"),), 2, (1, 1), {"seed": 1}, "base", "f")
RECORDS = [StoredRecord(f"{number}", fake_record(number)) for number in range(3)]


def trained(
    job: SliceJob = JOB,
    parent: dict[str, bytes] | None = None,
    records: Sequence[StoredRecord] = RECORDS,
    ticks: list[Tick] | None = None,
) -> dict[str, bytes]:
    trainer: Trainer = FakeTrainer()
    seen: list[Tick] = [] if ticks is None else ticks
    return trainer.train(job, parent, records, seen.append)


def test_the_same_arguments_give_the_same_bytes() -> None:
    parent = trained(records=RECORDS[:1])
    assert trained(parent=parent) == trained(parent=dict(parent))
    assert ADAPTER_FILE in trained()


def test_every_argument_reaches_the_bytes() -> None:
    parent = trained(records=[StoredRecord("9", fake_record(9))])
    found = [
        trained(),
        trained(replace(JOB, base="other")),
        trained(parent=parent),
        trained(records=RECORDS[:2]),
    ]
    assert len({files[ADAPTER_FILE] for files in found}) == len(found)


def test_the_arguments_are_left_as_they_were() -> None:
    parent = trained(records=RECORDS[:1])
    kept, records = dict(parent), list(RECORDS)
    trained(parent=parent, records=records)
    assert (parent, records) == (kept, RECORDS)


def test_progress_grows_up_to_its_total() -> None:
    ticks: list[Tick] = []
    trained(ticks=ticks)
    assert len({each.total_tokens for each in ticks}) == 1
    assert [each.tokens for each in ticks] == sorted(each.tokens for each in ticks)
    assert ticks[-1].tokens == ticks[-1].total_tokens
    assert (ticks[-1].step, ticks[-1].epoch) == (ticks[-1].num_steps, ticks[-1].num_epochs)
    assert ticks[-1].loss is not None
