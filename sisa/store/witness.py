"""The witness at rest: an append-only file outside the model's directory, which no backup of it sets
back. (The witnesses of `evidence/log.py` are others: parties that cosign a log.)

    {"tombstone": [...]}    a deletion
    {"readmitted": "..."}   a deleted id that was allowed in again
    {"restrictions": {...}, "number": ...}    all subjects whose records are not served, and since when
    {"head": ..., "num_events": ..., "chain": ..., "mac": ...}    closes a batch: the event log's head

A closing line also has the number of the newest restrictions, if there ever were any.

A batch counts once its closing line is complete; the next append drops an incomplete one. `chain` hashes
all lines so far, and `mac` authenticates it with the partition key, so that nobody without the key can
change or remove a line. Batches of an earlier version have no `mac`: none may follow one that has. The
file holds keyed digests, positions and times only. Appends are flushed to the disk and lock the file,
because copies of a model share one witness.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any, BinaryIO

from sisa.core.digest import Keyed, canonical_json, digest_of
from sisa.core.domain import NO_RESTRICTIONS, Restrictions, Testimony, Tombstone, WitnessHead
from sisa.core.errors import EnvironmentFault, IntegrityError
from sisa.store.blobs import files

TAIL_BYTES = 4096  # far more than a closing line
_FIELDS = tuple(field.name for field in fields(Tombstone))


class FileWitness:
    """A Witness in one file."""

    def __init__(self, path: Path, keyed: Keyed) -> None:
        self.path = path
        self._keyed = keyed

    def head(self) -> WitnessHead | None:
        closing = self._last_closing_line()
        return self.read().head if closing is None else _head(closing)

    def num_restrictions(self) -> int:
        closing = self._last_closing_line()
        return self.read().restrictions.number if closing is None else closing.get("restrictions", 0)

    def _last_closing_line(self) -> dict[str, Any] | None:
        """Return the last closing line, if there is one near the end of the file."""
        tail = self._bytes(TAIL_BYTES)
        last = [line for line in tail.split(b"\n")[:-1] if line.startswith(b'{"chain"')]
        if not last:
            return None
        body = self._parsed(last[-1])
        if "mac" in body:
            self._check_mac(body["chain"], body["mac"])
        return body

    def read(self) -> Testimony:
        return self._testimony(self._bytes())[0]

    def _bytes(self, most: int | None = None) -> bytes:
        """Return the file's bytes, or the last ones; none if there is no file."""
        try:
            with self.path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(0 if most is None else max(0, size - most))
                return file.read()
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise self._refused("read", error) from error

    def append(
        self,
        head: WitnessHead,
        tombstones: Sequence[Tombstone],
        readmitted: Sequence[str],
        restrictions: Restrictions = NO_RESTRICTIONS,
    ) -> None:
        with self._locked() as file:
            chain, end, number = self._last_batch(file)
            bodies: list[dict[str, Any]] = [{"tombstone": list(astuple(each))} for each in tombstones]
            bodies += [{"readmitted": each} for each in readmitted]
            if restrictions.number > number:
                number = restrictions.number
                bodies.append({"restrictions": dict(restrictions.since), "number": number})
            for body in bodies:
                chain = digest_of([chain, body])
            closing: dict[str, Any] = {"head": head.link, "num_events": head.num_events}
            closing |= {"restrictions": number} if number else {}
            chain = digest_of([chain, closing])
            bodies.append({**closing, "chain": chain, "mac": self._mac(chain)})
            file.truncate(end)
            file.seek(end)
            file.write(b"".join(canonical_json(body) + b"\n" for body in bodies))
            file.flush()
            os.fsync(file.fileno())

    def location(self) -> str:
        return str(self.path)

    def _last_batch(self, file: BinaryIO) -> tuple[str, int, int]:
        """Return the last closed batch's chain, its end's offset, and its number of restrictions."""
        size = file.seek(0, os.SEEK_END)
        start = max(0, size - TAIL_BYTES)
        file.seek(start)
        tail = file.read()
        whole = tail[: tail.rfind(b"\n") + 1]
        line = whole[whole.rfind(b"\n", 0, -1) + 1 :]
        if line.startswith(b'{"chain"') and (start == 0 or len(line) < len(whole)):
            closing = self._parsed(line)
            return str(closing["chain"]), start + len(whole), closing.get("restrictions", 0)
        file.seek(0)
        testimony, chain, end = self._testimony(file.read())
        return chain, end, testimony.restrictions.number

    @contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        try:
            new = not self.path.exists()
            files.make_directory(self.path.parent)
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            with os.fdopen(handle, "r+b") as file:
                files.take_lock(file.fileno(), self.path, "keeps the witness of this model locked")
                yield file
            if new:
                files.sync_directory(self.path.parent)
        except OSError as error:
            raise self._refused("written", error) from error

    def _testimony(self, data: bytes) -> tuple[Testimony, str, int]:
        """Return the closed batches' testimony, the last one's chain, and the offset of its end."""
        found: dict[str, Tombstone] = {}
        restricted = NO_RESTRICTIONS
        batch: list[dict[str, Any]] = []
        head: WitnessHead | None = None
        chain, closed, at, end = "", "", 0, 0
        keyed = False
        for line in data.split(b"\n")[:-1]:
            at += len(line) + 1
            body = self._parsed(line)
            if "chain" not in body:
                chain = digest_of([chain, body])
                batch.append(body)
                continue
            claimed, mac = body.pop("chain"), body.pop("mac", None)
            chain = digest_of([chain, body])
            if claimed != chain:
                raise self._damaged("lines that were changed or removed")
            keyed = keyed or mac is not None
            if keyed:
                self._check_mac(chain, mac)
            for each in batch:
                restricted = self._apply(each, found) or restricted
            head, batch, closed, end = _head(body), [], chain, at
        return Testimony(head, found, restricted), closed, end

    def _mac(self, chain: str) -> str:
        return self._keyed.digest("witness", chain)

    def _check_mac(self, chain: str, mac: Any) -> None:
        """Raise IntegrityError unless the model's key made the MAC of a batch."""
        if mac != self._mac(chain):
            raise self._damaged("lines that were written without the model's key")

    def _apply(self, body: dict[str, Any], found: dict[str, Tombstone]) -> Restrictions | None:
        """Apply a line to the tombstones, or return the restrictions that it holds."""
        try:
            if "restrictions" in body:
                return Restrictions(int(body["number"]), dict(body["restrictions"]))
            if "readmitted" in body:
                found.pop(str(body["readmitted"]), None)
            else:
                tombstone = Tombstone(**dict(zip(_FIELDS, body["tombstone"], strict=True)))
                found[tombstone.id_digest] = tombstone
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged("a line of another form") from error
        return None

    def _parsed(self, line: bytes) -> dict[str, Any]:
        try:
            body = json.loads(line)
            kinds = {"chain": str, "head": str, "num_events": int} if "chain" in body else {}
            if kinds and "restrictions" in body:
                kinds["restrictions"] = int
            if not isinstance(body, dict) or any(
                not isinstance(body.get(key), kind) for key, kind in kinds.items()
            ):
                raise ValueError
        except (ValueError, TypeError) as error:
            raise self._damaged("a line that can't be parsed") from error
        return body

    def check_writable(self) -> None:
        """Raise EnvironmentFault if the witness can't be written; write nothing."""
        found = next(each for each in (self.path, *self.path.parents) if each.exists())
        if not os.access(found, os.W_OK) or found.is_file() != (found == self.path):
            raise self._refused("written", PermissionError(errno.EACCES, os.strerror(errno.EACCES)))

    def _refused(self, done: str, error: OSError) -> EnvironmentFault:
        return EnvironmentFault(
            f"the witness can't be {done}: {error.strerror or type(error).__name__}",
            where=str(self.path),
            next_step="free disk space or give this user access; or name another directory by "
            "`witness:` in the run file and run `sisa train RUN.yaml`",
        )

    def _damaged(self, got: str) -> IntegrityError:
        return IntegrityError(
            "the witness of this model is damaged: it can't say what was deleted",
            where=str(self.path),
            got=got,
            next_step="if this model was not restored from a backup, move the witness away: the next "
            "train, add or forget begins a new one; else restore the witness from a backup, too",
        )


def _head(body: dict[str, Any]) -> WitnessHead:
    return WitnessHead(body["head"], body["num_events"])
