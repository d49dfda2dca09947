"""Define an open model as flows use it, and the few reads and writes that several flows share.

`wiring.py` builds a `Context` from real parts, tests from fakes. `Resources` holds the heavy parts, each
resolved on first use and checked against the ledger; those that need torch import it. Nothing is decided
here. New slice files get new names, and nothing is overwritten or erased: the flows decide the order of
effects.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from types import MappingProxyType
from typing import Any

from sisa.config.config import RunConfig, SisaBlock
from sisa.core import ports
from sisa.core.digest import digest_of, patched_digest
from sisa.core.domain import (
    Head,
    HeldCheckpoint,
    Hit,
    Kind,
    Patch,
    PatchMode,
    Record,
    RecordRow,
    Restrictions,
    SliceFile,
    SliceState,
    Tombstone,
    active,
    wanted,
)
from sisa.core.errors import (
    ConfigConflict,
    EnvironmentFault,
    IntegrityError,
    InvalidInput,
    Problem,
    UnknownRecord,
)
from sisa.core.events import Report
from sisa.core.requests import RECTIFY, EventChain
from sisa.lm.answer.route import Route, choose_route, resolve_aggregation
from sisa.planning.layout import Assigner, index_root, slice_root
from sisa.planning.patch_plan import TRAINED_OVER
from sisa.planning.plan import (
    Recipe,
    ShardPlan,
    ShardView,
    held_back,
    plan_shard,
    prefix_names,
    tainted_checkpoints,
)
from sisa.store.index import IndexCache

TRAINED_ANEW = "trained_anew"  # in the ledger's meta: when the model was last trained as a whole
RESTRICTIONS = "restrictions"  # in the ledger's meta: whose records are stored and not served
READMITTED = "readmitted"  # in the ledger's meta, until the witness knows that deleted ids came in again
SlicePosition = tuple[int, int]  # shard, slice
FEW_SHARDS = 16  # that are asked for one by one
ALWAYS_SEALED = ("vault", "runs")  # areas that are sealed in a plain model, too
INDEXED = "text-and-asked-v1"  # of a record: its text, and each thing that is asked in it


@dataclass(frozen=True)
class Named:
    """A base or an embedder, as the ledger names it."""

    name: str
    digest: str
    dimension: int = 0


class Resources:
    """The heavy parts of one model, resolved on first use and checked against the ledger's names."""

    def __init__(self, config: RunConfig, base: Named | None, embedder: Named | None) -> None:
        self.config = config
        self._base = base
        self._embedder = embedder
        self.index_cache = IndexCache()
        self._counted: tuple[tuple[Record, ...], list[int]] | None = None  # the last `count_tokens`

    @cached_property
    def base(self) -> Any:
        """Return the base's files (`sisa.lm.base.weights.BaseFiles`)."""
        from sisa.lm.base.weights import resolve_base

        found = resolve_base(self.config.base)
        if self._base is not None:
            check_digest("base model", self._base, found.digest)
        return found

    @cached_property
    def tokenizer(self) -> Any:
        from sisa.lm.base.weights import load_tokenizer

        return load_tokenizer(self.base.directory)

    @cached_property
    def embedder(self) -> ports.Embedder:
        from sisa.lm.answer.embedder import resolve_embedder
        from sisa.lm.answer.names import NameEmbedder

        found = resolve_embedder(self.config.sisa.embedder)
        if self.config.sisa.names:
            found = NameEmbedder(found)
        if self._embedder is not None:
            if self._embedder.digest == found.digest:
                raise ConfigConflict(
                    "the index is of an earlier version, without the vectors of what records ask",
                    where=self._embedder.name,
                    next_step="build it again: `sisa train RUN.yaml --reconfigure`; nothing is trained",
                )
            check_digest("embedder", self._embedder, indexed_digest(found))
        return found

    @property
    def base_digest(self) -> str:
        """Return the digest of the base, without resolving the base if the ledger names the digest."""
        return self._base.digest if self._base else self.base.digest

    @property
    def dimension(self) -> int:
        return self._embedder.dimension if self._embedder else self.embedder.dimension

    def count_tokens(self, records: Sequence[Record]) -> list[int]:
        """Return the tokens of each record. Raise InvalidInput with every record that does not fit."""
        from sisa.lm.base.tokens import tokenize_all
        from sisa.lm.base.weights import untrusted

        asked = tuple(records)
        if self._counted is None or self._counted[0] != asked:
            tokenizer, directory = self.tokenizer, self.base.directory
            with untrusted("the base model's tokenizer can't be used", directory, quotes_texts=True):
                tokens = tokenize_all(
                    asked,
                    tokenizer,
                    sequence_len=self.config.sequence_len,
                    overlength=self.config.overlength,
                    train_on_inputs=self.config.train_on_inputs,
                )
            self._counted = (asked, [len(each.input_ids) for each in tokens])
        return self._counted[1]

    def check_base(self) -> None:
        """Raise InvalidInput if the base can't be trained as the run file says, or answer afterwards."""
        from sisa.lm.answer.base_trial import try_base

        try_base(self.base.directory, self.base.digest, self.config.training())

    def meta(self) -> dict[str, str]:
        """Return what the ledger stores about these resources."""
        base = {"name": self.config.base_name, "digest": self.base.digest}
        embedder = Named(
            self.config.sisa.embedder, indexed_digest(self.embedder), self.embedder.dimension
        )
        return {
            "config": self.config.to_canonical(),
            "base": json.dumps(base, sort_keys=True),
            "embedder": json.dumps(asdict(embedder), sort_keys=True),
        }


def indexed_digest(embedder: ports.Embedder) -> str:
    """Return the digest of what an index embeds: the embedder and the embedded parts of a record."""
    return digest_of([INDEXED, embedder.digest])


def check_digest(what: str, named: Named, found: str) -> None:
    """Raise IntegrityError if the found part is not the one that the ledger names."""
    if found != named.digest:
        raise IntegrityError(
            f"the {what} is not the one that this model was trained with",
            where=named.name,
            expected=named.digest,
            got=found,
            next_step=f"restore the {what}, or move the model to the new one with "
            "`sisa train RUN.yaml --reconfigure`",
        )


# --- the open model -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stores:
    """The stores of a model."""

    ledger: ports.Ledger
    witness: ports.Witness
    records: ports.RecordStore
    checkpoints: ports.CheckpointStore
    index: ports.RecordIndex
    keyring: ports.Keyring
    exports: ports.ExportStore
    metrics: ports.Metrics
    patches: ports.CheckpointStore
    vault: ports.Vault
    drafts: ports.StoredFiles  # unfinished runs of patch making, by the key of their patch
    prefixes: ports.PrefixStore
    blobs: Mapping[str, ports.BlobStore] = field(default_factory=dict)  # by area; fakes have none


@dataclass(frozen=True)
class Compute:
    """The computing parts of a model; heavy ones are opened on first use."""

    embed: Callable[[Sequence[str]], ports.Vectors]
    count_tokens: Callable[[Sequence[Record]], Sequence[int]]
    executor_for: Callable[[ports.CheckpointStore], ports.Executor]
    patcher: Callable[[], ports.Patcher]
    fingerprint: str  # of the numerics that all of it runs under
    probe: ports.Probe | None = None


@dataclass(frozen=True)
class Settings:
    """The decisions of the run file and the partition key."""

    assigner: Assigner
    recipe: Recipe  # of shards over the frozen base alone
    patch_mode: PatchMode
    chain: EventChain  # of the ledger's events
    keeps_prefixes: bool = False  # whether hidden states may be kept
    routing: SisaBlock | None = None  # how prompts are answered; fakes answer none
    four_eyes: bool = False  # whether who submits a request may not approve it

    @property
    def base(self) -> str:
        """Return the digest of the frozen base."""
        return self.recipe.base


@dataclass(frozen=True)
class Context:
    """An open model, as flows use it."""

    stores: Stores
    compute: Compute
    settings: Settings
    now: Callable[[], str]
    report: Report
    hooks: tuple[ports.DeletionHook[Context], ...] = ()

    @property
    def recipe(self) -> Recipe:
        """Return the recipe over the base and the patches beneath. Raise IntegrityError."""
        base = self.settings.base
        stack = [each.adapter_sha256 for each in patches_beneath(self.stores.ledger, base)]
        return replace(self.settings.recipe, base=patched_digest(base, stack))


# --- the commit, and its record in the witness ----------------------------------------------------


def commit(context: Context, change: ports.Change) -> int:
    """Commit a transaction, and record its requests, deletions and restrictions in the witness.

    After a crash between the two, the next such commit or the next writer completes the record. A change
    that depends on what was read is read, decided and committed within one `ledger.exclusive()`, since
    people decide about requests while a deletion trains.
    """
    ledger, witness, chain = context.stores.ledger, context.stores.witness, context.settings.chain
    with ledger.exclusive():
        if change.removed and RESTRICTIONS not in change.meta:
            change = replace(change, meta={**change.meta, **_end_restrictions(ledger, change)})
        if change.readmitted:  # moves no event: after a crash the heads alone would not differ
            change = replace(change, meta={**change.meta, READMITTED: "unrecorded"})
        before = ledger.event_head()
        seq = ledger.commit(replace(change, events=[*chain.linked(before.link, change.events)]))
        witnessed = change.meta.keys() & {"model", RESTRICTIONS}
        if witnessed or change.events or change.tombstones or change.readmitted:
            current = witness.head() == before or is_behind(context)  # behind: it catches up now
            new = (change.tombstones, change.readmitted) if current else unrecorded(context)
            witness.append(ledger.event_head(), *new, restrictions(ledger))
        if change.readmitted:
            ledger.commit(ports.Change(meta={READMITTED: ""}))
    return seq


def record_unrecorded(context: Context) -> None:
    """Record in the witness what it lacks of a ledger that is not behind it."""
    ledger = context.stores.ledger
    context.stores.witness.append(ledger.event_head(), *unrecorded(context), restrictions(ledger))
    if ledger.meta().get(READMITTED):
        ledger.commit(ports.Change(meta={READMITTED: ""}))


def _end_restrictions(ledger: ports.Ledger, change: ports.Change) -> dict[str, str]:
    """Return the meta that ends the restrictions of subjects who lose their last record by a change.

    A rectification adds the records again, so it ends none.
    """
    if any(each.reason == RECTIFY for each in change.requests):
        return {}
    known, gone = restrictions(ledger), {row.id_digest for row in change.removed}
    losing = {row.subject_digest for row in change.removed} - {r.subject_digest for r in change.added}
    left = {
        subject: since
        for subject, since in known.since.items()
        if subject not in losing
        or any(row.id_digest not in gone for row in ledger.by_subject(subject)[0])
    }
    return {} if left == known.since else restricting(known, left)


def is_behind(context: Context) -> bool:
    """Return whether the ledger does not know the witness's head, or has older restrictions.

    The witness is read first: a ledger that is written meanwhile can only be ahead of it.
    """
    head, number = context.stores.witness.head(), context.stores.witness.num_restrictions()
    ledger = context.stores.ledger
    unknown = head is not None and head.link != "" and not ledger.has_event(head.link)
    return unknown or (number > 0 and number > restrictions(ledger).number)


def is_unrecorded(context: Context) -> bool:
    """Return whether the witness lacks something: a process was killed before it recorded that."""
    ledger, witness = context.stores.ledger, context.stores.witness
    if witness.head() != ledger.event_head() or ledger.meta().get(READMITTED):
        return True
    return restrictions(ledger).number > witness.num_restrictions()


def unrecorded(context: Context) -> tuple[list[Tombstone], list[str]]:
    """Return the deletions that the witness lacks, and the ids that it takes for deleted by mistake."""
    ledger, known = context.stores.ledger, context.stores.witness.read().tombstones
    missing = [each for each in ledger.tombstones() if known.get(each.id_digest) != each]
    asked = {*known, *(each.id_digest for each in missing)}
    held = {row.id_digest for row in held_rows(context, asked)}  # added again after their deletion
    return [each for each in missing if each.id_digest not in held], sorted(held & known.keys())


# --- what is held and served ----------------------------------------------------------------------


def held_state(ledger: ports.Ledger) -> str:
    """Return a digest of what a ledger holds and serves; new requests do not change it."""
    with ledger.snapshot():
        held = [[each.name for each in ledger.slices()], [each.key for each in ledger.checkpoints()]]
        patches = [each.key for each in active(ledger.patches())]
        served = [[each.key for each in served_heads(ledger)], patches]
        return digest_of([held, served, ledger.num_tombstones()])


def model_digest(context: Context) -> str:
    """Return the keyed digest of all heads' adapters in shard order, and of active patches, if any.

    Requests and cards keep it after a deletion: without the key it confirms no guess.
    """
    ledger = context.stores.ledger
    adapters = {each.key: each.adapter_sha256 for each in ledger.checkpoints()}
    heads = [adapters.get(head.key) if head.key else None for head in ledger.heads()]
    stack = [each.adapter_sha256 for each in active(ledger.patches())]
    return context.settings.assigner.model_digest(heads, stack)


def restricting(known: Restrictions, since: Mapping[str, str]) -> dict[str, str]:
    """Return the ledger's meta that replaces the known restrictions by others."""
    return {RESTRICTIONS: json.dumps([known.number + 1, dict(since)], sort_keys=True)}


def restrictions(ledger: ports.Ledger) -> Restrictions:
    """Return whose records are stored and not served."""
    number, since = json.loads(ledger.meta().get(RESTRICTIONS, "[0, {}]"))
    return Restrictions(number, since)


def restricted_rows(ledger: ports.Ledger) -> list[RecordRow]:
    """Return the held records that are stored and not served."""
    return [row for each in sorted(restrictions(ledger).since) for row in ledger.by_subject(each)[0]]


def served_heads(ledger: ports.Ledger) -> list[Head]:
    """Return what each shard serves: its head, unless that saw a record that is restricted."""
    heads, restricted = ledger.heads(), restricted_rows(ledger)
    shards = sorted({row.shard for row in restricted})
    return held_back(heads, [e for shard in shards for e in ledger.checkpoints(shard)], restricted)


def servable(ledger: ports.Ledger) -> frozenset[str]:
    """Return the keys of the held checkpoints that saw no restricted record."""
    held = ledger.checkpoints()
    return frozenset(each.key for each in held) - {*tainted_checkpoints(held, restricted_rows(ledger))}


def served_keys(ledger: ports.Ledger) -> dict[int, str]:
    """Return the key of the served adapter of each shard that serves one."""
    return {head.shard: head.key for head in served_heads(ledger) if head.key is not None}


# --- search and routing ---------------------------------------------------------------------------


def search_each(
    context: Context, queries: ports.Vectors, top_k: int, by: ports.By = "text"
) -> list[list[Hit]]:
    """Return the best hits over all shards for each query, best first.

    A score is relative to the query's score with itself: equal texts score 1, whatever the length of
    their vectors.
    """
    found = context.stores.index.search(context.stores.ledger.indexes(), queries, top_k, by)
    own = (queries * queries).sum(axis=1).tolist()
    return [
        [replace(hit, score=hit.score / square) for hit in hits]
        for hits, square in zip(found, own, strict=True)
    ]


def routing_hits(context: Context, queries: ports.Vectors, top_k: int) -> list[list[Hit]]:
    """Return the best hits for prompts, as if no restricted record were in the index."""
    hidden = {(row.shard, row.vector_id) for row in restricted_rows(context.stores.ledger)}
    found = search_each(context, queries, top_k + len(hidden), by="asked")
    return [[hit for hit in hits if (hit.shard, hit.vector_id) not in hidden][:top_k] for hits in found]


def route_of(
    context: Context,
    block: SisaBlock,
    hits: Sequence[Hit],
    live_shards: Collection[int],
    near: float | None = None,
) -> Route:
    """Return the route of a prompt with these hits, as `choose_route` does."""
    kind: Kind = "completion"
    if hits:
        rows = context.stores.ledger.by_vector(hits[0].shard, [hits[0].vector_id])
        kind = rows[hits[0].vector_id].kind if rows else kind
    how = resolve_aggregation(block.aggregation, block.embedder, kind)
    return choose_route(hits, how, live_shards, near)


# --- patches --------------------------------------------------------------------------------------


def trained_over(ledger: ports.Ledger) -> tuple[str, ...]:
    """Return the keys of the patches over which the shards are trained, lowest first."""
    return tuple(json.loads(ledger.meta().get(TRAINED_OVER, "[]")))


def patches_beneath(ledger: ports.Ledger, base: str) -> list[Patch]:
    """Return the patches over which shards are trained, lowest first; none if the base has changed."""
    keys = trained_over(ledger)
    if not keys:
        return []
    patches = {each.key: each for each in ledger.patches() if each.manifest_sha256}
    if absent := [key for key in keys if key not in patches]:
        raise IntegrityError(
            "the ledger lacks patches that shards are trained over",
            got=f"{len(absent)} of {len(keys)}",
            next_step="restore the model directory from a backup",
        )
    found = [patches[key] for key in keys]
    return found if all(each.job.base == base for each in found) else []


def patch_files(store: ports.CheckpointStore, stack: Iterable[Patch]) -> list[dict[str, bytes]]:
    """Return the files of patches in order, after checking them. Raise IntegrityError."""
    return [store.load(each.key, each.manifest_sha256) for each in stack]


# --- storage areas --------------------------------------------------------------------------------


def known_by_area(context: Context) -> dict[str, frozenset[str]]:
    """Return the names that the ledger lists, by storage area; for hidden states, the held ones."""
    ledger = context.stores.ledger
    patches = ledger.patches()
    return {
        "records": frozenset(file.name for file in ledger.slices()),
        "index": frozenset(file.name for file in ledger.indexes()),
        "checkpoints": frozenset(each.key for each in ledger.checkpoints()),
        "patches": frozenset(each.key for each in active(patches)).union(trained_over(ledger)),
        "vault": frozenset(each.name for each in ledger.vault() if each.held),
        "runs": frozenset(each.key for each in wanted(patches)),
        "prefixes": _known_prefixes(context),
    }


def _known_prefixes(context: Context) -> frozenset[str]:
    """Return the held files of hidden states of the present slices."""
    if not context.settings.keeps_prefixes:
        return frozenset()
    try:
        held = context.stores.prefixes.held()
    except EnvironmentFault:
        return frozenset()  # it is a cache; erasing there raises the error again
    slices = context.stores.ledger.slices()
    return held & prefix_names(slices, context.recipe, context.compute.fingerprint)


def areas(context: Context) -> dict[str, ports.StoredFiles]:
    """Return the storage areas whose files the ledger lists.

    Everything held there can be erased, leftover temporary files included; in the vault and the drafts,
    keys as well.
    """
    stores = context.stores
    return {
        "records": stores.records,
        "index": stores.index,
        "checkpoints": stores.checkpoints,
        "patches": stores.patches,
        "vault": stores.vault,
        "runs": stores.drafts,
        "prefixes": stores.prefixes,
    }


def held_by_area(context: Context) -> dict[str, frozenset[str]]:
    """Return the names held in each storage area."""
    return {name: area.held() for name, area in areas(context).items()}


def purge(context: Context, *, dry_run: bool = False) -> tuple[ports.KeptVersions, ...]:
    """Remove old versions of replaced or erased objects; return those that a bucket keeps.

    The log stays: it is public, and its old checkpoints are evidence.
    """
    found = sorted(context.stores.blobs.keys() - {"log"})
    return tuple(kept for area in found for kept in context.stores.blobs[area].purge(dry_run=dry_run))


# --- records and slices ---------------------------------------------------------------------------


def held_rows(context: Context, id_digests: Iterable[str]) -> list[RecordRow]:
    """Return the rows of those records (by keyed id) that are held."""
    found = context.stores.ledger.lookup(id_digests).values()
    return [each for each in found if isinstance(each, RecordRow)]


def lookup(context: Context, ids: Sequence[str]) -> list[tuple[str, RecordRow | Tombstone]]:
    """Return rows and tombstones of ids, in their order. Raise UnknownRecord with every unknown id."""
    found = known_rows(context, ids)
    return [(each, found[context.settings.assigner.id_digest(each)]) for each in ids]


def known_rows(
    context: Context, ids: Sequence[str], elsewhere: Collection[str] = ()
) -> dict[str, RecordRow | Tombstone]:
    """Return rows and tombstones by keyed id.

    Raise UnknownRecord with every id that has neither, unless its keyed id is in `elsewhere`.
    """
    digests = [context.settings.assigner.id_digest(each) for each in ids]
    found = context.stores.ledger.lookup(digests)
    unknown = [
        Problem(f"id {position + 1} of {len(ids)}", "this model has never held it")
        for position, digest in enumerate(digests)
        if digest not in found and digest not in elsewhere
    ]
    if unknown:
        raise UnknownRecord(
            f"{len(unknown)} of {len(ids)} ids are unknown; nothing was changed",
            next_step="look the records up by content with `sisa find`",
            problems=unknown,
        )
    return found


def slices_of(context: Context, rows: Iterable[RecordRow]) -> list[SliceFile]:
    """Return the files that hold these records now."""
    places = {(row.shard, row.slice) for row in rows}
    shards = sorted({shard for shard, _ in places})
    return [f for s in shards for f in context.stores.ledger.slices(s) if (s, f.slice) in places]


def stored_in(
    context: Context, files: Iterable[SliceFile], rows: Collection[RecordRow]
) -> list[ports.StoredRecord]:
    """Return the records of rows, read from the files of their slices."""
    names = {row.id_digest for row in rows}
    places = {(row.shard, row.slice) for row in rows}
    read = (context.stores.records.read(f) for f in files if (f.shard, f.slice) in places)
    return [stored for each in read for stored in each if stored.id_digest in names]


def embed_records(context: Context, records: Sequence[Record]) -> list[ports.Vectors]:
    """Return each record's vectors: that of its text, then those of what is asked in it."""
    texts = [(record.text, *record.asked) for record in records]
    vectors = context.compute.embed([text for each in texts for text in each])
    ends = list(accumulate(map(len, texts)))
    return [vectors[end - len(each) : end] for end, each in zip(ends, texts, strict=True)]


def embed_shard(context: Context, shard: int, rows: Sequence[RecordRow]) -> dict[int, ports.Vectors]:
    """Embed a shard's records again from its slice files; return their vectors by vector id."""
    stored = stored_in(context, context.stores.ledger.slices(shard), rows)
    held = {each.id_digest: each.record for each in stored}
    vectors = embed_records(context, [held[row.id_digest] for row in rows])
    return dict(zip((row.vector_id for row in rows), vectors, strict=True))


def write_shard(
    context: Context,
    shard: int,
    rows: Sequence[RecordRow],
    slices: Iterable[int],
    fresh: Mapping[str, ports.StoredRecord] = MappingProxyType({}),
    vectors: Mapping[int, ports.Vectors] = MappingProxyType({}),
) -> ports.Change:
    """Write some slices and the index of a shard that holds exactly `rows`.

    Return the change that makes the new files current. Records that are not `fresh` (by keyed id) and
    vectors that are not given (by vector id) are read from the present files. Raise IntegrityError, or
    InvalidInput if two records share a vector id.
    """
    written = []
    for slice_ in sorted(slices):
        here = [row for row in rows if row.slice == slice_]
        new = [fresh[row.id_digest] for row in here if row.id_digest in fresh]
        written.append(_write_slice(context, shard, slice_, here, new))
    wanted = {row.vector_id: vectors.get(row.vector_id) for row in rows}
    if len(wanted) < len(rows):
        raise InvalidInput(
            "two record ids share a vector id (chance below 1 in 10^9)",
            where=f"shard {shard}",
            next_step="give one of the new records another id",
        )
    base = next(iter(context.stores.ledger.indexes(shard)), None)
    index = context.stores.index.build(shard, index_root(rows), base, wanted)
    return ports.Change(slices=written, indexes=[index])


def _write_slice(
    context: Context,
    shard: int,
    slice_: int,
    rows: Sequence[RecordRow],
    fresh: Sequence[ports.StoredRecord],
) -> SliceFile:
    files = context.stores.ledger.slices(shard) if len(fresh) < len(rows) else []
    held = [file for file in files if file.slice == slice_]
    by_digest = {each.id_digest: each for each in (*fresh, *stored_in(context, held, rows))}
    if len(by_digest) < len(rows):
        raise IntegrityError(
            "the ledger holds records that its slice file does not",
            where=f"shard {shard}, slice {slice_}",
            next_step="run `sisa verify`; restore the model directory from a backup",
        )
    records = [by_digest[digest] for digest in sorted(by_digest)]
    return context.stores.records.write(shard, slice_, slice_root(rows), records)


# --- plans ----------------------------------------------------------------------------------------


def view_shard(
    context: Context, shard: int, replaced: Iterable[SliceState] = (), dropped: Collection[str] = ()
) -> ShardView:
    """Return a shard's slices, some `replaced`, and its checkpoints except the `dropped` ones."""
    slices: dict[int, SliceState] = {file.slice: file for file in context.stores.ledger.slices(shard)}
    slices.update({state.slice: state for state in replaced})
    held = [each for each in context.stores.ledger.checkpoints(shard) if each.key not in dropped]
    return ShardView(shard, tuple(state for _, state in sorted(slices.items())), tuple(held))


def view_shards(context: Context, shards: Sequence[int]) -> list[ShardView]:
    """Return the views of several shards; for many shards, read the whole ledger at once."""
    if len(shards) <= FEW_SHARDS:
        return [view_shard(context, shard) for shard in shards]
    slices: defaultdict[int, list[SliceState]] = defaultdict(list)
    held: defaultdict[int, list[HeldCheckpoint]] = defaultdict(list)
    for file in context.stores.ledger.slices():
        slices[file.shard].append(file)
    for each in context.stores.ledger.checkpoints():
        held[each.shard].append(each)
    return [ShardView(shard, tuple(slices[shard]), tuple(held[shard])) for shard in shards]


def plan_of(context: Context, view: ShardView) -> ShardPlan:
    """Plan a shard under the model's present recipe and fingerprint."""
    return plans_of(context, [view])[0]


def plans_of(context: Context, views: Iterable[ShardView]) -> list[ShardPlan]:
    """Plan shards under the model's present recipe and fingerprint."""
    recipe = context.recipe
    return [plan_shard(view, recipe, context.compute.fingerprint) for view in views]


def open_shards(context: Context) -> list[int]:
    """Return the shards that are not at their target; with several orders, all shards."""
    heads, orders = context.stores.ledger.heads(), context.settings.recipe.orders
    return [head.shard for head in heads if orders or not head.converged]


def check_sources(context: Context, plans: Sequence[ShardPlan]) -> None:
    """Raise IntegrityError if a file that is needed is damaged, before anything is written.

    With several orders, the checkpoint that becomes the head is checked as well, since no stage of order
    0 may start from it.
    """
    ledger = context.stores.ledger
    for plan in plans:
        seen = {slice_ for job in plan.all_missing for slice_, _ in job.slices}
        for file in ledger.slices(plan.shard):
            if file.slice in seen:
                context.stores.records.check(file)
        for index in ledger.indexes(plan.shard) if plan.path else ():
            context.stores.index.check(index)
        needed = {each.parent.key for each in plan.missing if each.parent is not None}
        if context.settings.recipe.orders and plan.head.key is not None:
            needed.add(plan.head.key)
        for each in ledger.checkpoints(plan.shard) if needed else ():
            if each.key in needed:
                context.stores.checkpoints.load(each.key, each.manifest_sha256)
