"""Parse checkpoints and patches at rest, and prove that a checkpoint was made of held records alone.

A checkpoint's key hashes its whole chain of jobs, and each job hashes the roots of its slices. To prove
a checkpoint clean, the chain is rebuilt from the rows that are held now and were held when it was
trained: the last key is the same only if no record of the chain is gone. The proof does not rely on
tombstones, nor on the run file: hyper-parameters come from the job itself. `verify --replay` proves
whether the weights are those that the job trains.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from sisa.core.digest import sha256_hex
from sisa.core.domain import PatchJob, RecordRow, SliceJob, parse_patch_job
from sisa.flows.wiring.context import Context, known_by_area
from sisa.planning.layout import slice_root

Are = Callable[[Mapping[str, str]], bool]
Fault = tuple[str, str]  # its kind and its description; both are empty if there is none
NONE: Fault = ("", "")


def parse_manifest(data: bytes) -> tuple[SliceJob | PatchJob, dict[str, str]] | None:
    """Return the job of a checkpoint or a patch and the SHA-256 of its files; None if unreadable."""
    try:
        parsed = json.loads(data)
        names = {str(name): str(sha256) for name, sha256 in parsed["files"].items()}
        job = parsed["job"]
        return parse_patch_job(job) if "beneath" in job else _parse_job(job), names
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError):
        return None


def _parse_job(parsed: Any) -> SliceJob:
    slices = tuple((int(number), str(root)) for number, root in parsed["slices"])
    first, second = (int(each) for each in parsed["passes"])
    Fraction(first, second)  # refuses no passes at all
    before = tuple(int(each) for each in parsed["before"])
    return SliceJob(**{**parsed, "slices": slices, "passes": (first, second), "before": before})


def proves_clean(job: SliceJob, rows: Iterable[RecordRow], seq: int, num_slices: int) -> bool:
    """Return whether every record that a job's chain touched is among `rows`, the shard's held records.

    The chain was trained on the ledger's state `seq`; a generation has `num_slices` slices.
    """
    by_slice: dict[int, list[RecordRow]] = {slice_: [] for slice_ in job.prefix}
    for row in rows:
        if row.slice in by_slice and row.seq <= seq:
            by_slice[row.slice].append(row)
    if not all(by_slice.values()):
        return False
    sequential = len(job.slices) == 1
    last = max(num_slices, *(number + 1 for number in job.prefix))
    in_all = Fraction(*job.passes) * (last + 1)  # for a cumulative schedule; see `plan.passes`
    parent: str | None = None
    seen: list[tuple[int, list[RecordRow]]] = []
    for slice_ in by_slice.items():
        seen.append(slice_)
        stage = [slice_] if sequential else seen
        latest = max(num_slices, *(number + 1 for number, _ in seen))
        passes = Fraction(*job.passes) if sequential else in_all / (latest + 1)
        parent = replace(
            job,
            slice=slice_[0],
            parent=parent,
            slices=tuple((number, slice_root(rows)) for number, rows in stage),
            num_records=sum(len(rows) for _, rows in stage),
            passes=(passes.numerator, passes.denominator),
            before=tuple(number for number, _ in seen[:-1]),
        ).key
    return parent == job.key


@dataclass(frozen=True, slots=True)
class Verdict:
    """Judge one group: its storage area, its key, the SHA-256 of each of its files, and its fault."""

    area: str
    key: str
    names: Mapping[str, str]
    fault: Fault


class FoundGroups:
    """Judge checkpoints and patches, wherever they were found, by a model's ledger.

    Groups that the ledger does not know are judged as well: a checkpoint that was retired, or that
    belongs to a copy of the model, is clean if all its records are still held.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self.checkpoints = {each.key: each for each in context.stores.ledger.checkpoints()}
        used = known_by_area(context)["patches"]
        self.patches = {each.key: each for each in context.stores.ledger.patches() if each.key in used}

    def judge(self, manifest: bytes, are: Are) -> Verdict:
        """Judge a group by its manifest; `are` returns whether its files have the given digests."""
        parsed = parse_manifest(manifest)
        if parsed is None:
            fault = "unreadable", "a checkpoint whose manifest can't be parsed"
            return Verdict("checkpoints", "", {}, fault)
        job, names = parsed
        if isinstance(job, PatchJob):
            return Verdict("patches", job.key, names, self._patch(job.key, manifest, are(names)))
        return Verdict("checkpoints", job.key, names, self._stage(job, manifest, are(names)))

    def _patch(self, key: str, manifest: bytes, whole: bool) -> Fault:
        known = self.patches.get(key)
        if known is None:
            what = "a patch that is no longer served: it may reflect records deleted since"
            return "stale_patch", what
        if sha256_hex(manifest) != known.manifest_sha256 or not whole:
            return "damaged", "a patch whose bytes are not the recorded ones"
        return NONE

    def _stage(self, job: SliceJob, manifest: bytes, whole: bool) -> Fault:
        held, ledger = self.checkpoints.get(job.key), self._context.stores.ledger
        if not whole or (held and sha256_hex(manifest) != held.manifest_sha256):
            return "damaged", "a checkpoint whose bytes are not the recorded ones"
        seq = held.seq if held else ledger.seq()
        if proves_clean(job, ledger.rows(job.shard), seq, self._context.settings.recipe.num_slices):
            return NONE
        known = "held checkpoint" if held else "checkpoint that the ledger lacks"
        return "tainted", f"a {known} was not made of held records alone"
