"""Test the contract of executors over the serial one with fakes (the Ray one is tested where Ray is).

The longest chain is first. A stage whose checkpoint is in the store is not trained again. A stage sees
the records of its own slices in canonical order and its parent's files, and nothing else. A slice file
or parent that differs from the record stops the chain before anything is trained on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pytest

from sisa.core.domain import Chain, HeldCheckpoint, SliceFile, SliceJob
from sisa.core.errors import IntegrityError
from sisa.core.events import EpochTrained, Event, SliceProgress, SliceStarted, SliceTrained
from sisa.core.ports import StoredRecord, Tick
from sisa.flows.serial import SerialExecutor, order_chains
from sisa.planning.plan import jobs
from tests.fakes.ports import FakeCheckpoints, FakeRecords, FakeTrainer, fake_recipe, fake_record


class Seen(FakeTrainer):
    """Train as the fake does, and record what was given."""

    def __init__(self) -> None:
        self.calls: list[tuple[SliceJob, Mapping[str, bytes] | None, list[str]]] = []

    def train(
        self,
        job: SliceJob,
        parent: Mapping[str, bytes] | None,
        records: Sequence[StoredRecord],
        progress: Callable[[Tick], None],
    ) -> dict[str, bytes]:
        self.calls.append((job, parent, [each.id_digest for each in records]))
        return super().train(job, parent, records, progress)


class Site:
    """Hold slices at rest and an executor over them."""

    def __init__(self) -> None:
        self.records = FakeRecords()
        self.checkpoints = FakeCheckpoints()
        self.trainer = Seen()
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

    def run(self, *chains: Chain) -> None:
        SerialExecutor(self.trainer, self.records, self.checkpoints).run(chains, self.events.append)

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


def test_no_chains_no_events(site: Site) -> None:
    site.run()
    assert site.events == []
