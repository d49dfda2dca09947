"""Checkpoints at rest: one directory per stage or patch, named by the digest of its job.

A directory is a group of a blob store: it appears whole and never changes. Its `manifest.json`
(canonical) holds the job and the sha256 of every other file; the ledger holds the sha256 of the
manifest. Bytes are checked before anything parses them; only safetensors and JSON are ever stored.
Digests and sizes are of the plaintext; all files of a directory share one key of the keyring.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from fractions import Fraction
from typing import Any

from sisa.core.checkpoint_files import ADAPTER_FILE, MANIFEST_FILE
from sisa.core.digest import canonical_json, sha256_hex
from sisa.core.domain import SavedCheckpoint, SliceJob
from sisa.core.errors import IntegrityError
from sisa.core.patches import PatchJob, parse_patch_job
from sisa.store.areas import CHECKPOINTS
from sisa.store.blobs import files
from sisa.store.blobs.sealed_area import SealedArea


class FileCheckpoints(SealedArea):
    """A CheckpointStore in a storage area; patches and the checkpoints of a replay have their own."""

    area = CHECKPOINTS

    def save(self, job: SliceJob | PatchJob, files_: Mapping[str, bytes]) -> SavedCheckpoint:
        manifest = canonical_json(
            {
                "job": asdict(job),
                "files": {name: sha256_hex(data) for name, data in files_.items()},
            }
        )
        self._put_group(job.key, {**files_, MANIFEST_FILE: manifest})
        return self.describe(job.key)

    def describe(self, key: str) -> SavedCheckpoint:
        data = self.plaintext(f"{key}/{MANIFEST_FILE}", "checkpoint manifest")
        held = self._check(key, data)
        sizes = [len(data), *(len(each) for each in held.values())]
        adapter = sha256_hex(held[ADAPTER_FILE])
        return SavedCheckpoint(key, sha256_hex(data), adapter, sum(sizes))

    def load(self, key: str, manifest_sha256: str) -> dict[str, bytes]:
        what = "checkpoint manifest"
        return self._check(key, self.checked(f"{key}/{MANIFEST_FILE}", manifest_sha256, what))

    def _check(self, key: str, manifest: bytes) -> dict[str, bytes]:
        where = self.blobs.location(f"{key}/{MANIFEST_FILE}")
        parsed = parse_manifest(manifest)
        if parsed is None:
            raise IntegrityError("a checkpoint manifest can't be parsed", where=where)
        job, expected = parsed
        if job.key != key:
            raise files.tampered(where, "checkpoint manifest", key, job.key)
        unknown = self.blobs.parts(key) - expected.keys() - {MANIFEST_FILE}
        if unknown:
            raise IntegrityError(
                "a checkpoint holds files that its manifest does not name",
                where=self.blobs.location(key),
                expected=f"{len(expected)} files and the manifest",
                got=f"{len(unknown)} more",
                next_step="remove them, or train the model again",
            )
        return {
            name: self.checked(f"{key}/{name}", sha256, "checkpoint file")
            for name, sha256 in expected.items()
        }

    def location(self, key: str) -> str:
        return self.blobs.location(f"{key}/{ADAPTER_FILE}")


def parse_manifest(data: bytes) -> tuple[SliceJob | PatchJob, dict[str, str]] | None:
    """Return the job of a stage or a patch and the SHA-256 of its files; None if unreadable.

    All names are of files in the directory, one of them the adapter's.
    """
    try:
        parsed = json.loads(data)
        names = {str(name): str(sha256) for name, sha256 in parsed["files"].items()}
        job = parsed["job"]
        flat = all("/" not in name and name not in (".", "..", MANIFEST_FILE) for name in names)
        if not flat or ADAPTER_FILE not in names:
            return None
        return parse_patch_job(job) if "beneath" in job else _parse_job(job), names
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError):
        return None


def _parse_job(parsed: Any) -> SliceJob:
    slices = tuple((int(number), str(root)) for number, root in parsed["slices"])
    first, second = (int(each) for each in parsed["passes"])
    Fraction(first, second)  # refuses no passes at all
    before = tuple(int(each) for each in parsed["before"])
    return SliceJob(**{**parsed, "slices": slices, "passes": (first, second), "before": before})
