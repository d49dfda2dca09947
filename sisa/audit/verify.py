"""Verify a model: check digests of everything held, and replay training to the same bytes.

Every held file is read and checked against the ledger. Records are assigned and digested again, which
must give their rows, and a sample of their texts is embedded again, which must give their vectors.

A replay trains a shard from the base on the records that remain, into a store of its own, and compares
every file of every stage with the held ones. One shard's stages are trained a second time, each in its
own process from its parent's files, to catch state that a process carries over from stage to stage.
A shard has `replayed: false` and a reason if a comparison would mean nothing: another numerics
fingerprint, or a shard that is not at its target.

Source: the definition of exact unlearning in Bourtoule et al. 2021, section III (equality of the model
with one that was trained without the record).
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from sisa.audit.clean_process import Apart
from sisa.audit.findings import checks, forms, wrong_heads
from sisa.core.domain import Chain, Head, IndexFile, Record, RecordRow, WitnessHead
from sisa.core.errors import ConfigConflict, EnvironmentFault, IntegrityError, InvalidInput, Problem
from sisa.core.events import Notice
from sisa.core.ports import By, CheckpointStore, Ledger, Vectors
from sisa.flows.context.areas import unlisted
from sisa.flows.context.consistency import check_consistent
from sisa.flows.context.context import Context
from sisa.flows.context.slices import embed_records
from sisa.flows.reconcile import training_started
from sisa.planning.plan import all_paths, reached
from sisa.store.areas import CHECKPOINTS, PATCHES

Replay = Literal["none", "sample", "all"]
EMPTY = "the shard holds no records"
NOT_REQUESTED = "not requested"  # the reason of a shard that was not to be replayed
SAMPLED_SLICES, SAMPLED_RECORDS = 16, 4  # slices, and records of each, to embed again
VECTOR_TOLERANCE = 1e-3  # per component of a unit vector: other processors round differently


@dataclass(frozen=True)
class ShardProof:
    """Hold the proof of one shard; `equal` is None if nothing was replayed, and `reason` says why."""

    shard: int
    head: str | None
    replayed: bool
    equal: bool | None
    stages: int
    reason: str = ""
    equal_apart: bool | None = None  # whether stages trained in their own processes are equal, too


@dataclass(frozen=True)
class Verification:
    """Hold the result of a verification; `ok` if there are no findings."""

    ok: bool
    files_checked: int
    findings: tuple[Problem, ...]
    shards: tuple[ShardProof, ...]
    vectors_embedded: int = 0  # number of texts embedded again

    @property
    def replayed(self) -> int:
        """Return the number of shards that were trained from scratch."""
        return sum(each.replayed for each in self.shards)


def shards_to_replay(
    context: Context, replay: Replay, chosen: int | Collection[int] | None
) -> list[int]:
    """Return the chosen shards, all shards, or a random one. Raise InvalidInput for an unknown one."""
    heads = context.stores.ledger.heads()
    if chosen is not None:
        shards = [chosen] if isinstance(chosen, int) else sorted(chosen)
        if unknown := set(shards) - {head.shard for head in heads}:
            got = ", ".join(map(str, sorted(unknown)))
            raise InvalidInput("no such shard", expected=f"0 to {len(heads) - 1}", got=got)
        return shards
    if replay == "all":
        return [head.shard for head in heads]
    held = [head.shard for head in heads if head.key is not None]
    return [secrets.choice(held)] if held else []


def verify(
    context: Context,
    replayed: Sequence[int],
    replays: CheckpointStore | None,
    apart: Apart | None = None,
    *,
    require_replay: bool = False,
    anchor: WitnessHead | None = None,
) -> Verification:
    """Check all held bytes, and replay the shards in `replayed` into `replays`, side by side.

    One of these shards is also trained `apart`. With `require_replay`, a shard that holds records and
    can't be replayed is a finding; so are events that do not continue the `anchor`.
    """
    try:
        check_consistent(context)
        count, findings = check_files(context)
        vectors, wrong = check_vectors(context) if not findings else (0, [])
        wrong += _not_anchored(context.stores.ledger, anchor) if anchor else []
        heads = context.stores.ledger.heads()
    except IntegrityError as error:  # the ledger itself is damaged, so files can't be judged by it
        return Verification(False, 0, (Problem("ledger", f"{error.what} (got {error.got})"),), ())
    findings += wrong
    chains, reasons = _to_replay(context, [each for each in heads if each.shard in replayed], findings)
    for order in range(1 + len(context.recipe.other_orders)):
        of_order = [each[order] for each in chains.values() if each[order].jobs]
        if of_order and replays is not None:
            context.report(training_started(of_order))
            context.compute.executor_for(replays).run(of_order, context.report)
    trained_apart = None
    if chains and apart is not None:
        trained_apart = secrets.choice(sorted(chains))
        context.report(Notice(f"shard {trained_apart}: trained again, each stage in its own process"))
        apart.train(chains[trained_apart])
    proofs = []
    for head in heads:
        if replays is not None and head.shard in chains:
            also = apart if head.shard == trained_apart else None
            proofs.append(_proof(context, head, chains[head.shard], replays, also))
        else:
            reason = reasons.get(head.shard, NOT_REQUESTED)
            proofs.append(ShardProof(head.shard, head.key, False, None, 0, reason))
    findings += [*_differing(proofs), *(_unproved(proofs, replayed) if require_replay else ())]
    if context.stores.keyring.seals:
        findings += [Problem(each.where, each.what) for each in forms(context)]
    return Verification(not findings, count, tuple(findings), tuple(proofs), vectors)


def _to_replay(
    context: Context, heads: Sequence[Head], findings: Sequence[Problem]
) -> tuple[dict[int, list[Chain]], dict[int, str]]:
    """Return the chains of shards that can be replayed, and why the others can't, by shard."""
    chains: dict[int, list[Chain]] = {}
    reasons: dict[int, str] = {}
    for head in heads:
        if findings:
            reasons[head.shard] = "held files are damaged"
        elif why_not := _not_replayable(context, head):
            reasons[head.shard] = why_not
        else:
            chains[head.shard] = _chains(context, head.shard)
    return chains, reasons


def _not_anchored(ledger: Ledger, anchor: WitnessHead) -> list[Problem]:
    """Return a finding if the event log, which must be one chain, does not extend an anchored head."""
    known = ledger.event_head().num_events
    if anchor.num_events > known:
        what = f"has {known} events, but {anchor.num_events} were anchored: it was set back"
    elif ledger.events(anchor.num_events - 1)[0].link != anchor.link:
        what = f"event {anchor.num_events} is not the anchored one: the history was rewritten"
    else:
        return []
    return [Problem("event log", what)]


def _differing(proofs: Iterable[ShardProof]) -> Iterator[Problem]:
    for proof in proofs:
        if proof.equal is False:
            yield Problem(f"shard {proof.shard}", "the replay's bytes differ from the held ones")
        if proof.equal_apart is False:
            what = "trained again, each stage in its own process, its bytes differ from the held ones"
            yield Problem(f"shard {proof.shard}", what)


def _unproved(proofs: Sequence[ShardProof], replayed: Sequence[int]) -> Iterator[Problem]:
    """Yield the shards that a required replay left out; those without records have nothing to prove."""
    for proof in proofs:
        if proof.shard in replayed and not proof.replayed and proof.reason != EMPTY:
            yield Problem(f"shard {proof.shard}", f"was not replayed: {proof.reason}")
    if not any(proof.replayed for proof in proofs):
        yield Problem("replay", "no shard was replayed, and a replay was required")


def _not_replayable(context: Context, head: Head) -> str:
    """Return why a replay of a shard would prove nothing; empty if it would prove something."""
    if not head.converged:
        return "the shard is not at its target yet: run `sisa train` with its run file"
    if head.key is None:
        return EMPTY
    held = {each.key: each for each in context.stores.ledger.checkpoints(head.shard)}
    if held[head.key].fingerprint != context.compute.fingerprint:
        return (
            f"trained under numerics fingerprint {held[head.key].fingerprint[:12]}, "
            f"this environment is {context.compute.fingerprint[:12]}: bytes can't be compared"
        )
    return ""


def _chains(context: Context, shard: int) -> list[Chain]:
    """Return a shard's chains to its deepest held stages, one for each order."""
    held = {each.key for each in context.stores.ledger.checkpoints(shard)}
    files = tuple(context.stores.ledger.slices(shard))
    paths = all_paths(shard, files, context.recipe, context.compute.fingerprint)
    return [Chain(shard, path[: reached(path, held)], None, files) for path in paths]


def _proof(
    context: Context, head: Head, chains: Sequence[Chain], replays: CheckpointStore, apart: Apart | None
) -> ShardProof:
    known = {each.key for each in context.stores.ledger.checkpoints(head.shard)}
    stages = sorted({job.key for chain in chains for job in chain.jobs} & known)

    def same(store: CheckpointStore) -> bool:
        return all(context.stores.checkpoints.describe(key) == store.describe(key) for key in stages)

    equal_apart = same(apart.store) if apart else None
    return ShardProof(head.shard, head.key, True, same(replays), len(stages), equal_apart=equal_apart)


def check_files(context: Context) -> tuple[int, list[Problem]]:
    """Read and check everything that the ledger names; return the number of files and the findings."""
    findings: list[Problem] = []
    count = 0
    groups = {CHECKPOINTS: context.stores.checkpoints, PATCHES: context.stores.patches}
    for named, check in checks(context, lambda area, *of: groups[area].load(*of)):
        count += 1
        try:
            check()
        except IntegrityError as error:
            found = f"{error.what} (expected {error.expected}, got {error.got})"
            findings.append(Problem(named.where, found if error.expected else error.what))
    findings += [Problem(each.where, each.what) for each in wrong_heads(context)]
    what = "a file that the ledger does not know; the next train, add or forget erases it"
    for area, names in unlisted(context).items():
        findings += [Problem(f"{area}/{name}", what) for name in sorted(names)]
    return count, findings


def check_vectors(context: Context) -> tuple[int, list[Problem]]:
    """Embed a sample of records again; return its size, and the indexes that hold other vectors."""
    sampled: list[tuple[IndexFile, RecordRow, Record]] = []
    indexes = {each.shard: each for each in context.stores.ledger.indexes()}
    slices = context.stores.ledger.slices()
    for file in random.SystemRandom().sample(slices, min(len(slices), SAMPLED_SLICES)):
        rows = {row.id_digest: row for row in context.stores.ledger.rows(file.shard, file.slice)}
        records = context.stores.records.read(file)
        for stored in random.SystemRandom().sample(records, min(len(records), SAMPLED_RECORDS)):
            sampled.append((indexes[file.shard], rows[stored.id_digest], stored.record))
    try:
        vectors = embed_records(context, [record for _, _, record in sampled])
    except (EnvironmentFault, InvalidInput, ConfigConflict):  # no embedder, or an index without prompts
        return 0, []
    wrong = {
        index.name
        for (index, row, _), wanted in zip(sampled, vectors, strict=True)
        if _differ(context, index, row, wanted)
    }
    what = "holds a vector that is not that of its record's text or question"
    return len(sampled), [Problem(f"index/{name}", what) for name in sorted(wrong)]


def _differ(context: Context, index: IndexFile, row: RecordRow, wanted: Vectors) -> bool:
    import numpy as np

    sides: tuple[By, ...] = ("text", "prompts") if len(wanted) > 1 else ("text",)
    held = np.concatenate([context.stores.index.vectors(index, [row.vector_id], by) for by in sides])
    return held.shape != wanted.shape or bool(abs(held - wanted).max() > VECTOR_TOLERANCE)
