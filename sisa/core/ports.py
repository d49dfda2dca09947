"""The ports: every effect that the exact core needs, as a small Protocol.

Each port has a fake (`tests/fakes/ports.py`), a real implementation, and one contract suite that runs
over both (`tests/contract/`). Stores name files by content, so that writing twice is writing once, and a
half-written file is never visible. All raise `IntegrityError` for bytes that are not the recorded ones
and `EnvironmentFault` for a disk or network that fails.

>>> Change(dropped=["k"]).dropped
['k']
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from sisa.core.domain import (
    DEFAULT_PRECISION,
    NO_RESTRICTIONS,
    BaseFiles,
    Chain,
    Export,
    Head,
    HeldCheckpoint,
    Hit,
    Identity,
    IndexFile,
    Precision,
    Record,
    RecordRow,
    Restrictions,
    SavedCheckpoint,
    SliceFile,
    SliceJob,
    Testimony,
    Tombstone,
    WitnessHead,
    WorkItem,
)
from sisa.core.events import Report, SliceTrained, silent
from sisa.core.patches import Patch, PatchJob, VaultSet
from sisa.core.requests import Probed, Request, RequestEvent

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vectors = NDArray[np.float32]  # [num_texts, dimension], rows of unit length
    States = NDArray[np.float32]  # [positions, hidden], of one record
else:  # `sisa where` has no use for numpy
    Vectors = States = Any

By = Literal["text", "prompts"]  # the vectors of a record that a query is compared with


@dataclass(frozen=True, slots=True)
class StoredRecord:
    """A stored record with its keyed id, which orders records; in a stage, also with its slice."""

    id_digest: str
    record: Record
    slice: int | None = None


@dataclass(frozen=True, slots=True)
class Tick:
    """Progress of a stage after a step; the last of a pass has its records and their mean loss."""

    tokens: int
    total_tokens: int
    step: int = 0
    num_steps: int = 0
    epoch: int = 0
    num_epochs: int = 0
    num_records: int = 0
    loss: float | None = None


class Trainer(Protocol):
    """Trainer of one stage: a pure function of its arguments, to the byte."""

    def train(
        self,
        job: SliceJob,
        parent: Mapping[str, bytes] | None,
        records: Sequence[StoredRecord],
        progress: Callable[[Tick], None],
    ) -> dict[str, bytes]:
        """Return the files of the stage's checkpoint (`adapter_model.safetensors` among them).

        `parent` holds the files of the stage before, None for the base. `records` come in canonical
        order. `progress` is called before the first step and after each one.
        """


@runtime_checkable
class LaneTrainer(Trainer, Protocol):
    """Trainer that can train stages of several chains side by side, each to the same byte as alone."""

    def refuse_lanes(self, training: Mapping[str, Any]) -> str | None:
        """Return why stages can't be trained side by side here; None if they can."""

    def begin(
        self,
        job: SliceJob,
        parent: Mapping[str, bytes] | None,
        records: Sequence[StoredRecord],
        progress: Callable[[Tick], None],
    ) -> Generator[Any, None, dict[str, bytes]]:
        """Train like `train`, but yield what the stage waits for; the caller passes it to `compute`."""

    def compute(self, waiting: Sequence[Any]) -> None:
        """Compute what several stages yielded."""


OnStage = Callable[[SliceTrained], None]


class Executor(Protocol):
    """Runner of chains: each in order, any number side by side. It resumes from what the store holds."""

    def run(self, chains: Sequence[Chain], report: Report, on_stage: OnStage = silent) -> None:
        """Run all chains and return when every job's checkpoint is in the store.

        `on_stage` gets each stage as soon as its checkpoint is stored, before it is reported; a stage
        that several chains share may come more than once. Both are called in this process.
        """


@dataclass(frozen=True, slots=True)
class KeptVersions:
    """Old versions that an erasure did not reach: the location in a bucket, and the reason."""

    where: str
    why: str


class BlobStore(Protocol):
    """Store of named blobs and of groups of blobs (`GROUP/PART`), on a disk or in an object store.

    A blob or a group is whole or absent. Names are made of digests and numbers. A store is pickled by
    its location alone; each process finds its own credentials.
    """

    def below(self, name: str) -> BlobStore:
        """Return the store of a subdirectory or prefix."""

    def location(self, name: str = "") -> str:
        """Return the path or URI of a blob or a group."""

    def check_usable(self) -> None:
        """Raise EnvironmentFault if the store can't be reached or lacks a feature that is needed."""

    def held(self) -> frozenset[str]:
        """Return the names of all blobs and whole groups, and temporary ones of interrupted writes."""

    def parts(self, group: str) -> frozenset[str]:
        """Return the names of a group's parts; empty for a blob."""

    def get(self, name: str, what: str, num_bytes: int = -1) -> bytes:
        """Return a blob, or its first `num_bytes`. Raise IntegrityError: a `what` is missing."""

    def num_bytes(self, name: str) -> int:
        """Return the size of a blob or a group; 0 when it is absent."""

    def put(self, name: str, data: bytes) -> None:
        """Store a blob, whole or not at all; replaces one of the same name."""

    def put_group(self, name: str, parts: Mapping[str, bytes]) -> None:
        """Store a group with its `manifest.json`, whole or not at all; an existing group is kept."""

    def erase(self, names: Collection[str]) -> None:
        """Erase blobs and groups, with all versions where that is allowed; absent names are ignored."""

    def clear(self) -> None:
        """Erase everything below."""

    def lend(self, area: str, names: Collection[str]) -> BlobStore:
        """Return a new area of this store for the workers of a run; `erase([area])` ends it for good.

        Workers can put only blobs and parts of groups (`GROUP/PART`) with these names. A put fails once
        the area is erased, so that a worker that outlives its driver writes nothing. `area` begins with
        the prefix of temporary names.
        """

    def accept(self, area: str, name: str) -> None:
        """Move a blob or whole group, if it exists, out of an area; an existing group here is kept."""

    def purge(self, *, dry_run: bool = False) -> tuple[KeptVersions, ...]:
        """Erase old versions of blobs unless `dry_run`; return those that remain or may remain."""


class Keyring(Protocol):
    """Keys of data files, one each, by storage area; destroying one erases every copy of its file."""

    @property
    def seals(self) -> bool:
        """Return whether new files are sealed; sealed files can be read either way."""

    def location(self, area: str, name: str) -> str:
        """Return the location of a key."""

    def held(self, area: str) -> frozenset[str]:
        """Return the names of all keys of an area, leftover temporary ones included."""

    def seal(self, area: str, name: str, part: str, data: bytes) -> bytes:
        """Encrypt bytes under a name's key, made if it is absent, and bind them to the part."""

    def unseal(self, area: str, name: str, part: str, data: bytes, where: str = "") -> bytes:
        """Return the plaintext; plain bytes are returned as they are.

        Raise IntegrityError if the key is absent, or did not seal the bytes that are at `where`.
        """

    def destroy(self, area: str, names: Collection[str]) -> None:
        """Destroy keys beyond recovery; absent names are ignored."""


class StoredFiles(Protocol):
    """Files or groups of files that are listed and erased by name."""

    def held(self) -> frozenset[str]:
        """Return all names, leftover temporary ones included."""

    def erase(self, names: Collection[str]) -> None:
        """Erase files, their encryption keys first; absent names are ignored."""


class CheckpointStore(StoredFiles, Protocol):
    """Store of checkpoints: the files of each stage or patch under its key; whole ones are held."""

    def save(self, job: SliceJob | PatchJob, files: Mapping[str, bytes]) -> SavedCheckpoint:
        """Store the files of a stage or a patch under its key, whole or not at all."""

    def describe(self, key: str) -> SavedCheckpoint:
        """Read every byte again, check it against the checkpoint's manifest, and return the digests."""

    def load(self, key: str, manifest_sha256: str) -> dict[str, bytes]:
        """Return a checkpoint's files, checked by its manifest, which is checked by the digest."""

    def location(self, key: str) -> str:
        """Return the path or URI of the adapter file, sealed or not."""


class RecordStore(StoredFiles, Protocol):
    """Store of slices: one file of records per slice."""

    def write(self, shard: int, slice_: int, root: str, records: Sequence[StoredRecord]) -> SliceFile:
        """Store a slice's records, in canonical order, without changing another file."""

    def read(self, file: SliceFile) -> tuple[StoredRecord, ...]:
        """Return the records of a slice after checking the file's bytes against `file.sha256`."""

    def check(self, file: SliceFile) -> None:
        """Check the file's bytes against `file.sha256` without parsing them."""


class HiddenStateStore(StoredFiles, Protocol):
    """Cache of hidden states; what can't be read is computed again."""

    def read(self, name: str) -> dict[str, States]:
        """Return states by keyed id of the record; none if the file is missing or can't be read."""

    def write(self, name: str, states: Mapping[str, States]) -> None:
        """Store states, in place of an earlier file of that name."""

    def num_bytes(self, start: str) -> int:
        """Return the size of all files whose names begin with `start`."""

    def location(self, name: str) -> str:
        """Return the path or URI of a file."""


ExportStanding = Literal["held", "gone", "changed"]


class ExportStore(Protocol):
    """Store of exported adapters, in directories that belong to the caller."""

    def write(self, path: str, content: Mapping[str, bytes]) -> None:
        """Write a directory of flat files, whole or not at all."""

    def abandon(self, path: str) -> None:
        """Remove what a killed process left while writing this directory, which itself stays."""

    def standing(self, export: Export) -> ExportStanding:
        """Return whether the adapter is where it was written, with its recorded bytes."""

    def erase(self, export: Export) -> bool:
        """Erase the adapter and its configuration, and their directory if nothing else is in it.

        Return False and change nothing unless the adapter is held. An erasure that was interrupted
        (its `state` is "erasing") is completed: its remaining files are erased.
        """


class Embedder(Protocol):
    """Embedder of texts."""

    @property
    def digest(self) -> str:
        """Digest of the embedder and its weights."""

    @property
    def dimension(self) -> int:
        """Return the length of a vector."""

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Return vectors of length 1 or less; row i depends on text i alone, to the bit."""


class RecordIndex(StoredFiles, Protocol):
    """Index of the vectors of records, one file per shard."""

    def build(
        self, shard: int, root: str, base: IndexFile | None, vectors: Mapping[int, Any]
    ) -> IndexFile:
        """Write the index of exactly the ids in `vectors`, [n, dimension] each, and return its file.

        Rows are the vectors of a record's text and of its prompts; None is copied from `base`.
        """

    def search(
        self, found: Sequence[IndexFile], queries: Vectors, top_k: int, by: By = "text"
    ) -> list[list[Hit]]:
        """Return for each query row the best `top_k` records over all files, best first.

        A score is relative to the query's score with itself: equal texts score 1, whatever the length of
        their vectors. Ties are ordered by shard and id. `by` selects the vectors that are compared; a
        record without prompts is compared by its text.
        """

    def vectors(self, file: IndexFile, vector_ids: Sequence[int], by: By = "text") -> Vectors:
        """Return the stored vectors, of texts or of prompts, of some ids, in their order."""

    def check(self, file: IndexFile) -> None:
        """Check the file's bytes against `file.sha256` without parsing them."""


@dataclass(frozen=True, slots=True)
class Change:
    """One transaction of the ledger; an empty field changes nothing."""

    added: Sequence[RecordRow] = ()
    removed: Sequence[RecordRow] = ()
    tombstones: Sequence[Tombstone] = ()
    slices: Sequence[SliceFile] = ()
    emptied: Sequence[tuple[int, int]] = ()  # (shard, slice) whose file goes
    indexes: Sequence[IndexFile] = ()
    unindexed: Sequence[int] = ()  # shards whose index goes
    heads: Sequence[Head] = ()
    headless: Sequence[int] = ()  # shards that no longer exist
    checkpoints: Sequence[HeldCheckpoint] = ()
    dropped: Collection[str] = ()  # keys of checkpoints
    requests: Sequence[Request] = ()
    named: Sequence[tuple[str, str]] = ()  # (request id, keyed id of a record that it names)
    events: Sequence[RequestEvent] = ()
    exports: Sequence[Export] = ()
    unexported: Collection[tuple[str, str]] = ()  # names of exports
    patches: Sequence[Patch] = ()  # put, by key
    vault: Sequence[VaultSet] = ()  # put, by name
    vaulted: Sequence[tuple[str, str]] = ()  # (set, keyed id of a record whose text is in it)
    unvaulted: Collection[str] = ()  # sets whose rows go, with those of `vaulted`
    identities: Sequence[Identity] = ()
    unidentified: Collection[str] = ()  # keyed ids of records whose identities go
    work_items: Sequence[WorkItem] = ()  # put, by item
    meta: Mapping[str, str] = field(default_factory=dict)
    readmitted: Sequence[str] = ()  # keyed ids among `added` that were deleted before; for the witness


def merged(changes: Iterable[Change]) -> Change:
    """Return several transactions as one; if a row is put twice, the last one counts.

    >>> merged([Change(unindexed=[1]), Change(unindexed=[2], meta={"a": "b"})]).unindexed
    [1, 2]
    """
    found = list(changes)
    names = [each.name for each in fields(Change) if each.name != "meta"]
    rows: Any = {name: [row for each in found for row in getattr(each, name)] for name in names}
    return Change(meta={key: value for each in found for key, value in each.meta.items()}, **rows)


class Ledger(Protocol):
    """The only authority on where records are; a changed or a missing row raises IntegrityError."""

    def seq(self) -> int:
        """Return the number of the last commit; 0 before the first."""

    def meta(self) -> dict[str, str]:
        """Return texts about the model as a whole, by the keys that `ledger_meta.py` explains."""

    def commit(self, change: Change) -> int:
        """Apply a change, whole or not at all; return its sequence number, which added rows carry."""

    def exclusive(self) -> AbstractContextManager[None]:
        """Run a short block that reads, decides and commits, while no other such block runs.

        Every process that commits takes part. Blocks may nest. Raise Busy if another lasts too long.
        """

    @property
    def read_only(self) -> bool:
        """Return whether nothing can be committed here."""

    def num_bytes(self) -> int:
        """Return the size at rest."""

    def snapshot(self) -> AbstractContextManager[None]:
        """Answer all queries of a short block from one state, whatever is committed meanwhile."""

    def scrub(self, removed: Collection[RecordRow] | None = ()) -> None:
        """Empty the write-ahead log; leave no byte of removed rows (None: of any) in the database.

        Identities that this object removed are scrubbed as well.
        """

    def lookup(self, id_digests: Iterable[str]) -> dict[str, RecordRow | Tombstone]:
        """Return rows and tombstones by keyed id."""

    def by_subject(
        self, subject_digest: str, shard: int | None = None
    ) -> tuple[list[RecordRow], list[Tombstone]]:
        """Return held and deleted records of a subject; `shard` is that of the held ones, if known."""

    def num_without_subject(self) -> tuple[int, int]:
        """Return the numbers of held and of deleted records without a subject."""

    def by_vector(self, shard: int, vector_ids: Collection[int]) -> dict[int, RecordRow]:
        """Return rows by vector id."""

    def rows(self, shard: int, slice_: int | None = None) -> list[RecordRow]:
        """Return the rows of a shard or of one slice, by keyed id."""

    def contents(self, shard: int, slice_: int) -> list[tuple[str, str]]:
        """Return keyed id and digest of each record of a slice, checked against the slice's root."""

    def counts(self) -> dict[int, int]:
        """Return the number of records per shard; empty shards are left out."""

    def kinds(self) -> dict[str, int]:
        """Return the number of records per kind."""

    def slices(self, shard: int | None = None) -> list[SliceFile]:
        """Return the slice files of a shard or of all shards."""

    def indexes(self, shard: int | None = None) -> list[IndexFile]:
        """Return the index files of a shard or of all shards."""

    def heads(self) -> list[Head]:
        """Return the head of every shard of the layout, in shard order."""

    def checkpoints(self, shard: int | None = None) -> list[HeldCheckpoint]:
        """Return the checkpoints of a shard or of all shards."""

    def by_text(
        self, text_digests: Collection[str], *, full_scan: bool = False
    ) -> tuple[list[RecordRow], list[Tombstone]]:
        """Return held and deleted records with one of these normalised texts.

        `full_scan` reads every row, so that none is missed even in a damaged ledger.
        """

    def identities(
        self, *, keys: Collection[str] | None = None, id_digests: Collection[str] | None = None
    ) -> list[Identity]:
        """Return the identities with one of these keys, or of one of these records; or else all."""

    def work_items(self, keys: Collection[str] | None = None) -> list[WorkItem]:
        """Return the identifiers on DROP's lists with one of these keys, or all, by item."""

    def requests(self) -> list[Request]:
        """Return all requests, oldest first."""

    def named_by(self, request_id: str) -> list[str]:
        """Return the keyed ids of the records that a request names."""

    def events(self, after: int = 0) -> list[RequestEvent]:
        """Return the events without the first `after`, oldest first, each linked to the one before."""

    def events_of(self, request_id: str) -> list[RequestEvent]:
        """Return the events of one request, oldest first."""

    def exports(self) -> list[Export]:
        """Return the exports by path, then by key."""

    def patches(self) -> list[Patch]:
        """Return all patches that ever existed, by version."""

    def vault(self) -> list[VaultSet]:
        """Return the vault's sets by name."""

    def vaulted(self, name: str) -> list[str]:
        """Return the keyed ids of the records whose texts are in a set."""

    def sets_with(self, id_digests: Collection[str]) -> dict[str, list[str]]:
        """Return the names of the sets that hold each of these keyed ids; ids in no set are left out."""

    def num_tombstones(self) -> int:
        """Return the number of deleted records."""

    def tombstones(self) -> list[Tombstone]:
        """Return all tombstones by keyed id."""

    def event_head(self) -> WitnessHead:
        """Return the last event's link ("" before the first) and the number of events."""

    def has_event(self, link: str) -> bool:
        """Return whether an event of this ledger has this link."""

    def lost(self) -> list[str]:
        """Return the names of the tables that lack committed rows; empty when all is well."""


class Metrics(Protocol):
    """Store of the lines of `sisa/store/metrics.py`, by run."""

    def append(self, line: Mapping[str, Any]) -> None:
        """Append a line to those of its run."""

    def runs(self) -> list[str]:
        """Return the names of the runs with lines, oldest first."""

    def read(self, run: str) -> list[dict[str, Any]]:
        """Return a run's lines as appended, without erased losses. Raise IntegrityError."""

    def keep_losses(self, stages: Collection[str]) -> None:
        """Erase the losses of all stages but these, named by the first digits of their keys."""


Probe = Callable[[Sequence[Record]], Probed]  # what the frozen base alone knows of records; approximate


class Witness(Protocol):
    """Record of deletions outside the model's directory."""

    def head(self) -> WitnessHead | None:
        """Return the newest head, without reading the rest; None before the first deletion."""

    def read(self) -> Testimony:
        """Return everything recorded."""

    def num_restrictions(self) -> int:
        """Return the number of the newest restrictions, without reading the rest; 0 without any."""

    def append(
        self,
        head: WitnessHead,
        tombstones: Sequence[Tombstone],
        readmitted: Sequence[str],
        restrictions: Restrictions = NO_RESTRICTIONS,
    ) -> None:
        """Record deletions and readmitted keyed ids, whole or not at all, and then the head.

        Restrictions are recorded if they are newer than the recorded ones.
        """

    def location(self) -> str:
        """Return where the witness is stored."""


class Vault(StoredFiles, Protocol):
    """Encrypted sets of texts from which a patch is made, and their keys, outside the model."""

    def put(self, name: str, records: Sequence[Record]) -> tuple[str, int]:
        """Store a set, whole or not at all; return sha256 and size in bytes of its plaintext."""

    def read(self, found: VaultSet) -> tuple[Record, ...]:
        """Return the records in the order they were put, after checking the bytes."""

    def check(self, found: VaultSet) -> None:
        """Check the bytes without parsing them."""


@dataclass(frozen=True, slots=True)
class PatchOrder:
    """A patch to make: the sets that its job names, and the patches beneath it, lowest first.

    The run pauses after `max_seconds`; a later order for the same job resumes it. `reference` names a
    model that never saw the forget set, to be measured beside the patch.
    """

    job: PatchJob
    sets: tuple[VaultSet, ...]
    beneath: tuple[Patch, ...]
    max_seconds: float | None = None
    reference: str = ""


@dataclass(frozen=True, slots=True)
class PatchMade:
    """Outcome of an order; `saved` is None when time ran out or no step was accepted."""

    saved: SavedCheckpoint | None
    unfinished: bool
    report: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class PatchSite:
    """Where patches are made, for any process; unfinished runs in `runs_dir` are encrypted."""

    vault_dir: Path
    patches_at: BlobStore
    runs_dir: Path
    base: BaseFiles
    threads: int
    sequence_len: int
    vault_keyring: Keyring
    patches_keyring: Keyring
    precision: Precision = DEFAULT_PRECISION  # of the shards; patches are made on the CPU, in float32


class Patcher(Protocol):
    """Maker of approximate patches; the caller erases the draft of a finished one."""

    def check(
        self,
        settings: Mapping[str, Any],
        forget: Sequence[Record],
        retain: Sequence[Record] | None,
        reference: str = "",
    ) -> None:
        """Raise InvalidInput, with every problem, if no patch can be made from these arguments.

        A retain set of None is one that the base writes.
        """

    def make(self, order: PatchOrder, report: Report) -> PatchMade:
        """Make a patch or resume an unfinished one. Raise errors of reading and of the machine."""
