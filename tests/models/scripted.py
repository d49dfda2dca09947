"""Train by a script in a directory, without torch, so that nodes and workers are cheap; make its chains.

The trained bytes are a hash of parent, job and records. Files in the script's directory make the trainer
die, fail or wait at a given slice.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.ray.proofs import Proof
from cluster.ray.shared_base import BaseManifest, holds_base
from sisa.core.digest import sha256_hex
from sisa.core.domain import BaseFiles, Chain, Part, Precision, Record, SliceFile, SliceJob
from sisa.core.errors import IntegrityError
from sisa.core.events import silent
from sisa.core.ports import BlobStore, CheckpointStore, RecordStore, StoredRecord, Tick, Trainer
from sisa.flows.chains import SerialExecutor, Site
from sisa.lm.base.numerics import fingerprint
from sisa.store.blobs.local_blobs import LocalBlobs
from sisa.store.checkpoints import FileCheckpoints
from sisa.store.records import FileRecords
from tests.fakes.keyring import PLAIN

NODE = "SCRIPTED_NODE"  # an environment variable of a node: its name
DIGEST = "SCRIPTED_DIGEST"  # another: the fingerprint and self-test digest that the node shows
NUM_SHARDS = 3
NUM_SLICES = 3
SECRET_TEXT = "Ada Quillfeather kept bees in Marrowdale"


class ScriptedTrainer:
    """Hash the given records; files such as `kill-0.1` name a slice and what happens to it.

    `trained.log` has a line for each slice begun: the slice, the process and the node.
    """

    def __init__(self, script: Path) -> None:
        self._script = script

    def train(
        self,
        job: SliceJob,
        parent: Mapping[str, bytes] | None,
        records: Sequence[StoredRecord],
        progress: Callable[[Tick], None],
    ) -> dict[str, bytes]:
        with (self._script / "trained.log").open("a") as log:
            log.write(f"{job.shard}.{job.slice} {os.getpid()} {os.environ.get(NODE, '-')}\n")
        progress(Tick(1, 2))
        self._suffer(f"{job.shard}.{job.slice}", records)
        progress(Tick(2, 2))
        before = parent["adapter_model.safetensors"] if parent else b""
        text = "".join(each.record.canonical() for each in records)
        weights = sha256_hex(before + job.key.encode() + text.encode())
        return {"adapter_model.safetensors": weights.encode(), "state.json": b"{}"}

    def _suffer(self, place: str, records: Sequence[StoredRecord]) -> None:
        while (self._script / f"wait-{place}").exists():
            time.sleep(0.05)
        if self._once(f"stop-{place}"):
            os.kill(os.getpid(), signal.SIGSTOP)
        if self._once(f"hungry-{place}"):
            eaten = []
            while True:  # until Ray's memory monitor ends it
                eaten.append(b"x" * 2**28)
        if (self._script / f"kill-{place}").exists():
            if not (self._script / "kill-always").exists():
                (self._script / f"kill-{place}").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        if (self._script / f"fail-{place}").exists():
            raise IntegrityError("a slice file is wrong", where=place, next_step="run verify")
        if (self._script / f"break-{place}").exists():
            raise ValueError(records[0].record.text)
        if (self._script / f"full-{place}").exists():
            raise OSError(28, "No space left on device", "/data/x")

    def _once(self, name: str) -> bool:
        there = (self._script / name).exists()
        (self._script / name).unlink(missing_ok=True)
        return there


def open_scripted(site: Site) -> tuple[Trainer, RecordStore, CheckpointStore]:
    stores = FileRecords(site.records_at, PLAIN), FileCheckpoints(site.checkpoints_at, PLAIN)
    return ScriptedTrainer(script_of(site)), *stores


def script_of(site: Site) -> Path:
    return folder_of(site) / "script"


def folder_of(site: Site) -> Path:
    """Return the folder that holds everything of a site."""
    return Path(site.records_at.location()).parent


def make_site(folder: Path) -> Site:
    (folder / "script").mkdir(parents=True, exist_ok=True)
    places = LocalBlobs(folder / "records"), LocalBlobs(folder / "checkpoints")
    return Site(*places, BaseFiles(folder / "script", "b1"), threads=1, keyring=PLAIN)


def make_chains(site: Site) -> list[Chain]:
    records = FileRecords(site.records_at, PLAIN)
    return [make_chain(records, shard) for shard in range(NUM_SHARDS)]


def make_chain(records: FileRecords, shard: int) -> Chain:
    """Return a chain of one record a slice, the longer the higher the shard."""
    slices = []
    for slice_ in range(NUM_SLICES):
        part = Part("text", f"{SECRET_TEXT} {shard} {slice_}")
        record = Record(f"secret-{shard}-{slice_}", None, "text", (part,))
        slices.append([StoredRecord(sha256_hex(record.id.encode()), record)])
    training = {"learning_rate": 0.1}
    return chain_over(records, shard, slices, passes=(shard + 1, 1), training=training, base="b1")


def chain_over(
    store: FileRecords, shard: int, slices: Sequence[Sequence[StoredRecord]], **of_jobs: Any
) -> Chain:
    """Write a shard's slices, and return its chain of cumulative stages."""
    files: list[SliceFile] = []
    jobs: list[SliceJob] = []
    for slice_, records in enumerate(slices):
        root = sha256_hex("".join(each.id_digest for each in records).encode())
        files.append(store.write(shard, slice_, root, records))
        jobs.append(
            SliceJob(
                shard=shard,
                slice=slice_,
                parent=jobs[-1].key if jobs else None,
                slices=tuple((file.slice, file.root) for file in files),
                num_records=sum(file.num_records for file in files),
                fingerprint=fingerprint(1),
                **of_jobs,
            )
        )
    return Chain(shard, tuple(jobs), None, tuple(files))


def bytes_of(place: BlobStore | Path) -> dict[str, bytes]:
    directory = place if isinstance(place, Path) else Path(place.location())
    found = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in found}


def serial_bytes(site: Site, chains: Sequence[Chain]) -> dict[str, bytes]:
    scratch = replace(site, checkpoints_at=LocalBlobs(folder_of(site) / "serial"))
    SerialExecutor(*open_scripted(scratch)).run(chains, silent)
    (script_of(site) / "trained.log").unlink()
    return bytes_of(scratch.checkpoints_at)


def trained_places(site: Site) -> list[str]:
    """Return the slices in the order in which they were begun."""
    return [place for place, *_ in begun(site)]


def begun(site: Site) -> list[tuple[str, int, str]]:
    """Return (slice, process, node) of each slice begun, in order."""
    log = script_of(site) / "trained.log"
    lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
    return [(place, int(pid), node) for place, pid, node in lines]


def scripted_proof(_threads: int, base_dir: Path, manifest: BaseManifest, _on: Precision) -> Proof:
    """Return the proof that the node's environment names; look for the base."""
    shown, _, digest = os.environ.get(DIGEST, f"{fingerprint(1)} d1").partition(" ")
    return Proof(shown, digest, holds_base(base_dir, manifest))
