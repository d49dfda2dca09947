"""Keep a model's transparency log in blobs, in the formats of C2SP (`tiles.py` lists its files).

Any server of static files publishes it. An append writes the statement, the entry, its tiles and then
the checkpoint; a crash between them leaves files that no checkpoint covers, and the next append writes
them again. The checkpoint that was signed last is also stored beside the keys, where restoring a backup
of the model does not set it back: a log that is behind it or has diverged from it signs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from sisa.core.digest import sha256_hex
from sisa.core.errors import IntegrityError, InvalidInput
from sisa.core.ports import BlobStore
from sisa.evidence.log.published import check_log
from sisa.evidence.log.tiles import (
    CHECKPOINT,
    MAX_ENTRY_BYTES,
    NO_ENTRIES,
    Tiles,
    cutting_full_tiles,
    encode_bundle,
    hashes_in,
    signature_line,
    statement_path,
)
from sisa.store.blobs import files
from sisa.verifier import merkle, note
from sisa.verifier.certificate import ENTRY_FORM, log_entry
from sisa.verifier.envelope import (
    STATEMENT_FORM,
    Among,
    Refused,
    base64_bytes,
    check_form,
    parse_canonical,
    strict_json,
)
from sisa.verifier.note import ED25519_TYPE, WIDTH, Checkpoint, NoteKey, tile_path

SIGNED = "signed-checkpoint"  # beside the keys
RESTORE_LOG = (
    "restore the log's newer files from where it is published, or from a newer backup; nothing is "
    "signed until then"
)


class LogKeys(Protocol):
    """What signs a log: the model's name, the seed of the log's key, and the directory of the keys."""

    @property
    def model(self) -> str: ...
    @property
    def log_seed(self) -> bytes: ...
    @property
    def directory(self) -> Path: ...


@dataclass(frozen=True)
class Entry:
    """An entry of the log: its number, and the type and the sha256 of the statement it names."""

    index: int
    predicate_type: str
    sha256: str


def origin(model: str) -> str:
    """Return the name of a model's log."""
    return f"deletion-ready-model/{model}"


class Log:
    """A model's log. Whoever appends or adds cosignatures holds the model's writer lock."""

    def __init__(self, blobs: BlobStore, keys: LogKeys) -> None:
        self._blobs = blobs
        self._private = Ed25519PrivateKey.from_private_bytes(keys.log_seed)
        self.key = NoteKey(
            origin(keys.model), ED25519_TYPE, self._private.public_key().public_bytes_raw()
        )
        self._signed_at = keys.directory / SIGNED

    @property
    def size(self) -> int:
        """Return the number of entries that the published checkpoint covers."""
        return self.checkpoint.size

    @property
    def checkpoint(self) -> Checkpoint:
        """Return the published checkpoint, or NO_ENTRIES if there is none. Raise IntegrityError."""
        published = self.published_note()
        return self._open(published, self._blobs.location(CHECKPOINT)) if published else NO_ENTRIES

    def published_note(self) -> bytes:
        """Return the published checkpoint with its signatures; nothing if there is none."""
        return self._read(CHECKPOINT) if self._blobs.num_bytes(CHECKPOINT) else b""

    def append(self, envelope: bytes, predicate_type: str) -> int:
        """Log a signed statement and return its number; a repetition of the last entry logs nothing.

        Raise IntegrityError if the log is not the one whose checkpoint was signed last.
        """
        before, sha256 = self.recover(), sha256_hex(envelope)
        entry = log_entry(sha256, predicate_type)
        if len(entry) > MAX_ENTRY_BYTES:
            raise InvalidInput("a predicate type is too long", expected=f"{MAX_ENTRY_BYTES} bytes")
        bundle = self._bundle(before.size - 1, before.size) if before.size else []
        if bundle[-1:] == [entry]:
            return before.size - 1  # logged before a crash, and not noted by the caller
        self._blobs.put(statement_path(sha256), envelope)
        self._sign(self._write(before, [*bundle, entry] if before.size % WIDTH else [entry]))
        return before.size

    def recover(self) -> Checkpoint:
        """Return the checkpoint that was signed last, and publish it if a crash prevented that.

        Raise IntegrityError if the log was set back, or has taken another way than what was signed.
        """
        published, signed = self.checkpoint, self._signed_checkpoint()
        first, last = sorted((published, signed), key=lambda each: each.size)
        try:
            tiles = Tiles(self._read, last.size)
            tiles.check_follows(first, last)
            merkle.verify_consistency(last.size, last.size, [], tiles.hash(0, last.size), last.root)
        except (Refused, IntegrityError) as error:
            raise IntegrityError(
                "the log was set back, or is not the one whose checkpoint was signed last",
                where=self._blobs.location(),
                expected=f"the {signed.size} entries of {self._signed_at}",
                got=f"{published.size} entries published: {error.what}",
                next_step=RESTORE_LOG,
            ) from error
        if signed.size < last.size:
            files.write_atomic(self._signed_at, self.published_note())
        elif published.size < last.size:
            self._blobs.put(CHECKPOINT, self._signed_at.read_bytes())
        return last

    def _write(self, before: Checkpoint, bundle: Sequence[bytes]) -> Checkpoint:
        """Write the last bundle with a new entry at its end, and its tiles; return what to sign."""
        index, level, made = before.size, 0, dict[str, bytes]()
        *held, node = map(merkle.leaf_hash, bundle)
        self._put("entries", index, encode_bundle(bundle), made)
        while True:
            number, at = divmod(index, WIDTH)
            tile = (self._read(tile_path(level, number, at)) if at else b"") + node
            if level == 0 and tile != b"".join([*held, node]):
                where = self._blobs.location(tile_path(0, number, at))
                raise _damaged(where, "a tile of the log is not that of its entries")
            self._put(level, index, tile, made)
            if at + 1 < WIDTH:
                break
            # A full tile is one hash of the level above.
            node, index, level = merkle.root(hashes_in(tile)), number, level + 1
        tiles = Tiles(lambda path: made.get(path) or self._read(path), before.size + 1)
        now = Checkpoint(self.key.name, tiles.size, tiles.hash(0, tiles.size))
        tiles.check_follows(before, now)
        return now

    def _put(self, level: int | str, index: int, data: bytes, made: dict[str, bytes]) -> None:
        """Store a tile or bundle that ends with `index`; the first of a new one erases older widths."""
        number, at = divmod(index, WIDTH)
        if at == 0 and number:
            folder, _, name = tile_path(level, number - 1).rpartition("/")
            self._blobs.below(folder).erase([f"{name}.p"])  # the full one serves every size
        made[path := tile_path(level, number, at + 1)] = data
        self._blobs.put(path, data)

    def _sign(self, now: Checkpoint) -> None:
        """Sign a checkpoint, remember it beside the keys, then publish it."""
        text = checkpoint_text(now)
        signed = text + b"\n" + signature_line(self.key.name, self.key.id + self._private.sign(text))
        files.write_atomic(self._signed_at, signed)
        self._blobs.put(CHECKPOINT, signed)

    def signed_note(self) -> bytes:
        """Return the checkpoint that was signed last, as the file beside the keys has it; or nothing."""
        return files.read_whole(self._signed_at, "checkpoint") if self._signed_at.exists() else b""

    def _signed_checkpoint(self) -> Checkpoint:
        signed = self.signed_note()
        return self._open(signed, str(self._signed_at)) if signed else NO_ENTRIES

    def _open(self, signed: bytes, where: str) -> Checkpoint:
        try:
            return note.open_checkpoint(signed, str(self.key))
        except Refused as error:
            raise _damaged(where, f"the log's checkpoint is not this model's: {error.what}") from error

    def proof(self, index: int) -> bytes:
        """Return the `.tlog-proof` of an entry, against the published checkpoint. Raise InvalidInput."""
        published, now = self.published_note(), self.checkpoint
        if not 0 <= index < now.size:
            raise InvalidInput("the log has no such entry", expected=f"below {now.size}", got=str(index))
        try:
            tiles = Tiles(self._read, now.size)
            path, leaf = tiles.inclusion(index), tiles.hash(index, index + 1)
            merkle.verify_inclusion(leaf, index, now.size, path, now.root)
        except Refused as error:
            what = f"the log's tiles are not those of its checkpoint: {error.what}"
            raise _damaged(self._blobs.location(error.where), what) from error
        return proof_text(index, path, published)

    def request(self, old: int) -> bytes:
        """Return what asks a cosigner that has seen `old` entries to cosign: C2SP's add-checkpoint."""
        published, now = self.published_note(), self.checkpoint
        if not 0 <= old <= now.size or not published:
            raise InvalidInput("no cosigner has seen that", expected=f"0 to {now.size}", got=str(old))
        lines = [f"old {old}", *map(note.b64, Tiles(self._read, now.size).consistency(old))]
        return "\n".join(lines).encode() + b"\n\n" + published

    def entries(self, start: int = 0) -> Iterator[Entry]:
        """Yield the entries from number `start` on. Raise IntegrityError for a damaged bundle."""
        size = self.size
        for first in range(start - start % WIDTH, size, WIDTH):
            for index, entry in enumerate(self._bundle(first, size), start=first):
                if index >= start:
                    yield parse_entry(index, entry)

    def _bundle(self, index: int, size: int) -> list[bytes]:
        """Return the entries of the bundle that holds an entry of a log with this size."""
        number = index // WIDTH
        width = min(WIDTH, size - number * WIDTH)
        path = tile_path("entries", number, width)
        try:
            return note.split_bundle(self._read(path), width)
        except Refused as error:
            raise _damaged(self._blobs.location(path), error.what) from error

    def statement(self, sha256: str) -> bytes:
        """Return a statement by its sha256. Raise IntegrityError if it is missing or changed."""
        name = statement_path(sha256)
        return files.verified(self._read(name), sha256, "statement", self._blobs.location(name))

    def check(self, cosigners: Sequence[str] = (), seen: Sequence[bytes] = ()) -> Checkpoint:
        """Check the whole log as an outsider would, who also saw what was signed last. Raise Refused."""
        if signed := self.signed_note():
            seen = [*seen, signed]
        if not seen and not self.published_note():
            return NO_ENTRIES
        return check_log(cutting_full_tiles(self._read), str(self.key), cosigners, seen)[0]

    def cosigners(self) -> list[tuple[str, int]]:
        """Return the names of the cosigners under the published checkpoint, and when they signed."""
        published = self.published_note()
        signatures = note.split_note(published)[1] if published else []
        found = ((name, data[4:12]) for name, data in signatures if len(data) == 4 + 8 + 64)
        return [(name, int.from_bytes(time)) for name, time in found]  # after the key's id

    def _read(self, path: str) -> bytes:
        return self._blobs.get(path, "file of the log")

    def add_cosignatures(self, given: bytes, cosigners: Sequence[str]) -> Checkpoint:
        """Add the signatures of these cosigners, lines or a whole note, to the published checkpoint.

        Raise Refused if one is missing or false, or signs another checkpoint.
        """
        now = self.recover()
        text, held = note.split_note(self.published_note())
        if b"\n\n" not in given:
            given = text + b"\n" + given
        given_text, signatures = note.split_note(given)
        if given_text != text:
            raise Refused(
                "the cosigner has signed another checkpoint than the published one",
                expected=f"{now.size} entries",
                next_step="ask it to sign the present one",
            )
        note.open_note(given, cosigners)
        keys = {(key.name, key.id) for key in map(note.parse_vkey, cosigners)}
        added = [each for each in signatures if (each[0], each[1][:4]) in keys]
        kept = [each for each in held if (each[0], each[1][:4]) not in keys]
        lines = [signature_line(*each) for each in (*kept, *added)]
        self._blobs.put(CHECKPOINT, b"".join([text, b"\n", *lines]))
        return now


def checkpoint_text(checkpoint: Checkpoint) -> bytes:
    """Return what a log signs."""
    return f"{checkpoint.origin}\n{checkpoint.size}\n{note.b64(checkpoint.root)}\n".encode()


def proof_text(index: int, path: Sequence[bytes], checkpoint: bytes) -> bytes:
    """Return a proof as a `.tlog-proof` file."""
    lines = ["c2sp.org/tlog-proof@v1", f"index {index}", *map(note.b64, path)]
    return "\n".join(lines).encode() + b"\n\n" + checkpoint


def parse_entry(index: int, entry: bytes) -> Entry:
    """Return what an entry names. Raise IntegrityError."""
    try:
        found = parse_canonical(entry, "an entry", ENTRY_FORM)
    except Refused as error:
        raise _damaged(f"entry {index} of the log", f"{error.what}: {error.got}") from error
    return Entry(index, found["predicateType"], found["sha256"])


def statement_in(envelope: bytes) -> dict[str, Any]:
    """Return the statement in an envelope, unverified: of the model's own log, whose bytes are known.

    Raise Refused for another form.
    """
    form = Among({"payload": str})
    sealed = check_form(strict_json(envelope, "the envelope"), "the envelope", form)["payload"]
    payload = strict_json(base64_bytes(sealed, "the payload"), "the payload")
    found: dict[str, Any] = check_form(payload, "the statement", STATEMENT_FORM)
    return found


def _damaged(where: str, what: str) -> IntegrityError:
    return IntegrityError(what, where=where, next_step=RESTORE_LOG)
