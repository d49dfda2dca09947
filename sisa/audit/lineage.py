"""Judge checkpoints and patches at rest, and prove that one was made of held records alone.

A checkpoint's key hashes its whole chain of jobs, and each job hashes the roots of its slices. To prove
a checkpoint clean, the chain is rebuilt from the rows that are held now and were held when it was
trained: the last key is the same only if no record of the chain is gone. The proof does not rely on
tombstones, nor on the run file: hyper-parameters come from the job itself. `verify --replay` proves
whether the weights are those that the job trains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

from sisa.core.digest import sha256_hex
from sisa.core.domain import RecordRow, SliceJob
from sisa.core.patches import PatchJob
from sisa.flows.context.areas import known_by_area
from sisa.flows.context.context import Context
from sisa.planning.layout import slice_root
from sisa.store.areas import CHECKPOINTS, PATCHES
from sisa.store.checkpoints import parse_manifest

FilesMatch = Callable[[Mapping[str, str]], bool]  # whether files, by name, have these SHA-256
Fault = tuple[str, str]  # kind and description
NO_FAULT: Fault = ("", "")


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
    total = Fraction(*job.passes) * (last + 1)  # for a cumulative schedule; see `plan.passes`
    key: str | None = None  # of the stage before, and in the end of the last one
    seen: list[int] = []
    for slice_ in by_slice:
        before, seen = tuple(seen), [*seen, slice_]
        trained_on = [slice_] if sequential else seen
        latest = max(num_slices, *(number + 1 for number in seen))
        passes = Fraction(*job.passes) if sequential else total / (latest + 1)
        key = replace(
            job,
            slice=slice_,
            parent=key,
            slices=tuple((number, slice_root(by_slice[number])) for number in trained_on),
            num_records=sum(len(by_slice[number]) for number in trained_on),
            passes=(passes.numerator, passes.denominator),
            before=before,
        ).key
    return key == job.key


@dataclass(frozen=True, slots=True)
class Verdict:
    """Describe a judged group: its storage area, its key, the SHA-256 of its files, and its fault."""

    area: str
    key: str
    files: Mapping[str, str]
    fault: Fault


class GroupJudge:
    """Judge checkpoints and patches, wherever they were found, by a model's ledger.

    Groups that the ledger does not know are judged as well: a checkpoint that was retired, or that
    belongs to a copy of the model, is clean if all its records are still held.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self.checkpoints = {each.key: each for each in context.stores.ledger.checkpoints()}
        used = known_by_area(context)[PATCHES]
        self.patches = {each.key: each for each in context.stores.ledger.patches() if each.key in used}

    def judge(self, manifest: bytes, files_match: FilesMatch) -> Verdict:
        """Judge a group by its manifest, and by whether its files are those that the manifest names."""
        parsed = parse_manifest(manifest)
        if parsed is None:
            fault = "unreadable", "a checkpoint whose manifest can't be parsed"
            return Verdict(CHECKPOINTS, "", {}, fault)
        job, files = parsed
        intact = files_match(files)
        if isinstance(job, PatchJob):
            return Verdict(PATCHES, job.key, files, self._judge_patch(job.key, manifest, intact))
        return Verdict(CHECKPOINTS, job.key, files, self._judge_stage(job, manifest, intact))

    def _judge_patch(self, key: str, manifest: bytes, intact: bool) -> Fault:
        known = self.patches.get(key)
        if known is None:
            what = "a patch that is no longer served: it may reflect records deleted since"
            return "stale_patch", what
        if sha256_hex(manifest) != known.manifest_sha256 or not intact:
            return "damaged", "a patch whose bytes are not the recorded ones"
        return NO_FAULT

    def _judge_stage(self, job: SliceJob, manifest: bytes, intact: bool) -> Fault:
        held, ledger = self.checkpoints.get(job.key), self._context.stores.ledger
        if not intact or (held and sha256_hex(manifest) != held.manifest_sha256):
            return "damaged", "a checkpoint whose bytes are not the recorded ones"
        seq = held.seq if held else ledger.seq()
        if proves_clean(job, ledger.rows(job.shard), seq, self._context.recipe.num_slices):
            return NO_FAULT
        known = "held checkpoint" if held else "checkpoint that the ledger lacks"
        return "tainted", f"a {known} was not made of held records alone"
