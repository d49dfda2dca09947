"""Test the contract of Trainer over the fake and the real one, on a tiny base.

A stage is a pure function of its arguments: the same job, parent and records give the same bytes, in
whatever order the records come, and each of the three affects them. `property/test_stages.py` adds that
nothing which the process did before affects them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from sisa.core.checkpoint_files import ADAPTER_FILE
from sisa.core.domain import BaseFiles
from sisa.core.ports import Tick, Trainer
from tests.fakes.ports import FakeTrainer
from tests.models.stages import RECORDS, Files, job_for, stored
from tests.models.tiny_base import make_tiny_base


@dataclass
class Stage:
    """Train stages of one shard over one base."""

    base: BaseFiles
    trainer: Trainer

    def first(self, number: int = 0, seed: int = 3, ticks: list[Tick] | None = None) -> Files:
        """Train the first stage, on records of which the last has this number."""
        seen: list[Tick] = [] if ticks is None else ticks
        records = [*RECORDS[:-1], stored(number)]
        return self.trainer.train(job_for(self.base, seed=seed), None, records, seen.append)

    def second(self, parent: Files) -> Files:
        return self.trainer.train(job_for(self.base, 1), parent, RECORDS, lambda _: None)


@pytest.fixture(scope="module", params=["fake", pytest.param("real", marks=pytest.mark.torch)])
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    if request.param == "fake":
        return Stage(BaseFiles(Path("none"), "b" * 64), FakeTrainer())
    from sisa.lm.base.weights import resolve_base
    from sisa.lm.train.trainer import LoraTrainer

    base = resolve_base(str(make_tiny_base(tmp_path_factory.mktemp("base"))))
    return Stage(base, LoraTrainer(base, threads=1))


def test_the_same_arguments_give_the_same_bytes(stage: Stage) -> None:
    parent = stage.first()
    assert stage.first() == parent
    assert stage.second(dict(parent)) == stage.second(parent)


def test_the_order_of_records_is_irrelevant(stage: Stage) -> None:
    one, other = (
        stage.trainer.train(job_for(stage.base), None, records, lambda _: None)
        for records in (RECORDS, RECORDS[::-1])
    )
    assert one == other


def test_every_argument_reaches_the_bytes(stage: Stage) -> None:
    one, other = stage.first(), stage.first(99)
    found = [one, other, stage.first(seed=4), stage.second(one), stage.second(other)]
    assert len({files[ADAPTER_FILE] for files in found}) == len(found)


def test_the_arguments_are_left_as_they_were(stage: Stage) -> None:
    parent, records = stage.first(), list(RECORDS)
    kept = dict(parent)
    stage.second(parent)
    assert (parent, records) == (kept, RECORDS)


def test_progress_grows_up_to_its_total(stage: Stage) -> None:
    ticks: list[Tick] = []
    stage.first(ticks=ticks)
    assert len({each.total_tokens for each in ticks}) == 1
    assert [each.tokens for each in ticks] == sorted(each.tokens for each in ticks)
    assert ticks[-1].tokens == ticks[-1].total_tokens > 0
    assert (ticks[-1].step, ticks[-1].epoch) == (ticks[-1].num_steps, ticks[-1].num_epochs)
    assert ticks[-1].loss is not None
