"""The effects, each behind a small Protocol: what pure code may ask of the world.

Rules: every port has a fake (`tests/fakes/ports.py`), a real part, and one contract suite that runs over
both (`tests/contract/`). Stores name files by content, so that writing twice is writing once, and
nothing half-written is ever visible. All raise `IntegrityError` for bytes that are not the recorded
ones and `EnvironmentFault` for a disk or network that fails.

Not covered: signatures; where blobs rest (`blob_ports.py`), patches (`patch_ports.py`).

>>> Change(dropped=["k"]).dropped
['k']
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from sisa.core.domain import (
    Chain,
    Export,
    Head,
    HeldCheckpoint,
    Hit,
    IndexFile,
    Probed,
    Record,
    RecordRow,
    Request,
    RequestEvent,
    SavedCheckpoint,
    SliceFile,
    SliceJob,
    Testimony,
    Tombstone,
    WitnessHead,
)
from sisa.core.events import Report
from sisa.core.patch import Patch, PatchJob, VaultSet

Vectors = NDArray[np.float32]  # [num_texts, dimension], rows of unit length
By = Literal["text", "asked"]  # what of a record a query is compared with

States = NDArray[np.float32]  # [positions, hidden], of one record


@dataclass(frozen=True, slots=True)
class StoredRecord:
    """A record at rest with the keyed digest that orders it, and in a stage the slice it came from."""

    id_digest: str
    record: Record
    slice: int | None = None


@dataclass(frozen=True, slots=True)
class Tick:
    """How far a stage is after a step, in tokens, steps and passes; at the end of a pass also how many
    records it presented, and the mean loss over their label tokens."""

    tokens: int
    total_tokens: int
    step: int = 0
    num_steps: int = 0
    epoch: int = 0
    num_epochs: int = 0
    num_records: int = 0
    loss: float | None = None


class Trainer(Protocol):
    """One stage of training: a pure function of its arguments, to the byte."""

    def train(
        self,
        job: SliceJob,
        parent: Mapping[str, bytes] | None,
        records: Sequence[StoredRecord],
        progress: Callable[[Tick], None],
    ) -> dict[str, bytes]:
        """Files of the stage's checkpoint (`adapter_model.safetensors` among them).

        `parent` holds the files of the stage before, None for the base; `records` come in canonical
        order; `progress` is called before the first step and after each.
        """


class Executor(Protocol):
    """Runs chains, each in order, any number side by side; resumes from what the store holds."""

    def run(self, chains: Sequence[Chain], report: Report) -> None:
        """Returns when every job's checkpoint is in the store; `report` is called in this process."""


class Keyring(Protocol):
    """A key for each data file, in rooms. Destroying a key erases every copy of what it sealed."""

    @property
    def seals(self) -> bool:
        """Whether what is written now is sealed; what is sealed already is opened either way."""

    def location(self, room: str, name: str) -> str:
        """Where a key rests."""

    def held(self, room: str) -> frozenset[str]:
        """Names of all keys of a room, left-over temporaries among them."""

    def seal(self, room: str, name: str, part: str, data: bytes) -> bytes:
        """The bytes to write, under the key of a name (made if there is none); bound to the part."""

    def unseal(self, room: str, name: str, part: str, data: bytes) -> bytes:
        """The plaintext. Raises IntegrityError without the key, or for bytes that it did not seal."""

    def destroy(self, room: str, names: Collection[str]) -> None:
        """Destroy keys beyond recovery; absent names are no error."""


class CheckpointStore(Protocol):
    def held(self) -> frozenset[str]:
        """Keys of all complete checkpoints."""

    def save(self, job: SliceJob | PatchJob, files: Mapping[str, bytes]) -> SavedCheckpoint:
        """Store a stage's or a patch's files under its key, whole or not at all."""

    def describe(self, key: str) -> SavedCheckpoint:
        """Re-reads and checks every byte against the checkpoint's own manifest."""

    def load(self, key: str, manifest_sha256: str) -> dict[str, bytes]:
        """The files, after checking the manifest against the ledger's digest and them against it."""

    def erase(self, keys: Collection[str]) -> None:
        """Remove, the keyring's keys first; absent keys are no error."""

    def location(self, key: str) -> str:
        """Where the adapter file rests, sealed or not: a path that opens as it is, or a URI."""


class RecordStore(Protocol):
    def write(self, shard: int, slice_: int, root: str, records: Sequence[StoredRecord]) -> SliceFile:
        """Store a slice's records (canonical order); never changes another file."""

    def read(self, file: SliceFile) -> tuple[StoredRecord, ...]:
        """The records, after checking the file's bytes against `file.sha256`."""

    def check(self, file: SliceFile) -> None:
        """Checks the file's bytes against `file.sha256` without parsing them."""

    def held(self) -> frozenset[str]:
        """Names of all files."""

    def erase(self, names: Collection[str]) -> None:
        """Remove, the keyring's keys first; absent names are no error."""


class PrefixStore(Protocol):
    """A cache: what it can't read is computed again."""

    def read(self, name: str) -> dict[str, States]:
        """States by keyed id of the record; none where the file is missing, damaged or can't be read."""

    def write(self, name: str, states: Mapping[str, States]) -> None:
        """Keep states, in place of what the name had."""

    def num_bytes(self, start: str) -> int:
        """Of all files whose names begin so."""

    def held(self) -> frozenset[str]:
        """Names of all files."""

    def erase(self, names: Collection[str]) -> None:
        """Remove, the keyring's keys first; absent names are no error."""

    def location(self, name: str) -> str:
        """Where a file rests: a path or a URI."""


ExportStanding = Literal["held", "gone", "changed"]


class ExportStore(Protocol):
    """Adapters in directories that belong to the caller."""

    def write(self, path: str, content: Mapping[str, bytes]) -> None:
        """Write a directory of flat files, whole or not at all."""

    def abandon(self, path: str) -> None:
        """Remove what a killed process left of writing this directory, but not the directory itself."""

    def state(self, export: Export) -> ExportStanding:
        """Whether the adapter is where it was written, with the bytes that it had."""

    def erase(self, export: Export) -> bool:
        """Remove the adapter and its configuration, and their directory if nothing else is in it.

        False, with nothing changed, unless the adapter is held; but where an erasure was begun before
        (`state` "erasing"), what is gone is erased, and what is left of it is removed.
        """


class Embedder(Protocol):
    @property
    def digest(self) -> str:
        """Names the embedder and its weights."""

    @property
    def dimension(self) -> int:
        """Length of a vector."""

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Vectors of length 1 or less; row i depends on text i alone, to the bit."""


class RecordIndex(Protocol):
    def build(
        self, shard: int, root: str, base: IndexFile | None, vectors: Mapping[int, Any]
    ) -> IndexFile:
        """The index of exactly the ids in `vectors`, [n, dimension] each: the vector of a record's text,
        then those of what is asked in it. A value of None is taken from `base`."""

    def search(
        self, found: Sequence[IndexFile], queries: Vectors, top_k: int, by: By = "text"
    ) -> list[list[Hit]]:
        """For each query row the best `top_k` over all files, a record once, best first; equals by shard
        and id. `by` says which vectors are compared; where nothing is asked, one stands for both."""

    def vectors(self, file: IndexFile, vector_ids: Sequence[int], by: By = "text") -> Vectors:
        """The stored vectors of some ids, by id: one of each text, or all of what is asked."""

    def check(self, file: IndexFile) -> None:
        """Checks the file's bytes against `file.sha256` without parsing them."""

    def held(self) -> frozenset[str]:
        """Names of all files."""

    def erase(self, names: Collection[str]) -> None:
        """Remove, the keyring's keys first; absent names are no error."""


@dataclass(frozen=True, slots=True)
class Change:
    """One transaction of the ledger. Fields left empty change nothing."""

    added: Sequence[RecordRow] = ()
    removed: Sequence[RecordRow] = ()
    tombstones: Sequence[Tombstone] = ()
    slices: Sequence[SliceFile] = ()
    emptied: Sequence[tuple[int, int]] = ()
    indexes: Sequence[IndexFile] = ()
    unindexed: Sequence[int] = ()
    heads: Sequence[Head] = ()
    headless: Sequence[int] = ()  # shards that no longer exist
    checkpoints: Sequence[HeldCheckpoint] = ()
    dropped: Collection[str] = ()
    requests: Sequence[Request] = ()
    named: Sequence[tuple[str, str]] = ()  # (request id, keyed id of a record that it names)
    events: Sequence[RequestEvent] = ()
    exports: Sequence[Export] = ()
    unexported: Collection[tuple[str, str]] = ()  # names of exports
    patches: Sequence[Patch] = ()  # put, by key
    vault: Sequence[VaultSet] = ()  # put, by name
    vaulted: Sequence[tuple[str, str]] = ()  # (set, keyed id of a record whose text is in it)
    unvaulted: Collection[str] = ()  # sets whose rows go, with those of `vaulted`
    meta: Mapping[str, str] = field(default_factory=dict)
    readmitted: Sequence[str] = ()  # keyed ids among `added` that were deleted; for the witness alone


class Ledger(Protocol):
    """The only authority on where records are. Every `commit` is one transaction. A row that is not the
    one that was written, and an answer from which a row is missing, is an IntegrityError."""

    def seq(self) -> int:
        """The number of the last commit; 0 before the first."""

    def meta(self) -> dict[str, str]: ...

    def commit(self, change: Change) -> int:
        """Apply all of a change or nothing; returns its sequence number (given to added rows)."""

    def snapshot(self) -> AbstractContextManager[None]:
        """Answer the questions of a block out of one state, whoever commits meanwhile. Keep the block
        short: no log is emptied before its end."""

    def scrub(self, *, rewrite: bool = False) -> None:
        """Empty the write-ahead log; with `rewrite` leave no byte of a removed row behind."""

    def lookup(self, id_digests: Iterable[str]) -> dict[str, RecordRow | Tombstone]: ...

    def by_subject(self, subject_digest: str, shard: int) -> tuple[list[RecordRow], list[Tombstone]]:
        """Held records of a subject, which are all of one shard, and deleted ones."""

    def num_without_subject(self) -> tuple[int, int]:
        """How many held and how many deleted records have no subject."""

    def by_vector(self, shard: int, vector_ids: Collection[int]) -> dict[int, RecordRow]: ...

    def rows(self, shard: int, slice_: int | None = None) -> list[RecordRow]:
        """Rows of a shard (or one slice), by keyed id."""

    def counts(self) -> dict[int, int]:
        """Records per shard, shards without any left out."""

    def kinds(self) -> dict[str, int]:
        """Records per kind."""

    def slices(self, shard: int | None = None) -> list[SliceFile]: ...

    def indexes(self, shard: int | None = None) -> list[IndexFile]: ...

    def heads(self) -> list[Head]:
        """In shard order, one for every shard of the layout."""

    def checkpoints(self, shard: int | None = None) -> list[HeldCheckpoint]: ...

    def by_text(
        self, text_digests: Collection[str], *, full_scan: bool = False
    ) -> tuple[list[RecordRow], list[Tombstone]]:
        """Return held and deleted records with one of these normalised texts. `full_scan` looks at every
        row, so that none is missed even in a damaged ledger."""

    def requests(self) -> list[Request]:
        """Oldest first."""

    def named_by(self, request_id: str) -> list[str]:
        """Keyed ids of the records that a request names."""

    def events(self, after: int = 0) -> list[RequestEvent]:
        """Oldest first, each linked to the one before; without the first `after` of them."""

    def exports(self) -> list[Export]:
        """By path, then by key."""

    def patches(self) -> list[Patch]:
        """All that there ever were, by version."""

    def vault(self) -> list[VaultSet]:
        """By name."""

    def vaulted(self, name: str) -> list[str]:
        """Keyed ids of the records whose texts are in a set."""

    def sets_with(self, id_digests: Collection[str]) -> dict[str, list[str]]:
        """For each of these keyed ids that is in any set: the sets' names."""

    def num_tombstones(self) -> int: ...

    def tombstones(self) -> list[Tombstone]:
        """By keyed id."""

    def event_head(self) -> WitnessHead:
        """The last event's link ("" before the first) and the number of events."""

    def has_event(self, link: str) -> bool:
        """Whether an event of this ledger has that link."""

    def lost(self) -> list[str]:
        """Names of the tables that do not hold as many rows as were committed; none when all is well."""


class Metrics(Protocol):
    """Lines of `sisa/core/measured.py`, of each run those that it appended."""

    def append(self, line: Mapping[str, Any]) -> None:
        """Add a line to those of its run."""

    def runs(self) -> list[str]:
        """Names of the runs with lines, oldest first."""

    def read(self, run: str) -> list[dict[str, Any]]:
        """A run's lines as they were appended, but for losses that are gone. Raises IntegrityError."""

    def keep_losses(self, stages: Collection[str]) -> None:
        """Erase the losses of all stages but these, given by the first digits of their keys."""


class Probe(Protocol):
    """Whether the frozen base alone produces given records. Approximate."""

    def __call__(self, records: Sequence[Record]) -> Probed:
        """Numbers alone, no text; may take as long as some answers."""


class Witness(Protocol):
    """What was deleted, told outside the model directory."""

    def head(self) -> WitnessHead | None:
        """The newest head; None where nothing was ever told. Cheap."""

    def read(self) -> Testimony:
        """All that was told."""

    def append(
        self, head: WitnessHead, tombstones: Sequence[Tombstone], readmitted: Sequence[str]
    ) -> None:
        """Tell of deletions and of keyed ids allowed in again, whole or not at all; then of the head."""

    def location(self) -> str:
        """Where it rests, for people."""
