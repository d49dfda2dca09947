"""Whether a checkpoint at rest was made of records that are all still held.

A checkpoint's key hashes its whole chain of jobs, and each job the roots of its slices. So the chain is
built again from the rows that are held now and were held when it was trained: only if no record of it
is gone does the last key come out the same. The ledger's tombstones need not be trusted for it.

Rules: a manifest that can't be parsed proves nothing. Older hyper-parameters are taken from the job
itself, so that a head that still serves under a former run file can be proven, too.

Not covered: whether the weights are what that job trains (`verify --replay` proves that).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

from sisa.core.domain import RecordRow, SliceJob
from sisa.core.errors import IntegrityError
from sisa.core.patch import PatchJob, parse_patch_job
from sisa.core.ports import BlobStore, Keyring
from sisa.planning.assign import slice_root
from sisa.store.checkpoints import CHECKPOINTS_AREA, MANIFEST

_T = TypeVar("_T")


def read_manifest(checkpoint: Path, keyring: Keyring) -> tuple[SliceJob, dict[str, str]] | None:
    """The job of a checkpoint directory and the sha256 of its files; None if that can't be told."""
    try:
        data = (checkpoint / MANIFEST).read_bytes()
        return parse_manifest(keyring.unseal(CHECKPOINTS_AREA, checkpoint.name, MANIFEST, data))
    except (IntegrityError, OSError):
        return None


def parse_manifest(data: bytes) -> tuple[SliceJob, dict[str, str]] | None:
    """What `read_manifest` says, of a manifest's bytes."""
    return _parsed(data, parse_job)


def parse_patch_manifest(data: bytes) -> tuple[PatchJob, dict[str, str]] | None:
    """The same of a patch's."""
    return _parsed(data, parse_patch_job)


def _parsed(data: bytes, parse: Callable[[Any], _T]) -> tuple[_T, dict[str, str]] | None:
    try:
        parsed = json.loads(data)
        names = {str(name): str(sha256) for name, sha256 in parsed["files"].items()}
        return parse(parsed["job"]), names
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def parse_job(parsed: Any) -> SliceJob:
    """A job out of its JSON. Raises TypeError, ValueError, KeyError for anything else."""
    slices = tuple((int(number), str(root)) for number, root in parsed["slices"])
    first, second = parsed["passes"]
    lists = {"slices": slices, "passes": (int(first), int(second)), "before": _numbers(parsed["before"])}
    return SliceJob(**{**parsed, **lists})


def _numbers(values: Any) -> tuple[int, ...]:
    return tuple(int(each) for each in values)


def named_files(place: BlobStore, key: str, keyring: Keyring, room: str) -> frozenset[str] | None:
    """Names that belong into the group of a checkpoint, or of a patch, the manifest's among them."""
    try:
        data = keyring.unseal(room, key, MANIFEST, place.get(f"{key}/{MANIFEST}", "manifest"))
    except IntegrityError:
        return None
    found = parse_manifest(data) if room == CHECKPOINTS_AREA else parse_patch_manifest(data)
    return None if found is None else frozenset({*found[1], MANIFEST})


def proves_clean(job: SliceJob, rows: Iterable[RecordRow], seq: int, num_slices: int) -> bool:
    """Whether every record that a job's chain touched is among `rows`, the held ones of its shard.

    `seq` is the ledger's number of the state that the chain was trained on, `num_slices` that of a
    generation.
    """
    by_slice: dict[int, list[RecordRow]] = {slice_: [] for slice_ in job.prefix}
    for row in rows:
        if row.slice in by_slice and row.seq <= seq:
            by_slice[row.slice].append(row)
    return all(by_slice.values()) and _rebuilt(job, list(by_slice.items()), num_slices) == job.key


def _rebuilt(
    job: SliceJob, by_slice: Sequence[tuple[int, list[RecordRow]]], num_slices: int
) -> str | None:
    sequential = len(job.slices) == 1
    last = max(num_slices, *(number + 1 for number in job.prefix))
    in_all = Fraction(*job.passes) * (last + 1)  # of a cumulative schedule; see `plan.passes`
    parent: str | None = None
    seen: list[tuple[int, list[RecordRow]]] = []
    for place in by_slice:
        seen.append(place)
        stage = [place] if sequential else seen
        latest = max(num_slices, *(number + 1 for number, _ in seen))
        passes = Fraction(*job.passes) if sequential else in_all / (latest + 1)
        parent = replace(
            job,
            slice=place[0],
            parent=parent,
            slices=tuple((number, slice_root(rows)) for number, rows in stage),
            num_records=sum(len(rows) for _, rows in stage),
            passes=(passes.numerator, passes.denominator),
            before=tuple(number for number, _ in seen[:-1]),
        ).key
    return parent
