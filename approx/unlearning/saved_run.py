"""A run saved to disk, so that it can continue where it stopped.

Weights and optimizer moments are in one safetensors file named by its digest; `run.json`, written last,
names it. At any moment the directory holds `run.json` with the whole file that it names, or no saved
run. Other files in the directory are left alone.

A run continues only with the same method, settings, data and first weights. The weights may reveal what
was to be forgotten, so the caller seals the files, each under its name, and erases them when the result
is safe. Digests are of the plaintext.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sisa.core.digest import canonical_json, sha256_hex
from sisa.core.errors import ConfigConflict, IntegrityError
from sisa.lm.base.low_rank import read_tensors, tensor_bytes
from sisa.store.blobs.files import (
    TEMPORARY_PREFIX,
    erase,
    held_names,
    read_whole,
    verified,
    write_atomic,
)

STATE = "run.json"
SUFFIX = ".safetensors"
_OWN_NAME = re.compile(rf"[0-9a-f]{{64}}{re.escape(SUFFIX)}|{re.escape(TEMPORARY_PREFIX)}\w+")


@dataclass(frozen=True)
class SavedRun:
    """A directory for one run; `identity` is a keyed digest of data and model."""

    directory: Path
    identity: str
    seal: Callable[[str, bytes], bytes]  # of a file's name and bytes
    unseal: Callable[[str, bytes], bytes]

    def save(self, job: str, tensors: Mapping[str, Tensor], counts: Mapping[str, Any]) -> None:
        """Replace the saved run. Raise EnvironmentFault."""
        data = tensor_bytes(tensors)
        digest = sha256_hex(data)
        self._write(f"{digest}{SUFFIX}", data)
        state = {"job": job, "identity": self.identity, "tensors": digest, "counts": dict(counts)}
        self._write(STATE, canonical_json(state))
        for name in held_names(self.directory) - {f"{digest}{SUFFIX}"}:
            if _OWN_NAME.fullmatch(name):
                erase(self.directory / name)

    def _write(self, name: str, data: bytes) -> None:
        write_atomic(self.directory / name, self.seal(name, data))

    def load(self, job: str) -> tuple[Mapping[str, Tensor], Mapping[str, Any]] | None:
        """Return the saved tensors and counts, or None.

        Raise ConfigConflict for another run's state, and IntegrityError for damage.
        """
        path = self.directory / STATE
        if STATE not in held_names(self.directory):
            return None
        try:
            state = json.loads(self.unseal(STATE, read_whole(path, "saved run")))
            found = (state["job"], state["identity"])
            digest, counts = str(state["tensors"]), dict(state["counts"])
        except (ValueError, KeyError, TypeError) as error:
            raise IntegrityError(
                "a saved run can't be read",
                where=str(path),
                got=type(error).__name__,
                next_step="remove the directory; the run starts again",
            ) from error
        if found != (job, self.identity):
            raise ConfigConflict(
                "another run was saved here",
                where=str(self.directory),
                expected="the same method, settings, data and first weights",
                next_step="give them again, or another directory",
            )
        name = f"{digest}{SUFFIX}"
        path, what = self.directory / name, "saved run"
        data = verified(self.unseal(name, read_whole(path, what)), digest, what, str(path))
        return read_tensors({name: data}, name), counts
