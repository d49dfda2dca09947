"""Test the contract of executors over the serial one with fakes (the Ray one is tested where Ray is).

The longest chain is first. A stage whose checkpoint is in the store is not trained again. A stage sees
the records of its own slices in canonical order and its parent's files, and nothing else. A slice file
or parent that differs from the record stops the chain before anything is trained on it.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest

from sisa.core.domain import Chain, HeldCheckpoint, SliceFile, SliceJob
from sisa.core.errors import IntegrityError
from sisa.core.events import EpochTrained, Event, Notice, SliceProgress, SliceStarted, SliceTrained
from sisa.core.ports import StoredRecord
from sisa.flows.chains import SerialExecutor, _Clock, num_lanes, order_chains
from sisa.planning.plan import jobs
from tests.fakes.ports import FakeCheckpoints, FakeRecords, FakeTrainer, fake_recipe, fake_record


class Seen(FakeTrainer):
    """Train as the fake does, and record what was given."""

    def __init__(self) -> None:
        self.calls: list[tuple[SliceJob, Mapping[str, bytes] | None, list[str]]] = []

    def train(self, job: SliceJob, parent: Any, records: Any, *rest: Any) -> dict[str, bytes]:
        self.calls.append((job, parent, [each.id_digest for each in records]))
        return super().train(job, parent, records, *rest)


class Site:
    """Hold slices at rest and an executor over them."""

    def __init__(self) -> None:
        self.records = FakeRecords()
        self.checkpoints = FakeCheckpoints()
        self.trainer: Any = Seen()
        self.events: list[Event] = []

    def chain(self, shard: int, *sizes: int) -> Chain:
        files = tuple(self.slice(shard, number, size) for number, size in enumerate(sizes))
        return Chain(shard, jobs(shard, files, fake_recipe(), "f"), None, files)

    def slice(self, shard: int, slice_: int, size: int) -> SliceFile:
        # Digests descend as slices ascend, so a stage that only appended slices would be out of order.
        stored = [
            StoredRecord(f"{9 - slice_}{number}", fake_record(100 * shard + 10 * slice_ + number))
            for number in range(size)
        ]
        return self.records.write(shard, slice_, f"root-{shard}-{slice_}-{size}", stored)

    def run(self, *chains: Chain, lanes: int = 1) -> None:
        executor = SerialExecutor(self.trainer, self.records, self.checkpoints, lanes)
        executor.run(chains, self.events.append)

    def trained(self) -> list[tuple[int, int]]:
        return [(job.shard, job.slice) for job, _, _ in self.trainer.calls]

    def done(self) -> list[SliceTrained]:
        return [event for event in self.events if isinstance(event, SliceTrained)]


@pytest.fixture
def site() -> Site:
    return Site()


def held(site: Site, job: SliceJob) -> HeldCheckpoint:
    saved = site.checkpoints.describe(job.key)
    return HeldCheckpoint(
        job.key, job.shard, job.prefix, 1, "f", saved.manifest_sha256, saved.adapter_sha256, 1, 1.0, 1
    )


def test_the_longest_chain_goes_first(site: Site) -> None:
    short, long, middle = site.chain(0, 1), site.chain(1, 5, 5), site.chain(2, 4)
    site.run(short, long, middle)
    assert site.trained() == [(1, 0), (1, 1), (2, 0), (0, 0)]


def test_equal_chains_go_by_shard(site: Site) -> None:
    chains = [site.chain(shard, 2) for shard in (3, 1, 2)]
    assert [chain.shard for chain in order_chains(chains)] == [1, 2, 3]


def test_a_stage_sees_its_slices_in_canonical_order_and_its_parent(site: Site) -> None:
    chain = site.chain(0, 2, 1)
    site.run(chain)
    (first, no_parent, early), (second, parent, late) = site.trainer.calls
    assert (first, second) == chain.jobs
    assert no_parent is None
    assert parent == site.checkpoints.stored[first.key]
    assert early == ["90", "91"]
    assert late == ["80", "90", "91"]


def test_every_stage_rests_in_the_store_and_is_reported_once(site: Site) -> None:
    chains = [site.chain(0, 2, 1), site.chain(1, 3)]
    site.run(*chains)
    keys = [job.key for chain in chains for job in chain.jobs]
    assert site.checkpoints.held() == set(keys)
    assert sorted(event.job.key for event in site.done()) == sorted(keys)
    for event in site.done():
        assert site.checkpoints.describe(event.job.key) == event.saved
        assert event.tokens == event.job.num_records  # the fake's token is a record


def test_progress_is_reported_between_start_and_end(site: Site) -> None:
    site.run(site.chain(0, 3))
    expected = [SliceStarted, EpochTrained, SliceProgress, SliceTrained]
    assert [type(event) for event in site.events] == expected
    assert site.events[2] == SliceProgress(0, 0, 3, 3, 1, 1, 1, 1)


def test_the_store_is_listed_once_for_all_chains(site: Site) -> None:
    site.checkpoints.held = Mock(wraps=site.checkpoints.held)  # type: ignore[method-assign]
    site.run(*(site.chain(shard, 1) for shard in range(3)))
    assert len(site.trained()) == 3
    assert site.checkpoints.held.call_count == 1


def test_stored_stages_are_not_trained_again(site: Site) -> None:
    chain = site.chain(0, 2, 2, 2)
    site.run(chain)
    whole = dict(site.checkpoints.stored)
    site.checkpoints.erase([chain.jobs[2].key])
    site.trainer.calls.clear()
    site.events.clear()
    site.run(chain)
    assert site.trained() == [(0, 2)]
    assert site.checkpoints.stored == whole
    assert [event.job for event in site.done()] == list(chain.jobs)


def test_a_chain_goes_on_from_its_parent(site: Site) -> None:
    chain = site.chain(0, 2, 2)
    site.run(chain)
    whole = dict(site.checkpoints.stored)
    site.checkpoints.erase([chain.jobs[1].key])
    site.trainer.calls.clear()
    site.run(replace(chain, jobs=chain.jobs[1:], parent=held(site, chain.jobs[0])))
    assert site.trained() == [(0, 1)]
    assert site.checkpoints.stored == whole


def test_another_parent_is_refused(site: Site) -> None:
    chain = site.chain(0, 2, 2)
    site.run(replace(chain, jobs=chain.jobs[:1]))
    parent = replace(held(site, chain.jobs[0]), manifest_sha256="0" * 64)
    with pytest.raises(IntegrityError):
        site.run(replace(chain, jobs=chain.jobs[1:], parent=parent))
    assert site.trained() == [(0, 0)]


def test_another_slice_file_than_the_jobs_is_refused(site: Site) -> None:
    chain = site.chain(0, 2)
    other = site.slice(0, 0, 3)
    with pytest.raises(IntegrityError, match="disagree"):
        site.run(replace(chain, slices=(other,)))
    assert site.trained() == []
    assert site.checkpoints.held() == frozenset()


def test_a_missing_slice_file_is_refused(site: Site) -> None:
    chain = site.chain(0, 2)
    site.records.erase([chain.slices[0].name])
    with pytest.raises(IntegrityError):
        site.run(chain)
    assert site.trained() == []


class Sided(Seen):
    """Train as the fake does, side by side with others unless refused."""

    def __init__(self, refusal: str | None = None) -> None:
        super().__init__()
        self.refusal, self.together = refusal, list[list[int]]()

    def refuse_lanes(self, _training: Mapping[str, Any]) -> str | None:
        return self.refusal

    def begin(self, job: SliceJob, *given: Any) -> Generator[int, None, dict[str, bytes]]:
        yield from [job.shard] * job.num_records
        return self.train(job, *given)

    def compute(self, waiting: Sequence[int]) -> None:
        self.together.append([*waiting])


def test_a_chain_that_ends_makes_room_for_the_next(site: Site) -> None:
    site.trainer = Sided()
    chains = [site.chain(0, 3), site.chain(1, 2, 1), site.chain(2, 1), site.chain(3, 1)]
    site.run(*chains, lanes=2)
    assert site.trainer.together == [[1, 0], [1, 0], [1, 0], [1, 2], [1, 3]]
    beside = site.checkpoints.stored
    site.checkpoints, site.trainer = FakeCheckpoints(), Seen()
    site.run(*chains, lanes=2)  # its trainer has no lanes
    assert site.checkpoints.stored == beside


def test_a_trainer_that_refuses_trains_one_after_another(site: Site) -> None:
    site.trainer = Sided("the rows differ")
    site.run(site.chain(0, 2), site.chain(1, 3), lanes=2)
    assert site.trainer.together == []
    assert site.trained() == [(1, 0), (0, 0)]
    (notice,) = (event.text for event in site.events if isinstance(event, Notice))
    assert "the rows differ" in notice


def test_auto_is_several_lanes_for_many_small_micro_batches(site: Site) -> None:
    def chains(size: int, count: int, **training: Any) -> list[Chain]:
        found = [site.chain(shard, 150) for shard in range(count)]
        training["micro_batch_size"] = size
        return [
            replace(chain, jobs=tuple(replace(job, training=training) for job in chain.jobs))
            for chain in found
        ]

    assert num_lanes("auto", chains(1, 50)) == 4
    assert num_lanes("auto", chains(2, 20)) == 4
    assert num_lanes("auto", chains(1, 3)) == 3
    for one in (chains(1, 1), chains(3, 50), chains(2, 2), chains(1, 50, device="cuda"), []):
        assert num_lanes("auto", one) <= 1
    assert num_lanes(3, chains(8, 50)) == 3


def test_time_of_lanes_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    at = [10.0]
    monkeypatch.setattr("sisa.flows.chains.time.monotonic", lambda: at[0])
    clock = _Clock()
    at[0] += 3
    assert clock.seconds() == 3
    clock.share_by(4)
    at[0] += 8
    assert clock.seconds() == 5


def test_no_chains_no_events(site: Site) -> None:
    site.run()
    assert site.events == []
