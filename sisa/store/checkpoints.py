"""Checkpoints at rest: one directory per stage, or patch, named by the digest of its job.

Rules: a directory appears whole, by one rename, and is never changed. Its `manifest.json` (canonical)
holds the job and the sha256 of every other file; the ledger holds the sha256 of the manifest. Bytes
are checked before anything parses them; only safetensors and JSON are ever stored. Digests and sizes are
of the plaintext; all files of a directory share one key of the keyring.

Not covered: which checkpoints are clean (`plan.py`) and kept (`run.py`).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from sisa.digest import canonical_json, digest_of, sha256_hex
from sisa.domain import SavedCheckpoint, SliceJob
from sisa.errors import IntegrityError
from sisa.patch import PatchJob
from sisa.ports import Keyring
from sisa.store import files
from sisa.store.keyring import PLAIN

ROOM = "checkpoints"
MANIFEST = "manifest.json"
ADAPTER = "adapter_model.safetensors"


class FileCheckpoints:
    """A CheckpointStore in a directory; a replay's and that of patches have rooms of their own."""

    def __init__(self, root: Path, keyring: Keyring = PLAIN, room: str = ROOM) -> None:
        self.root = root
        self.keyring = keyring
        self.room = room

    def held(self) -> frozenset[str]:
        return files.held_names(self.root)

    def save(self, job: SliceJob | PatchJob, files_: Mapping[str, bytes]) -> SavedCheckpoint:
        manifest = canonical_json(
            {
                "job": asdict(job),
                "files": {name: sha256_hex(data) for name, data in files_.items()},
            }
        )
        sealed = {
            name: self.keyring.seal(self.room, job.key, name, data)
            for name, data in {**files_, MANIFEST: manifest}.items()
        }
        files.write_directory(self.root / job.key, sealed)
        return self.describe(job.key)

    def describe(self, key: str) -> SavedCheckpoint:
        path = self.root / key / MANIFEST
        try:
            sealed = path.read_bytes()
        except OSError as error:
            raise IntegrityError(
                "a checkpoint has no manifest", where=str(path), got=type(error).__name__
            ) from error
        data = self.keyring.unseal(self.room, key, MANIFEST, sealed)
        held = self._check(key, data)
        sizes = [len(data), *(len(each) for each in held.values())]
        adapter = sha256_hex(held[ADAPTER])
        return SavedCheckpoint(key, sha256_hex(data), adapter, sum(sizes))

    def load(self, key: str, manifest_sha256: str) -> dict[str, bytes]:
        return self._check(key, self._read(key, MANIFEST, manifest_sha256, "checkpoint manifest"))

    def _read(self, key: str, name: str, sha256: str, what: str) -> bytes:
        unseal = partial(self.keyring.unseal, self.room, key, name)
        return files.read_checked(self.root / key / name, sha256, what, unseal)

    def _check(self, key: str, manifest: bytes) -> dict[str, bytes]:
        path = self.root / key
        expected, job = _parse(path, manifest)
        if digest_of(job) != key:
            raise files.tampered(path / MANIFEST, "checkpoint manifest", key, digest_of(job))
        unknown = files.held_names(path) - expected.keys() - {MANIFEST}
        if unknown:
            raise IntegrityError(
                "a checkpoint holds files that its manifest does not name",
                where=str(path),
                expected=f"{len(expected)} files and the manifest",
                got=f"{len(unknown)} more",
                next_step="remove them, or train the model anew",
            )
        return {
            name: self._read(key, name, sha256, "checkpoint file") for name, sha256 in expected.items()
        }

    def erase(self, keys: Collection[str]) -> None:
        self.keyring.destroy(self.room, keys)
        for key in keys:
            files.erase(self.root / key)

    def location(self, key: str) -> str:
        return str(self.root.absolute() / key / ADAPTER)


def _parse(path: Path, manifest: bytes) -> tuple[dict[str, str], dict[str, Any]]:
    try:
        parsed = json.loads(manifest)
        names = {str(name): str(sha256) for name, sha256 in parsed["files"].items()}
        job = dict(parsed["job"])
        flat = all("/" not in name and name not in (".", "..", MANIFEST) for name in names)
        if not flat or ADAPTER not in names:
            raise ValueError("file names")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(
            "a checkpoint manifest can't be parsed",
            where=str(path / MANIFEST),
            got=type(error).__name__,
        ) from error
    return names, job
