"""The nouns of exact deletion: records, slices, checkpoints and exports, as frozen values.

A `Record` holds personal data, and its `repr` hides it. Shards and slices are numbered from 0. A *depth*
d means that a model holds d slices: those of its *prefix*, in the order in which they were trained. A
checkpoint is named by the digest of the `SliceJob` that makes it, so equal prefixes are one checkpoint,
whatever their order of training.

>>> record = Record("r1", "ada", "completion", (Part("prompt", "Who?"), Part("completion", "Ada.")))
>>> record.text
'Who?\\nAda.'
>>> "Ada" in repr(record)
False

Source: SISA, Bourtoule et al. 2021, section IV: a constituent model per shard, a stored parameter state
per slice.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from sisa.core.digest import canonical_json, digest_of

Kind = Literal["text", "completion", "chat"]
RISK_COLUMN, GENERATION_COLUMN = "deletion_risk", "generation"  # place a record, as its subject does
Risk = float | str | None  # of being deleted: a number, the name of a class, or not given


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a record: its role (text, prompt, completion, user, assistant ...) and its text."""

    role: str
    text: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Record:
    """One training record as the user gave it, with the values that assign its shard and slice."""

    id: str = field(repr=False)
    subject_id: str | None = field(repr=False)
    kind: Kind
    parts: tuple[Part, ...] = field(repr=False)
    deletion_risk: Risk = field(default=None, repr=False)
    generation: int | None = field(default=None, repr=False)  # of appended records, from 1
    # (list, hash) pairs by which DROP finds the record's person; no part of the record itself.
    identifiers: tuple[tuple[str, str], ...] = field(default=(), repr=False, compare=False)

    @property
    def text(self) -> str:
        """Return the texts of all parts, one per line; a search by content compares them."""
        return "\n".join(part.text for part in self.parts)

    @property
    def num_bytes(self) -> int:
        """Return the size of the text in UTF-8."""
        return sum(len(part.text.encode()) for part in self.parts)

    @property
    def prompts(self) -> tuple[str, ...]:
        """Return the prompt or the user turns, each text once; empty for a plain text.

        >>> turns = ("system", "Be kind."), ("user", "Who?"), ("assistant", "Ada."), ("user", "Why?")
        >>> Record("r2", None, "chat", tuple(Part(*turn) for turn in turns)).prompts
        ('Who?', 'Why?')
        """
        texts = [part.text for part in self.parts if part.role in ("prompt", "user")]
        return tuple(dict.fromkeys(each for each in texts if each.strip()))

    def canonical(self) -> str:
        """Return the content that the record's digest covers: all fields but the identifiers."""
        return canonical_json(self.to_list()).decode()

    def to_list(self) -> list[Any]:
        """Return the record as JSON values; `from_list` reads them."""
        values = [self.id, self.subject_id, self.kind, [[part.role, part.text] for part in self.parts]]
        if self.generation:
            return [*values, self.deletion_risk, self.generation]
        return values if self.deletion_risk is None else [*values, self.deletion_risk]

    @classmethod
    def from_list(cls, values: list[Any]) -> Record:
        """Return the record that `to_list` encoded. Raise ValueError or TypeError for anything else."""
        id_, subject, kind, parts, *place = values
        return cls(id_, subject, kind, tuple(Part(role, text) for role, text in parts), *place)


def normalised(text: str) -> str:
    """Return a text for comparison: compatibility forms, case and white space folded.

    >>> normalised("  Ada\\u00a0 WROTE\\n it.") == normalised("ada wrote it.")
    True
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


@dataclass(frozen=True, slots=True)
class RecordRow:
    """The ledger's row of a held record: digests, position and size; never text or id."""

    id_digest: str
    subject_digest: str | None
    record_digest: str
    text_digest: str
    kind: Kind
    shard: int
    slice: int
    vector_id: int
    num_tokens: int
    seq: int = 0  # ledger sequence number of the commit that added it


@dataclass(frozen=True, slots=True)
class Tombstone:
    """The ledger's row of a deleted record: keyed digests, its former position, and the request."""

    id_digest: str
    subject_digest: str | None
    text_digest: str
    shard: int
    slice: int
    request_id: str
    deleted_at: str
    checkpoints_erased: int


@dataclass(frozen=True, slots=True)
class Identity:
    """The keyed digest of one of a record's identifiers, such as an email address, and its keyed id."""

    key: str
    id_digest: str


@dataclass(frozen=True, slots=True)
class WorkItem:
    """An identifier on a deletion list of California's DROP, named by DROP's id of it.

    `key` is that of the matching `Identity`; it is empty once the consumer withdrew. `file` is the name
    of the list's file without its suffix. `status` was reported last; 0: nothing was reported yet.
    """

    item: str
    key: str
    file: str
    request_id: str = ""  # that deletes the one consumer who matched
    num_consumers: int = 0  # who matched at the last import
    status: int = 0
    reported_at: str = ""


@dataclass(frozen=True, slots=True)
class SliceState:
    """The records of one (shard, slice), named by the digest of their content; never empty."""

    shard: int
    slice: int
    root: str
    num_records: int


@dataclass(frozen=True, slots=True)
class SliceFile(SliceState):
    """The Parquet file of a slice."""

    sha256: str
    num_bytes: int

    @property
    def name(self) -> str:
        return f"shard-{self.shard:05d}-slice-{self.slice:05d}-{self.root}.parquet"


@dataclass(frozen=True, slots=True)
class IndexFile:
    """The FAISS file of one shard: `root` names what it should hold, `num_vectors` counts records."""

    shard: int
    root: str
    num_vectors: int
    sha256: str
    num_bytes: int

    @property
    def name(self) -> str:
        return f"shard-{self.shard:05d}-{self.sha256}.faiss"


@dataclass(frozen=True)
class SliceJob:
    """Everything that one stage of a shard's training depends on; its digest is the checkpoint's key.

    `slices` are the roots of the slices that the stage sees, `passes` the exact fraction of passes over
    them, `training` the hyper-parameters that affect the bits, `before` the slices of earlier stages.
    """

    shard: int
    slice: int
    parent: str | None
    slices: tuple[tuple[int, str], ...]
    num_records: int
    passes: tuple[int, int]
    training: Mapping[str, Any]
    base: str
    fingerprint: str
    before: tuple[int, ...] = ()

    @property
    def prefix(self) -> tuple[int, ...]:
        """Return the slices whose records are in the checkpoint, in the order of their stages."""
        return (*self.before, self.slice)

    @cached_property
    def key(self) -> str:
        # Not `asdict`: it copies every value, and planning many shards mostly computes keys.
        return digest_of({each.name: getattr(self, each.name) for each in fields(self)})


@dataclass(frozen=True, slots=True)
class SavedCheckpoint:
    """Digests and size of a stored checkpoint."""

    key: str
    manifest_sha256: str
    adapter_sha256: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class HeldCheckpoint:
    """A checkpoint in the ledger; `prefix` lists the slices in it, at least one, in training order."""

    key: str
    shard: int
    prefix: tuple[int, ...]
    seq: int  # ledger sequence number of the state that it was trained on
    fingerprint: str
    manifest_sha256: str
    adapter_sha256: str
    num_bytes: int
    seconds: float  # of its training, its share of what ran beside it; 0: it was found after a crash
    record_epochs: int  # trained in these seconds

    @property
    def slice(self) -> int:
        """Return the slice of its own stage."""
        return self.prefix[-1]

    @property
    def sort_key(self) -> tuple[int, int, tuple[int, ...], str]:
        """Sort key of checkpoints: by shard, then the shallowest first."""
        return self.shard, len(self.prefix), self.prefix, self.key


ANY_SHARD = -1  # shard of an export that is older than the present partition
ExportState = Literal["writing", "clean", "tainted", "erasing"]
ExportForm = Literal["peft", "merged-adapter", "merged-model"]


@dataclass(frozen=True, slots=True)
class Export:
    """A directory that a shard's adapter was exported to, at an absolute path without links.

    `shard`, `prefix` and `seq` are the checkpoint's; they keep its lineage when it is retired.
    `request_id` names the deletion that tainted the export, `patches` the approximate patches in it. A
    merged export has a row for each of its shards; `adapter_sha256` is the digest of its weights' file.
    """

    path: str
    shard: int
    prefix: tuple[int, ...]  # empty for ANY_SHARD
    seq: int
    key: str
    adapter_sha256: str
    made_at: str
    state: ExportState = "clean"
    request_id: str = ""
    patches: tuple[str, ...] = ()
    form: ExportForm = "peft"

    @property
    def name(self) -> tuple[str, str]:
        """Return the unique name of an export: its path may have held another export before."""
        return self.path, self.key

    @property
    def directory(self) -> tuple[str, str]:
        """Return what the rows of one directory share; they become stale and are erased together."""
        return self.path, self.adapter_sha256

    @property
    def stale(self) -> bool:
        """Return whether a record that it was trained on has been deleted."""
        return self.state in ("tainted", "erasing")


@dataclass(frozen=True, slots=True)
class Head:
    """What a shard serves (`key`, with `depth` slices in it), and its `target` once trained."""

    shard: int
    key: str | None
    depth: int
    target: str | None

    @property
    def converged(self) -> bool:
        """Return whether the shard serves its target."""
        return self.key == self.target


@dataclass(frozen=True, slots=True)
class Chain:
    """The stages of one shard that must be trained, in order, from a held parent or the base."""

    shard: int
    jobs: tuple[SliceJob, ...]
    parent: HeldCheckpoint | None
    slices: tuple[SliceFile, ...]

    @property
    def record_epochs(self) -> int:
        return sum(record_epochs(job) for job in self.jobs)


def record_epochs(job: SliceJob) -> int:
    """Return the record-epochs of a stage: whole passes, then a part of one more."""
    return count_record_epochs(job.passes, job.num_records)


def count_record_epochs(passes: tuple[int, int], num_records: int) -> int:
    """Return the record-epochs of an exact fraction of passes over some records, rounded up."""
    return -(-passes[0] * num_records // passes[1])


@dataclass(frozen=True, slots=True)
class WitnessHead:
    """The head of an event log as its witness saw it: the last event's link and the number of events."""

    link: str
    num_events: int


@dataclass(frozen=True, slots=True)
class Restrictions:
    """Subjects whose records are stored and not served (GDPR Art. 18), by keyed digest: since when.

    `number` counts all changes that were ever made, and so shows which of two ledgers is newer.
    """

    number: int = 0
    since: Mapping[str, str] = field(default_factory=dict)


NO_RESTRICTIONS = Restrictions()


@dataclass(frozen=True, slots=True)
class Testimony:
    """What a witness recorded: the newest head, None without one, and what is in force."""

    head: WitnessHead | None
    tombstones: Mapping[str, Tombstone]  # by keyed id
    restrictions: Restrictions = NO_RESTRICTIONS


@dataclass(frozen=True, slots=True)
class Hit:
    """A candidate from the index: vector id, inner product with the query, shard."""

    vector_id: int
    score: float
    shard: int


@dataclass(frozen=True, slots=True)
class BaseFiles:
    """A base at rest: its directory and its digest.

    The directory is flat and holds all of the base as `save_pretrained` writes it: config, tokenizer,
    and weights in float32, with an index if there are several files. All other code relies on that, on
    other nodes, too; `resolve_base` brings what is stored otherwise into this form.
    """

    directory: Path
    digest: str

    def absolute(self) -> BaseFiles:
        """Return the same base for a process in another working directory."""
        return replace(self, directory=self.directory.absolute())


DeviceName = Literal["cpu", "cuda"]
Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, slots=True)
class Precision:
    """The device (`cuda`: the first one that the process sees) and data type of a shard's base.

    Adapters, their gradients and moments are always in float32: in bfloat16, with 8 bits of precision,
    most steps of a small learning rate would round away. Both affect the bits, so they are in the
    numerics fingerprint and, unless they are the defaults, in every job.

    >>> Precision().in_jobs(), Precision("cuda", "bfloat16").in_jobs()
    ({}, {'device': 'cuda', 'dtype': 'bfloat16'})
    """

    device: DeviceName = "cpu"
    dtype: Dtype = "float32"

    def in_jobs(self) -> dict[str, Any]:
        """Return the keys of a job's `training` that name it."""
        defaults = asdict(DEFAULT_PRECISION)
        return {name: value for name, value in asdict(self).items() if value != defaults[name]}

    @classmethod
    def of(cls, training: Mapping[str, Any]) -> Precision:
        """Return the precision that a job's `training` names."""
        return cls(**{each.name: training[each.name] for each in fields(cls) if each.name in training})


DEFAULT_PRECISION = Precision()
