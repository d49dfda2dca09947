"""Make a model of 24 confessing records in a directory, before and after one deletion, without torch.

Stores, ledger and index are real; witness, trainer and patcher are fakes, the base is only a name. The
fingerprint is this machine's, so that `open_model` and the command line agree with the `Context` built
here. Real training is tested in `tests/integration`.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from sisa.config.config import RunConfig
from sisa.config.runfile import parse_run_file
from sisa.core.digest import Keyed
from sisa.core.domain import BaseFiles, Record, RecordRow
from sisa.core.event_chain import EventChain, key_name
from sisa.core.ports import StoredRecord
from sisa.flows.chains import SerialExecutor, Site
from sisa.flows.context.context import Compute, Context, Settings, Stores
from sisa.flows.ingest import train
from sisa.flows.requests import Terms, carry_out, submit
from sisa.flows.wiring import wiring
from sisa.flows.wiring.executors import open_stores
from sisa.flows.wiring.keys import key_path, open_keyring, vault_keyring
from sisa.flows.wiring.ledger_place import LEDGER, LOCK
from sisa.flows.wiring.resources import Resources, indexed_digest
from sisa.lm.base.numerics import fingerprint
from sisa.lm.routing.embedder import HashingEmbedder
from sisa.lm.routing.names import NameEmbedder
from sisa.planning.layout import Assigner
from sisa.store import areas
from sisa.store.blobs import files
from sisa.store.blobs.files import writer_lock
from sisa.store.blobs.keyring import write_secret
from sisa.store.checkpoints import FileCheckpoints
from sisa.store.exports import DirectoryExports
from sisa.store.hidden_states import FileHiddenStates
from sisa.store.index import FaissIndex
from sisa.store.ledger.ledger import SqlLedger
from sisa.store.metrics import FileMetrics
from sisa.store.records import FileRecords
from sisa.store.vault import FilePatchDrafts, FileVault
from tests.fakes.patches import FakePatchDrafts, FakePatcher
from tests.fakes.ports import SECRET, FakeTrainer, FakeWitness, fake_record

RUN_FILE = """
datasets: [{path: owner/people}]
output_dir: model
sisa: {shards: 2, slices: 3, embedder: hashing}
"""
BASE = "b" * 64
NUM_RECORDS = 24
DELETED = 7
NAME = "0" * 32
THEN = "2020-01-01T00:00:00+00:00"


def record(number: int) -> Record:
    return fake_record(number)


@contextlib.contextmanager
def context_of(
    directory: Path, *, create: RunConfig | None = None, numerics: str = "", now: str = THEN
) -> Iterator[Context]:
    """Open the context of a directory, of real stores and a fake trainer."""
    ledger = SqlLedger(directory / LEDGER, create=create is not None)
    config = create or RunConfig.from_canonical(ledger.meta()["config"])
    embedder = NameEmbedder(HashingEmbedder())
    keyring = open_keyring(config, NAME)
    blobs = areas.open_areas(directory, config.storage, NAME)
    records = FileRecords(blobs[areas.RECORDS], keyring)
    patches = FileCheckpoints(blobs[areas.PATCHES], keyring, areas.PATCHES)
    vault = FileVault(directory / areas.VAULT, vault_keyring(config, NAME))
    stores = Stores(
        ledger=ledger,
        witness=FakeWitness(),
        records=records,
        checkpoints=FileCheckpoints(blobs[areas.CHECKPOINTS], keyring),
        index=FaissIndex(directory / areas.INDEX, embedder.dimension, keyring),
        keyring=keyring,
        exports=DirectoryExports(),
        metrics=FileMetrics(directory / areas.METRICS),
        patches=patches,
        vault=vault,
        patch_drafts=FilePatchDrafts(directory / areas.RUNS, vault.keyring),
        hidden_states=FileHiddenStates(blobs[areas.HIDDEN_STATES], keyring),
        blobs=blobs,
    )
    compute = Compute(
        embedder=lambda: embedder,
        base=lambda: BaseFiles(Path("no-base"), BASE),
        tokenizer=lambda: None,
        count_tokens=lambda some: [1 for _ in some],
        executor_for=lambda store: SerialExecutor(FakeTrainer(), records, store),
        patcher=lambda: FakePatcher(vault, patches, FakePatchDrafts()),
        fingerprint=numerics or fingerprint(config.sisa.threads_per_shard),
    )
    settings = Settings(
        config,
        assigner=Assigner(Keyed(SECRET), config.layout),
        unpatched_recipe=config.recipe(BASE),
        chain=EventChain(Keyed(SECRET)),
    )
    context = Context(stores, compute, settings, lambda: now, lambda _: None, wiring.HOOKS)
    with contextlib.closing(ledger):
        yield context


def build(directory: Path, *, encrypt: bool = False) -> None:
    """Train the model on all records; keys of an encrypted one go to the state directory."""
    config = parse_run_file(RUN_FILE, "run.yaml").model_copy(update={"encrypt": encrypt})
    train_in(directory, config, [record(number) for number in range(NUM_RECORDS)])


def train_in(
    directory: Path,
    config: RunConfig,
    records: Sequence[Record],
    *,
    numerics: str = "",
    now: str = THEN,
) -> None:
    """Make a model of these records in a directory."""
    write_secret(key_path(directory, config, NAME), SECRET)
    files.make_directory(directory)
    with writer_lock(directory / LOCK):
        pass
    embedder = NameEmbedder(HashingEmbedder())
    named = {"name": "hashing", "digest": indexed_digest(embedder), "dimension": embedder.dimension}
    meta = {
        "config": config.to_canonical(),
        "base": json.dumps({"name": "base", "digest": BASE}),
        "embedder": json.dumps(named),
        "key": key_name(Keyed(SECRET)),
        "model": NAME,
    }
    with context_of(directory, create=config, numerics=numerics, now=now) as context:
        train(context, records, meta)


def delete(directory: Path, number: int = DELETED) -> None:
    with context_of(directory) as context:
        carry_out(context, [submit(context, [row_of(context, number)], (), Terms(approver="a person"))])


def row_of(context: Context, number: int) -> RecordRow:
    row = context.settings.assigner.row(record(number), 1)
    return next(
        each for each in context.stores.ledger.rows(row.shard) if each.id_digest == row.id_digest
    )


def stored(context: Context, number: int) -> StoredRecord:
    return StoredRecord(context.settings.assigner.id_digest(record(number).id), record(number))


def built_pair(folder: Path) -> tuple[Path, Path]:
    """Make the model before and after the deletion of record 7; return both directories."""
    build(folder / "before")
    shutil.copytree(folder / "before", folder / "after")
    delete(folder / "after")
    return folder / "before", folder / "after"


def content(directory: Path) -> dict[str, bytes]:
    """Return the bytes of every slice, index and checkpoint file."""
    rooms = (areas.RECORDS, areas.INDEX, areas.CHECKPOINTS)
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for room in rooms
        for path in sorted((directory / room).rglob("*"))
        if path.is_file()
    }


def open_fake(site: Site, _options: Any) -> SerialExecutor:
    return SerialExecutor(FakeTrainer(), *open_stores(site))


def use_fake_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """Open models over a base that is only a name: nothing probes it, and each record has one token."""
    monkeypatch.setattr(Resources, "base", BaseFiles(Path("no-base"), BASE))
    monkeypatch.setattr(Resources, "check_base", lambda _: None)
    monkeypatch.setattr(Resources, "count_tokens", lambda _, records: [1 for _ in records])
    monkeypatch.setattr(wiring, "Compute", lambda **given: Compute(**{**given, "probe": None}))


def use_fake_resources(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `open_model` and the command line train with the fake, whatever executor is named."""
    use_fake_base(monkeypatch)
    monkeypatch.setattr(wiring, "find_executor", lambda _: open_fake)
