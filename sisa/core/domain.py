"""The nouns: frozen values that every room shares.

Rules: nothing here does I/O, and nothing knows how it is stored. A `Record` holds personal data and its
`repr` hides it. Shards and slices are numbered from 0; a *depth* d means that d slices are in a model,
those of its *prefix*, in the order in which they were trained. A checkpoint is named by the digest of
the `SliceJob` that makes it (SISA, Bourtoule et al. 2021, section IV: a constituent model per shard, a
stored parameter state per slice). Equal prefixes are one checkpoint, whichever order they are of.

Not covered: who decides (`plan.py`) and who obeys (`ports.py`).

>>> record = Record("r1", "ada", "completion", (Part("prompt", "Who?"), Part("completion", "Ada.")))
>>> record.text
'Who?\\nAda.'
>>> "Ada" in repr(record)
False
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Literal

from sisa.core.digest import canonical_json, digest_of

Kind = Literal["text", "completion", "chat"]
GENERATION_COLUMN = "generation"
Risk = float | str | None  # of being deleted: a number, the name of a class, or none given


@dataclass(frozen=True, slots=True)
class Part:
    """One stretch of a record: its role (text, prompt, completion, user, assistant ...) and text."""

    role: str
    text: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Record:
    """One training record as the user gave it, with what places it."""

    id: str = field(repr=False)
    subject_id: str | None = field(repr=False)
    kind: Kind
    parts: tuple[Part, ...] = field(repr=False)
    deletion_risk: Risk = field(default=None, repr=False)
    generation: int | None = field(default=None, repr=False)  # of appended ones, from 1

    @property
    def text(self) -> str:
        """All parts, one a line: what a search by content compares."""
        return "\n".join(part.text for part in self.parts)

    @property
    def num_bytes(self) -> int:
        """Of its text, in UTF-8."""
        return sum(len(part.text.encode()) for part in self.parts)

    @property
    def asked(self) -> tuple[str, ...]:
        """What a person asks in it, each text once: the prompt or the user turns; of a plain text none.

        >>> turns = ("system", "Be kind."), ("user", "Who?"), ("assistant", "Ada."), ("user", "Why?")
        >>> Record("r2", None, "chat", tuple(Part(*turn) for turn in turns)).asked
        ('Who?', 'Why?')
        """
        texts = [part.text for part in self.parts if part.role in ("prompt", "user")]
        return tuple(dict.fromkeys(each for each in texts if each.strip()))

    def canonical(self) -> str:
        """The content that the record's digest covers: id, subject, and what places it included."""
        return canonical_json(self.to_list()).decode()

    def to_list(self) -> list[Any]:
        """As JSON values; `from_list` reads them again."""
        body = [[part.role, part.text] for part in self.parts]
        placed = [self.deletion_risk, self.generation] if self.generation else [self.deletion_risk]
        return [self.id, self.subject_id, self.kind, body, *(placed if placed != [None] else [])]

    @classmethod
    def from_list(cls, values: list[Any]) -> Record:
        """Raises ValueError or TypeError for what `to_list` can't have made."""
        id_, subject, kind, parts, *placed = values
        return cls(id_, subject, kind, tuple(Part(role, text) for role, text in parts), *placed)


@dataclass(frozen=True, slots=True)
class RecordRow:
    """What the ledger knows about a held record: digests, place and size; never text or id."""

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
    """What stays of a deleted record: a keyed digest, its former place, and the request."""

    id_digest: str
    subject_digest: str | None
    text_digest: str
    shard: int
    slice: int
    request_id: str
    deleted_at: str
    checkpoints_erased: int


@dataclass(frozen=True, slots=True)
class SliceState:
    """The records of one (shard, slice), named by the digest of their content; never empty."""

    shard: int
    slice: int
    root: str
    num_records: int


@dataclass(frozen=True, slots=True)
class SliceFile(SliceState):
    """The Parquet file that holds a slice."""

    sha256: str
    num_bytes: int

    @property
    def name(self) -> str:
        return f"shard-{self.shard:05d}-slice-{self.slice:05d}-{self.root}.parquet"


@dataclass(frozen=True, slots=True)
class IndexFile:
    """The FAISS file of one shard, named by its bytes; `root` names the vectors that it should hold.
    `num_vectors` counts records: beside the vector of its text, a record has one for each prompt."""

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
    """All that one stage of a shard's training depends on; its digest is the checkpoint's key.

    `slices` are the roots of the slices whose records the stage sees, `passes` the exact fraction of
    passes over them, `training` the hyper-parameters that reach the bits, `before` the slices of the
    stages before it, in their order.
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
        """The slices whose records are in the checkpoint, in the order of their stages."""
        return (*self.before, self.slice)

    @cached_property
    def key(self) -> str:
        # Not `asdict`: it copies every value, and planning many shards is mostly making keys.
        return digest_of({each.name: getattr(self, each.name) for each in fields(self)})


@dataclass(frozen=True, slots=True)
class SavedCheckpoint:
    """What a store says of a checkpoint at rest."""

    key: str
    manifest_sha256: str
    adapter_sha256: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class HeldCheckpoint:
    """A checkpoint that the ledger knows: where it belongs and what its bytes must be. `prefix` are the
    slices that touched it, in the order of their stages; never empty."""

    key: str
    shard: int
    prefix: tuple[int, ...]
    seq: int  # ledger sequence number of the state that it was trained on
    fingerprint: str
    manifest_sha256: str
    adapter_sha256: str
    num_bytes: int
    seconds: float
    record_epochs: int

    @property
    def slice(self) -> int:
        """That of its own stage."""
        return self.prefix[-1]

    @property
    def place(self) -> tuple[int, int, tuple[int, ...], str]:
        """What checkpoints are ordered by: the shard, then the shallowest first."""
        return self.shard, len(self.prefix), self.prefix, self.key


ANY_SHARD = -1  # of an export that was made before the records moved to other shards
ExportState = Literal["writing", "clean", "tainted", "erasing"]
ExportForm = Literal["peft", "merged-adapter", "merged-model"]


@dataclass(frozen=True, slots=True)
class Export:
    """A directory that a shard's adapter was exported to, at an absolute path without links.

    `shard`, `prefix` and `seq` are those of the checkpoint, so that what a record touched can be told
    when it is long retired. `request_id` names the deletion that tainted it; `patches` are the keys of
    the approximate patches whose changes are in it. An export in a merged form has a row for each shard
    that is in it; `adapter_sha256` is that of the file with the weights.
    """

    path: str
    shard: int
    prefix: tuple[int, ...]  # none of ANY_SHARD
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
        """What tells it from all others: the same path may have held another export before."""
        return self.path, self.key

    @property
    def stale(self) -> bool:
        """Whether a record was deleted that it was made of."""
        return self.state in ("tainted", "erasing")


@dataclass(frozen=True, slots=True)
class Head:
    """What a shard serves (`key`, with `depth` slices in it), and what it should serve once trained
    (`target`)."""

    shard: int
    key: str | None
    depth: int
    target: str | None

    @property
    def converged(self) -> bool:
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
    """Record presentations of a stage: whole passes, then a prefix of one more."""
    return presentations(job.passes, job.num_records)


def presentations(passes: tuple[int, int], num_records: int) -> int:
    """Record-epochs of an exact fraction of passes over some records, rounded up."""
    return -(-passes[0] * num_records // passes[1])


RequestState = Literal[
    "received",
    "approved",
    "held",
    "denied",
    "cancelled",
    "committed",
    "rolled_back",
    "erased",
    "erasure_failed",
    "retrained",
    "completed",
    "failed",
]
Regime = Literal["gdpr", "delete-act"]


@dataclass(frozen=True, slots=True)
class Probed:
    """What the frozen base alone knew of deleted records: numbers, and never called exact.

    Means over the records that were probed (`num_probed` of `num_records`), each in [0, 1] but the
    margin. `num_known` counts those that the base is taken to know. `failure` is the kind of an error.
    """

    num_records: int
    num_probed: int = 0
    num_known: int = 0
    extraction_strength: float = 0.0
    exact_memorisation: float = 0.0
    membership_margin: float = 0.0  # Min-K%++ above that of the text's own neighbours
    continuation: float = 0.0  # ROUGE-L recall of the greedy continuation
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Request:
    """One request for deletion, from its receipt to its outcome. Times are ISO 8601 in UTC.

    `external_id`, `reason`, `approver` and `extension` are kept as given.
    """

    request_id: str
    created_at: str
    due: str
    num_records: int
    regime: Regime = "gdpr"
    state: RequestState = "received"
    external_id: str | None = None
    reason: str = ""
    approver: str | None = None
    extension: str = ""
    num_copies: int = 0  # exact copies found under other ids
    copies_included: bool = False
    committed_at: str = ""
    shards: tuple[tuple[int, int, int], ...] = ()  # shard, first slice, slices to retrain
    record_epochs_retrained: int = 0
    record_epochs_full: int = 0
    record_epochs_others: int = 0  # of the other orders' stages that it takes
    served: tuple[
        tuple[int, int, int], ...
    ] = ()  # from its commit on: shard, slices served, of how many
    serving_depth: float = 1.0  # from its commit on: mean share of their slices that all shards serve
    model_digest_before: str = ""
    seconds: float = 0.0
    model_digest_after: str = ""
    exports_erased: int = 0
    cause: str = ""  # of a failure: the kind of error, never its text
    probed: Probed | None = None  # None: not asked, or cut short
    consent: str = ""  # to keep the text, encrypted, until a patch is made from it
    vaulted: str = ""  # the vault's set that holds it


@dataclass(frozen=True, slots=True)
class RequestEvent:
    """A state that a request entered. `link` chains all events of a ledger."""

    request_id: str
    state: RequestState
    at: str
    note: str = ""
    link: str = ""


@dataclass(frozen=True, slots=True)
class WitnessHead:
    """The head of an event log as its witness saw it: the last event's link and the number of events."""

    link: str
    num_events: int


@dataclass(frozen=True, slots=True)
class Testimony:
    """What a witness says: the newest head, None of an absent one, and the tombstones that stand."""

    head: WitnessHead | None
    tombstones: Mapping[str, Tombstone]  # by keyed id


@dataclass(frozen=True, slots=True)
class Hit:
    """A candidate of the index: the vector's id, its inner product with the query, its shard."""

    vector_id: int
    score: float
    shard: int
