"""Record deletions in the witness: an append-only file that no backup of the model contains.

    {"tombstone": [...]}    a deletion
    {"readmitted": "..."}   a deleted id that was allowed in again
    {"restrictions": {...}, "number": ...}    all subjects whose records are not served, and since when
    {"head": ..., "num_events": ..., "chain": ..., "mac": ...}    closes a batch: the event log's head

A closing line also has the number of the newest restrictions, if there ever were any.

A batch counts once its closing line is complete; the next append drops an incomplete one. `chain` hashes
all lines so far, and `mac` authenticates it with the partition key, so that nobody without the key can
change a line or remove one that others follow. Nothing here shows that the last batches were cut off:
`sisa audit` does, by the log. Batches of an earlier version have no `mac`: none may follow one that has.
The file holds keyed digests, positions and times only. Appends are flushed to the disk and lock the
file, because copies of a model share one witness.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

from sisa.core.digest import Keyed, canonical_json, digest_of
from sisa.core.domain import NO_RESTRICTIONS, Restrictions, Testimony, Tombstone, WitnessHead
from sisa.core.errors import EnvironmentFault, IntegrityError
from sisa.store.blobs import files

TAIL_BYTES = 4096  # read first, from the end; more than a batch of a few deletions
_CLOSING_LINE = re.compile(rb'(?<=\n)\{"chain".*\n')
_NOTHING = Testimony(None, {})
_FIELDS = tuple(field.name for field in fields(Tombstone))


@dataclass(frozen=True)
class _Batches:
    """The closed batches of a file, or the last of them."""

    testimony: Testimony = _NOTHING
    num_restrictions: int = 0
    chain: str = ""
    end: int = 0  # offset of the end of the last closing line


class FileWitness:
    """A Witness in one file."""

    def __init__(self, path: Path, keyed: Keyed) -> None:
        self.path = path
        self._keyed = keyed

    def head(self) -> WitnessHead | None:
        return self._read(self._last_batch).testimony.head

    def num_restrictions(self) -> int:
        return self._read(self._last_batch).num_restrictions

    def read(self) -> Testimony:
        return self._read(lambda file: self._batches(file.read())).testimony

    def _read(self, parse: Callable[[BinaryIO], _Batches]) -> _Batches:
        try:
            with self.path.open("rb") as file:
                return parse(file)
        except FileNotFoundError:
            return _Batches()
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
            last = self._last_batch(file)
            chain, number = last.chain, last.num_restrictions
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
            file.truncate(last.end)
            file.seek(last.end)
            file.write(b"".join(canonical_json(body) + b"\n" for body in bodies))
            file.flush()
            os.fsync(file.fileno())

    def location(self) -> str:
        return str(self.path)

    def _last_batch(self, file: BinaryIO) -> _Batches:
        """Return the last closed batch, checked from the chain of the batch before it."""
        size, num_bytes = file.seek(0, os.SEEK_END), TAIL_BYTES
        while num_bytes < size:
            start = file.seek(size - num_bytes)
            tail = file.read()
            closing = [*_CLOSING_LINE.finditer(tail)][-2:]
            if len(closing) == 2:
                before, last = closing
                if "mac" not in self._parsed(last[0]):  # none of the batches before may have one
                    break
                chain = str(self._parsed(before[0])["chain"])
                return self._batches(tail[before.end() :], chain, start + before.end())
            num_bytes *= 8
        file.seek(0)
        return self._batches(file.read())

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

    def _batches(self, data: bytes, chain: str = "", at: int = 0) -> _Batches:
        """Parse the batches that follow one with this chain, which ended at offset `at`."""
        found: dict[str, Tombstone] = {}
        restricted = NO_RESTRICTIONS
        batch: list[dict[str, Any]] = []
        closed = _Batches()
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
            if keyed and mac != self._mac(chain):
                raise self._damaged("lines that were written without the model's key")
            for each in batch:
                restricted = self._apply(each, found) or restricted
            batch = []
            testimony = Testimony(WitnessHead(body["head"], body["num_events"]), found, restricted)
            closed = _Batches(testimony, body.get("restrictions", 0), chain, at)
        return closed

    def _mac(self, chain: str) -> str:
        return self._keyed.digest("witness", chain)

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
