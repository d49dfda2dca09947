"""A run at rest, so that it can go on where it was.

Rules: weights and optimizer moments lie in one safetensors file named by its digest; `run.json`, written
last, names it. Whenever the machine stops, `run.json` and a whole file that it names are there, or
nothing is. Nothing else in the directory is touched. A run goes on only as the very run that it was:
same method, settings, data and first weights; else ConfigConflict. `identity` names data and model, and
is the caller's: a keyed digest, as these files must not tell what was to be forgotten. The weights may;
so `erase` them when the run is over, or, where they are `kept`, when what came of it is safe.

Sealed, where the caller says how: each file under its name; digests are of the plaintext.

Not covered: the keys that a caller seals with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from sisa.core.digest import canonical_json, sha256_hex
from sisa.core.errors import ConfigConflict, IntegrityError
from sisa.lm.base.adapter import read_tensors, tensor_bytes
from sisa.store.blobs.files import (
    TEMPORARY_PREFIX,
    erase,
    held_names,
    read_checked,
    read_whole,
    write_atomic,
)

STATE = "run.json"
SUFFIX = ".safetensors"
_OWN_NAME = re.compile(rf"[0-9a-f]{{64}}{re.escape(SUFFIX)}|{re.escape(TEMPORARY_PREFIX)}\w+")


@dataclass(frozen=True)
class Held:
    """What was held: the tensors, and the counts beside them."""

    tensors: Mapping[str, Tensor]
    counts: Mapping[str, Any]


def _plain(_name: str, data: bytes) -> bytes:
    return data


@dataclass(frozen=True)
class SavedRun:
    """A directory of its own, and the caller's name for data and model; how files, by name, are sealed
    and opened again; `kept`: whether the caller erases it when the run is over."""

    directory: Path
    identity: str
    seal: Callable[[str, bytes], bytes] = _plain
    unseal: Callable[[str, bytes], bytes] = _plain
    kept: bool = False

    def save(self, job: str, tensors: Mapping[str, Tensor], counts: Mapping[str, Any]) -> None:
        """Replace what is held. Raises EnvironmentFault."""
        data = tensor_bytes(tensors)
        digest = sha256_hex(data)
        self._write(f"{digest}{SUFFIX}", data)
        state = {"job": job, "identity": self.identity, "tensors": digest, "counts": dict(counts)}
        self._write(STATE, canonical_json(state))
        self._erase_tensors(but=f"{digest}{SUFFIX}")

    def _write(self, name: str, data: bytes) -> None:
        write_atomic(self.directory / name, self.seal(name, data))

    def load(self, job: str) -> Held | None:
        """What is held, or None. Raises ConfigConflict for another run's, IntegrityError for damage."""
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
                next_step="remove the directory; the run starts anew",
            ) from error
        if found != (job, self.identity):
            raise ConfigConflict(
                "another run was saved here",
                where=str(self.directory),
                expected="the same method, settings, data and first weights",
                next_step="give them again, or another directory",
            )
        name = f"{digest}{SUFFIX}"
        data = read_checked(self.directory / name, digest, "saved run", partial(self.unseal, name))
        return Held(read_tensors({name: data}, name), counts)

    def erase(self) -> None:
        """Remove what is held."""
        erase(self.directory / STATE)
        self._erase_tensors(but="")

    def _erase_tensors(self, but: str) -> None:
        for name in held_names(self.directory) - {but}:
            if _OWN_NAME.fullmatch(name):
                erase(self.directory / name)
