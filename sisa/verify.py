"""Proof: digests of all that is held, and a replay from scratch that must give the same bytes.

Rules: every held file is read and checked against the ledger, records against their keyed digests, and
index files against the ids that they should hold; a file that the ledger does not know is a finding.
A replay trains a shard from the base on the records that remain, into a scratch store, and compares
every file of every stage. It says `replayed: false` and why where the comparison would mean nothing:
another numerics fingerprint, or a shard that is not at its target.

Not covered: signed certificates. Source: the definition of exact unlearning in Bourtoule et al. 2021,
section III (equality of the model with one that was trained without the record).
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from sisa.domain import Chain, Head, IndexFile, SliceFile, SliceJob
from sisa.errors import IntegrityError, InvalidInput, Problem
from sisa.examine import forms
from sisa.plan import all_paths, plan_shard, reached
from sisa.ports import CheckpointStore
from sisa.reconcile import refuse_contradictions, training_started
from sisa.world import World, held_names, known_names, view_shard

Replay = Literal["none", "sample", "all"]


@dataclass(frozen=True)
class ShardProof:
    """One shard: `equal` is None where nothing was replayed, and `reason` says why."""

    shard: int
    head: str | None
    replayed: bool
    equal: bool | None
    stages: int
    reason: str = ""


@dataclass(frozen=True)
class Verification:
    """What was checked and what was found; `ok` when there are no findings."""

    ok: bool
    files_checked: int
    findings: tuple[Problem, ...]
    shards: tuple[ShardProof, ...]


def shards_to_replay(world: World, replay: Replay, shard: int | None) -> list[int]:
    """The shard that was named, else all, or one by chance. Raises InvalidInput."""
    heads = world.ledger.heads()
    if shard is not None:
        if shard not in {head.shard for head in heads}:
            raise InvalidInput("no such shard", expected=f"0 to {len(heads) - 1}", got=str(shard))
        return [shard]
    if replay == "all":
        return [head.shard for head in heads]
    held = [head.shard for head in heads if head.key is not None]
    return [secrets.choice(held)] if held else []


def verify(world: World, replayed: Sequence[int], scratch: CheckpointStore | None) -> Verification:
    """Check all held bytes; replay the shards named in `replayed` into `scratch`, side by side."""
    try:
        refuse_contradictions(world)
        count, findings = check_files(world)
        heads = world.ledger.heads()
    except IntegrityError as error:  # of the ledger itself: what it names can't be judged
        return Verification(False, 0, (Problem("ledger", f"{error.what} (got {error.got})"),), ())
    chains: dict[int, list[Chain]] = {}
    reasons: dict[int, str] = {}
    for head in heads:
        found = _chains(world, head) if head.shard in replayed and not findings else None
        if isinstance(found, list):
            chains[head.shard] = found
        elif head.shard not in replayed:
            reasons[head.shard] = "not asked for"
        else:
            reasons[head.shard] = found or "held files are damaged"
    for order in range(1 + len(world.recipe.orders)):
        now = [each[order] for each in chains.values() if each[order].jobs]
        if now and scratch is not None:
            world.report(training_started(now))
            world.executor_for(scratch).run(now, world.report)
    proofs = [_proof(world, head, chains.get(head.shard), scratch, reasons) for head in heads]
    findings += [
        Problem(f"shard {proof.shard}", "the replay's bytes differ from the held ones")
        for proof in proofs
        if proof.equal is False
    ]
    findings += _plain_files(world)
    return Verification(not findings, count, tuple(findings), tuple(proofs))


def _chains(world: World, head: Head) -> list[Chain] | str:
    """The chains that train a shard from the base, one for each order, up to the deepest stages that are
    held; or why that would prove nothing."""
    if not head.converged:
        return "the shard is not at its target yet: run `sisa train` with its run file"
    if head.key is None:
        return "the shard holds no records"
    held = {each.key: each for each in world.ledger.checkpoints(head.shard)}
    if held[head.key].fingerprint != world.fingerprint:
        return (
            f"trained under numerics fingerprint {held[head.key].fingerprint[:12]}, "
            f"this environment is {world.fingerprint[:12]}: bytes can't be compared"
        )
    files = tuple(world.ledger.slices(head.shard))
    paths = all_paths(head.shard, files, world.recipe, world.fingerprint)
    return [Chain(head.shard, path[: reached(path, held)], None, files) for path in paths]


def _proof(
    world: World,
    head: Head,
    chains: Sequence[Chain] | None,
    scratch: CheckpointStore | None,
    reasons: Mapping[int, str],
) -> ShardProof:
    if chains is None or scratch is None:
        return ShardProof(head.shard, head.key, False, None, 0, reasons.get(head.shard, ""))
    known = {each.key for each in world.ledger.checkpoints(head.shard)}
    stages = {job.key: job for chain in chains for job in chain.jobs if job.key in known}
    equal = all(_same(world, scratch, job) for job in stages.values())
    return ShardProof(head.shard, head.key, True, equal, len(stages))


def _same(world: World, scratch: CheckpointStore, job: SliceJob) -> bool:
    return world.checkpoints.describe(job.key) == scratch.describe(job.key)


def check_files(world: World) -> tuple[int, list[Problem]]:
    """Read and check everything that the ledger names; returns the count and the findings."""
    findings: list[Problem] = []
    count = 0

    def check(where: str, read: Callable[[], object]) -> None:
        nonlocal count
        count += 1
        try:
            read()
        except IntegrityError as error:
            found = f"{error.what} (expected {error.expected}, got {error.got})"
            findings.append(Problem(where, found if error.expected else error.what))

    for file in world.ledger.slices():
        check(f"records/{file.name}", partial(_check_slice, world, file))
    for index in world.ledger.indexes():
        check(f"index/{index.name}", partial(_check_index, world, index))
    for held in world.ledger.checkpoints():
        load = partial(world.checkpoints.load, held.key, held.manifest_sha256)
        check(f"checkpoints/{held.key}", load)
    needed = known_names(world)["patches"]
    for patch in world.ledger.patches():
        if patch.key in needed:
            load = partial(world.patches.load, patch.key, patch.manifest_sha256)
            check(f"patches/{patch.key}", load)
    for found in world.ledger.vault():
        if found.held:
            check(f"vault/{found.name}", partial(world.vault.check, found))
    return count, findings + _wrong_heads(world) + _unknown_files(world)


def _plain_files(world: World) -> list[Problem]:
    """What anybody could read of an encrypted model."""
    found = forms(world) if world.keyring.seals else ()
    return [Problem(each.where, each.what) for each in found]


def _wrong_heads(world: World) -> list[Problem]:
    """Heads that claim to be at their target and are not the last stage of the held records."""
    what = "serves another model than that of its records"
    wrong = []
    for head in world.ledger.heads():
        plan = plan_shard(view_shard(world, head.shard), world.recipe, world.fingerprint)
        if head.converged and head.key != plan.head.target:
            wrong.append(Problem(f"shard {head.shard}", what))
    return wrong


def _check_slice(world: World, file: SliceFile) -> None:
    rows = {row.id_digest: row for row in world.ledger.rows(file.shard, file.slice)}
    for stored in world.records.read(file):
        row = rows.pop(stored.id_digest, None)
        again = world.assigner.row(stored.record, 0)
        if row is None or again.record_digest != row.record_digest:
            raise IntegrityError("a slice file holds a record that the ledger does not")
    if rows:
        raise IntegrityError(f"a slice file lacks {len(rows)} records that the ledger holds")


def _check_index(world: World, file: IndexFile) -> None:
    wanted = sorted(row.vector_id for row in world.ledger.rows(file.shard))
    if len(wanted) != file.num_vectors:
        raise IntegrityError(
            "an index and the ledger disagree",
            expected=f"{len(wanted)} vectors",
            got=f"{file.num_vectors} vectors",
        )
    world.index.vectors(file, wanted)


def _unknown_files(world: World) -> list[Problem]:
    known = known_names(world)
    what = "a file that the ledger does not know; the next train, add or forget erases it"
    return [
        Problem(f"{folder}/{name}", what)
        for folder, held in held_names(world).items()
        for name in sorted(held - known[folder])
    ]
