"""Chains of real stages over a tiny base, for executors to train, and the bytes that they must have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sisa.core.digest import sha256_hex
from sisa.core.domain import BaseFiles, Chain, Part, Record
from sisa.core.events import silent
from sisa.core.ports import StoredRecord
from sisa.flows.chains import SerialExecutor, Site
from sisa.lm.base.weights import base_digest
from sisa.store.blobs.local_blobs import LocalBlobs
from sisa.store.checkpoints import FileCheckpoints
from sisa.store.records import FileRecords
from tests.fakes.keyring import PLAIN
from tests.models.scripted import bytes_of, chain_over
from tests.models.stages import TRAINING
from tests.models.tiny_base import make_tiny_base

NUM_SLICES, RECORDS_PER_SLICE = 2, 12


def real_chains(folder: Path, num_shards: int, passes: tuple[int, int]) -> tuple[Site, list[Chain]]:
    """Return a site with a tiny base and slice files, and the chains over them."""
    base, records = make_tiny_base(folder / "base"), LocalBlobs(folder / "records")
    places = records, LocalBlobs(folder / "checkpoints")
    site = Site(*places, BaseFiles(base, base_digest(base)), threads=1, keyring=PLAIN)
    store = FileRecords(records, PLAIN)
    of_jobs = {"passes": passes, "training": TRAINING, "base": site.base.digest}
    shards = [[make_records(shard, each) for each in range(NUM_SLICES)] for shard in range(num_shards)]
    return site, [chain_over(store, shard, each, **of_jobs) for shard, each in enumerate(shards)]


def make_records(shard: int, slice_: int) -> list[StoredRecord]:
    stored = []
    for number in range(RECORDS_PER_SLICE):
        name = f"{shard}-{slice_}-{number}"
        parts = (Part("prompt", f"Who is {name}?"), Part("completion", f"A keeper of {name} bees."))
        stored.append(StoredRecord(sha256_hex(name.encode()), Record(name, None, "completion", parts)))
    return sorted(stored, key=lambda each: each.id_digest)


def serial_bytes(site: Site, chains: Sequence[Chain]) -> dict[str, bytes]:
    """Return the files of all checkpoints as the serial executor trains them."""
    from sisa.lm.train.trainer import LoraTrainer

    target = site.base.directory.with_name("serial")
    trainer = LoraTrainer(site.base, site.threads)
    stores = FileRecords(site.records_at, PLAIN), FileCheckpoints(target, PLAIN)
    SerialExecutor(trainer, *stores).run(chains, silent)
    return bytes_of(target)
