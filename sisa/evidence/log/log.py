"""Keep a model's transparency log in blobs, in the formats of C2SP; check and cosign another's.

    checkpoint                     the log's size and root, signed by the log's key and by witnesses
    tile/<L>/<N>[.p/<W>]           hashes of the Merkle tree, 256 to a tile; a partial one has W
    tile/entries/<N>[.p/<W>]       entries: each names a statement by its type and its sha256
    statements/<sha256>.json       statements, signed (DSSE)

Any server of static files publishes it. An append writes the statement, the entry, its tiles and then
the checkpoint; a crash between them leaves files that no checkpoint covers, and the next append writes
them again. The checkpoint that was signed last is also stored beside the keys, where restoring a backup
of the model does not set it back: a log that is behind it or has diverged from it signs nothing.

>>> Tiles({"tile/0/000.p/2": b"a" * 32 + b"b" * 32}.__getitem__, 2).inclusion(0) == [b"b" * 32]
True
"""

from __future__ import annotations

import http.client
import re
import time
import urllib.error
import urllib.request
from base64 import b64decode
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from sisa.core.digest import sha256_hex
from sisa.core.errors import EnvironmentFault, IntegrityError, InvalidInput
from sisa.core.ports import BlobStore
from sisa.store.blobs import files
from sisa.verifier import merkle, note
from sisa.verifier.certificate import ENTRY_FORM, KEY_HANDOVER, log_entry
from sisa.verifier.envelope import (
    PublicKeys,
    Refused,
    base64_bytes,
    members,
    public_keys,
    strict_json,
    verify_envelope,
)
from sisa.verifier.note import COSIGNATURE, ED25519, WIDTH, Checkpoint, NoteKey, tile_path

CHECKPOINT, STATEMENTS = "checkpoint", "statements"
SIGNED = "signed-checkpoint"  # beside the keys
NO_ENTRIES = Checkpoint("", 0, merkle.EMPTY_ROOT)
MAX_ENTRY_BYTES = 0xFFFF
MAX_FILE_BYTES = WIDTH * (2 + MAX_ENTRY_BYTES)  # a full bundle
TIMEOUT_S = 20
PRIVATE = "PRIVATE+KEY"
Read = Callable[[str], bytes]  # a file of a log, by its path
_PRIVATE = re.compile(r"PRIVATE\+KEY\+([^\s+]+)\+([0-9a-f]{8})\+([A-Za-z0-9+/]{44})")
_REQUEST = re.compile(rb"old (?:0|[1-9][0-9]{0,17})(?:\n[A-Za-z0-9+/=]{44}){0,63}")
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


class Tiles:
    """Compute hashes and proofs of a tree from O(log N) of its tiles, which `read` reads by their path.

    Tiles of others may be false: what is computed from them has to be verified.
    """

    def __init__(self, read: Read, size: int) -> None:
        self._read, self.size = read, size
        self._held: dict[str, bytes] = {}

    def hash(self, start: int, end: int) -> bytes:
        """Return the root over the leaves from `start` to `end`, a subtree of the tree."""
        if start == end:
            return merkle.EMPTY_ROOT
        if (num := end - start) & (num - 1):
            middle = start + _split(num)
            return merkle.node_hash(self.hash(start, middle), self.hash(middle, end))
        level = (num.bit_length() - 1) // 8
        first = start >> 8 * level
        tile = self._tile(level, first // WIDTH)
        return merkle.root(_hashes(tile)[first % WIDTH : first % WIDTH + (num >> 8 * level)])

    def _tile(self, level: int, number: int) -> bytes:
        width = min(WIDTH, (self.size >> 8 * level) - number * WIDTH)
        path = tile_path(level, number, width)
        if path not in self._held:
            self._held[path] = self._read(path)
            if len(self._held[path]) != width * 32:
                raise Refused("a tile of the log has another size", where=path)
        return self._held[path]

    def inclusion(self, index: int) -> list[bytes]:
        """Return the path of a leaf."""
        path: list[bytes] = []
        start, end = 0, self.size
        while end - start > 1:
            middle = start + _split(end - start)
            path.insert(0, self.hash(middle, end) if index < middle else self.hash(start, middle))
            start, end = (start, middle) if index < middle else (middle, end)
        return path

    def consistency(self, size: int) -> list[bytes]:
        """Return the path that shows that this tree continues the tree of the first `size` leaves."""
        path: list[bytes] = []
        start, end = 0, self.size
        while size and size != end:
            middle = start + _split(end - start)
            path.insert(0, self.hash(middle, end) if size <= middle else self.hash(start, middle))
            start, end = (start, middle) if size <= middle else (middle, end)
        return [self.hash(start, end), *path] if start else path

    def check_follows(self, before: Checkpoint, now: Checkpoint) -> None:
        """Raise Refused unless the tree of `before` is the beginning of this one, with root `now`."""
        path = self.consistency(before.size) if before.size <= self.size else []
        merkle.verify_consistency(before.size, now.size, path, before.root, now.root)


def _split(num: int) -> int:
    return 1 << (num - 1).bit_length() - 1


def _hashes(tile: bytes) -> list[bytes]:
    return [tile[at : at + 32] for at in range(0, len(tile), 32)]


class Log:
    """A model's log. Whoever appends or adds cosignatures holds the model's writer lock."""

    def __init__(self, blobs: BlobStore, keys: LogKeys) -> None:
        self._blobs = blobs
        self._private = Ed25519PrivateKey.from_private_bytes(keys.log_seed)
        self.key = NoteKey(origin(keys.model), ED25519, self._private.public_key().public_bytes_raw())
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
        last = self._bundle(before.size - 1, before.size) if before.size else []
        if last and last[-1] == entry:
            return before.size - 1  # logged before a crash, and not noted by the caller
        self._blobs.put(_statement_path(sha256), envelope)
        self._sign(self._write(before, [*last, entry] if before.size % WIDTH else [entry]))
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
            node, index, level = merkle.root(_hashes(tile)), number, level + 1
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
        """Return what asks a witness that has seen `old` entries to cosign: C2SP's add-checkpoint."""
        published, now = self.published_note(), self.checkpoint
        if not 0 <= old <= now.size or not published:
            raise InvalidInput("no witness has seen that", expected=f"0 to {now.size}", got=str(old))
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
        name = _statement_path(sha256)
        return files.verified(self._read(name), sha256, "statement", self._blobs.location(name))

    def check(self, witnesses: Sequence[str] = (), seen: Sequence[bytes] = ()) -> Checkpoint:
        """Check the whole log as an outsider would, who also saw what was signed last. Raise Refused."""
        if signed := self.signed_note():
            seen = [*seen, signed]
        if not seen and not self.published_note():
            return NO_ENTRIES
        return check_log(cutting_full_tiles(self._read), str(self.key), witnesses, seen)[0]

    def cosigners(self) -> list[tuple[str, int]]:
        """Return the names of the witnesses under the published checkpoint, and when they signed."""
        published = self.published_note()
        signatures = note.split_note(published)[1] if published else []
        return [(name, int.from_bytes(data[4:12])) for name, data in signatures if len(data) == 76]

    def _read(self, path: str) -> bytes:
        return self._blobs.get(path, "file of the log")

    def add_cosignatures(self, given: bytes, witnesses: Sequence[str]) -> Checkpoint:
        """Add the signatures of these witnesses, lines or a whole note, to the published checkpoint.

        Raise Refused if one is missing or false, or signs another checkpoint.
        """
        now = self.recover()
        text, held = note.split_note(self.published_note())
        if b"\n\n" not in given:
            given = text + b"\n" + given
        given_text, signatures = note.split_note(given)
        if given_text != text:
            raise Refused(
                "the witness has signed another checkpoint than the published one",
                expected=f"{now.size} entries",
                next_step="ask it to sign the present one",
            )
        note.open_note(given, witnesses)
        keys = {(key.name, key.id) for key in map(note.parse_vkey, witnesses)}
        added = [each for each in signatures if (each[0], each[1][:4]) in keys]
        kept = [each for each in held if (each[0], each[1][:4]) not in keys]
        lines = [signature_line(*each) for each in (*kept, *added)]
        self._blobs.put(CHECKPOINT, b"".join([text, b"\n", *lines]))
        return now


def encode_bundle(entries: Sequence[bytes]) -> bytes:
    """Return entries as a bundle of them."""
    return b"".join(len(each).to_bytes(2) + each for each in entries)


def checkpoint_text(checkpoint: Checkpoint) -> bytes:
    """Return what a log signs."""
    return f"{checkpoint.origin}\n{checkpoint.size}\n{note.b64(checkpoint.root)}\n".encode()


def proof_text(index: int, path: Sequence[bytes], checkpoint: bytes) -> bytes:
    """Return a proof as a `.tlog-proof` file."""
    lines = ["c2sp.org/tlog-proof@v1", f"index {index}", *map(note.b64, path)]
    return "\n".join(lines).encode() + b"\n\n" + checkpoint


def check_tiles(read: Read, entries: Sequence[bytes]) -> None:
    """Raise Refused unless every tile of a published log has the hashes of these entries."""
    nodes, level = [merkle.leaf_hash(each) for each in entries], 0
    while nodes:
        tiles = [nodes[at : at + WIDTH] for at in range(0, len(nodes), WIDTH)]
        for number, tile in enumerate(tiles):
            path = tile_path(level, number, len(tile))
            if read(path) != b"".join(tile):
                raise Refused("a tile of the log is not that of its entries", where=path)
        nodes, level = [merkle.root(tile) for tile in tiles if len(tile) == WIDTH], level + 1


def check_log(
    read: Read, vkey: str, witnesses: Sequence[str] = (), seen: Sequence[bytes] = ()
) -> tuple[Checkpoint, list[Checkpoint], list[bytes]]:
    """Check a whole published log; return its checkpoint, the seen ones and the entries. Raise Refused.

    It continues every checkpoint that was `seen`: none of their entries was rewritten, dropped or moved.
    All of these witnesses have signed the present one.
    """
    now = note.open_checkpoint(read(CHECKPOINT), vkey, witnesses=witnesses)
    entries = note.read_log(read, now)
    check_tiles(read, entries)
    hashes = [merkle.leaf_hash(each) for each in entries]
    before = [note.open_checkpoint(each, vkey) for each in seen]
    for each in before:
        if each.size > now.size or merkle.root(hashes[: each.size]) != each.root:
            raise Refused(
                "the log does not continue a checkpoint that was seen: entries were changed or dropped",
                expected=f"{each.size} entries with the root {each.root.hex()}, and more",
                got=f"{now.size} entries with the root {now.root.hex()}",
                next_step="keep both checkpoints: they contradict each other, and the log signed both",
            )
    return now, before, entries


def parse_entry(index: int, entry: bytes) -> Entry:
    """Return what an entry names. Raise IntegrityError."""
    try:
        found = members(strict_json(entry, "an entry"), "an entry", ENTRY_FORM)
    except Refused as error:
        raise _damaged(f"entry {index} of the log", f"{error.what}: {error.got}") from error
    return Entry(index, found["predicateType"], found["sha256"])


def statement_in(envelope: bytes) -> dict[str, Any]:
    """Return the statement in an envelope, unverified: of the model's own log, whose bytes are known.

    Raise ValueError, TypeError or KeyError for another form.
    """
    sealed = strict_json(envelope, "the envelope")["payload"]
    found: dict[str, Any] = strict_json(base64_bytes(sealed, "the payload"), "the payload")
    return found


def _statement_path(sha256: str) -> str:
    return f"{STATEMENTS}/{sha256}.json"


def follow(known: PublicKeys, entries: Sequence[bytes], read: Read) -> PublicKeys:
    """Return the present keys, after all hand-overs in a checked log from the known keys. Raise Refused.

    `read` returns a file beside the log's by its path. The old key signs a regular hand-over, and it
    counts at its own place in the log alone: whoever steals a key that signs statements, but not the
    log's, can't hand over to a key of theirs. The hand-over of a lost or leaked key is signed by the new
    one; to whoever trusts the old one it shows nothing.

    >>> known = PublicKeys("0f" * 16, (), "", b"")
    >>> follow(known, [], str.encode) == known
    True
    """
    for index, entry in enumerate(entries):
        named = members(strict_json(entry, "an entry"), "an entry", ENTRY_FORM)
        if named["predicateType"] == KEY_HANDOVER and index >= known.certificates[-1].since:
            envelope = read(_statement_path(named["sha256"]))
            if sha256_hex(envelope) != named["sha256"]:
                raise Refused("a hand-over is not the logged one", f"entry {index}")
            known = _successor(known, envelope, index)
    return known


def _successor(known: PublicKeys, handover: bytes, index: int) -> PublicKeys:
    try:
        statement = verify_envelope(handover, known, index)
    except Refused as error:
        raise Refused(
            "the known key did not sign the hand-over: it was lost or leaked, or this is a forgery",
            where=f"entry {index}",
            got=error.what,
            next_step="ask the owner for the present keyid through another channel",
        ) from None
    named = members(statement["predicate"], "the hand-over", {"reason": str, "keys": dict})
    new = public_keys(named["keys"])
    if new == known:  # that of the known key itself, which followed a lost one
        return known
    *before, last = known.certificates
    ended = (*before, replace(last, until=index + 1), replace(new.certificates[-1], since=index + 1))
    if new != replace(known, certificates=ended):
        raise Refused("the hand-over continues from other keys, or from another entry", f"entry {index}")
    return new


def signature_line(name: str, signature: bytes) -> bytes:
    """Return the line of a signature that begins with its key's id."""
    return f"— {name} {note.b64(signature)}\n".encode()


def _damaged(where: str, what: str) -> IntegrityError:
    return IntegrityError(what, where=where, next_step=RESTORE_LOG)


def log_reader(where: str) -> Read:
    """Return a function that reads a file of the log in a directory or at an http(s) URL.

    A file with a checkpoint alone can be read, too. Raise IntegrityError for a file that is missing or
    too large, EnvironmentFault for a disk or a network that fails.
    """
    if where.startswith(("http://", "https://")):
        return cutting_full_tiles(partial(_fetch, where.rstrip("/")))
    if "://" in where:
        raise InvalidInput("a log can't be read from there", expected="a directory, http:// or https://")
    return cutting_full_tiles(partial(_load, Path(where)))


def cutting_full_tiles(read: Read) -> Read:
    """Return a reader that replaces a partial tile that is gone by the beginning of the full one."""

    def read_or_cut(path: str) -> bytes:
        try:
            return read(path)
        except IntegrityError:
            full, _, width = path.partition(".p/")
            if not width:
                raise
            data = read(full)
        if path.startswith("tile/entries/"):
            return encode_bundle(note.split_bundle(data, WIDTH)[: int(width)])
        return data[: int(width) * 32]

    return read_or_cut


def _load(directory: Path, path: str) -> bytes:
    if directory.is_file():
        if path != CHECKPOINT:
            raise InvalidInput(
                "a checkpoint alone does not show that the log continues another",
                where=str(directory),
                next_step="name the log's directory or URL, or what `sisa log request` prints",
            )
        directory, path = directory.parent, directory.name
    with files.disk_errors(directory / path):
        try:
            with (directory / path).open("rb") as file:
                return _bounded(file.read(MAX_FILE_BYTES + 1), str(directory / path))
        except (FileNotFoundError, NotADirectoryError):
            raise _withheld(str(directory / path), "is missing") from None


def _fetch(url: str, path: str) -> bytes:
    where = f"{url}/{path}"
    try:
        with urllib.request.urlopen(where, timeout=TIMEOUT_S) as answer:  # noqa: S310 (http alone)
            data = _bounded(answer.read(MAX_FILE_BYTES + 1), where)
            if answer.length:  # `read` with a bound does not say that bytes are missing
                raise http.client.IncompleteRead(data, answer.length)
            return data
    except urllib.error.HTTPError as error:
        if error.code in (404, 410):
            raise _withheld(where, "is missing") from None
        got = f"HTTP {error.code}"
    except (OSError, ValueError, http.client.HTTPException) as error:
        got = type(error).__name__
    raise EnvironmentFault(
        "the log can't be reached", where=where, got=got, next_step="try again later, or use a copy"
    )


def _bounded(data: bytes, where: str) -> bytes:
    if len(data) > MAX_FILE_BYTES:
        raise _withheld(where, "is too large")
    return data


def _withheld(where: str, how: str) -> IntegrityError:
    step = "keep what you have read: whoever publishes the log withholds a part of it"
    return IntegrityError(f"a file of the log {how}", where=where, next_step=step)


def new_witness(name: str) -> tuple[str, str]:
    """Return a new key of a witness, as Go's `note.GenerateKey` writes it, and its vkey."""
    private = Ed25519PrivateKey.generate()
    public = private.public_key().public_bytes_raw()
    id_ = NoteKey(name, ED25519, public).id.hex()
    data = note.b64(bytes([ED25519]) + private.private_bytes_raw())
    vkey = str(NoteKey(name, COSIGNATURE, public))
    note.parse_vkey(vkey)  # refuses a name that a note can't hold
    return f"{PRIVATE}+{name}+{id_}+{data}", vkey


def parse_witness(text: str) -> tuple[NoteKey, Ed25519PrivateKey]:
    """Return the public and the private key of a witness. Raise InvalidInput."""
    found = _PRIVATE.fullmatch(text)
    data = b64decode(found[3]) if found else b"\x00"
    if found and data[0] == ED25519:
        private = Ed25519PrivateKey.from_private_bytes(data[1:])
        public = private.public_key().public_bytes_raw()
        if NoteKey(found[1], ED25519, public).id.hex() == found[2]:
            return NoteKey(found[1], COSIGNATURE, public), private
    raise InvalidInput(
        "the witness's key can't be read",
        expected=f"{PRIVATE}+NAME+ID+KEY, of Ed25519",
        next_step="make one with `sisa log witness-key`",
    )


def _parse_request(data: bytes) -> tuple[bytes, list[bytes] | None]:
    """Return the checkpoint of a request and its proof of consistency, or a checkpoint without one."""
    head, _, checkpoint = data.partition(b"\n\n")
    if not _REQUEST.fullmatch(head):
        return data, None
    return checkpoint, [base64_bytes(each, "a hash") for each in head.decode().split("\n")[1:]]


def cosign(
    read: Read, log_vkey: str, private: str, state: Path, now: float | None = None
) -> tuple[Checkpoint, Checkpoint, bytes]:
    """Cosign a log's checkpoint; return the one seen before, this one, and the line of the signature.

    In place of the checkpoint, `read` may return a request. `state` is the witness's own file, the
    checkpoint that it signed last; it is replaced before the line is returned. Raise Refused or
    IntegrityError if the log does not continue that one.
    """
    key, signer = parse_witness(private.strip())
    signed, proof = _parse_request(read(CHECKPOINT))
    checkpoint = note.open_checkpoint(signed, log_vkey)
    files.make_directory(state.absolute().parent)
    with files.opened_directory(state.absolute().parent) as handle:
        files.take_lock(handle, state, "cosigns with a state in this directory")
        seen = NO_ENTRIES
        if state.exists():
            seen = note.open_checkpoint(files.read_whole(state, "checkpoint"), log_vkey)
        try:
            if proof is None:
                Tiles(read, checkpoint.size).check_follows(seen, checkpoint)
            else:
                merkle.verify_consistency(seen.size, checkpoint.size, proof, seen.root, checkpoint.root)
        except Refused as error:
            raise Refused(
                "the log does not continue the checkpoint that this witness signed last",
                where=str(state),
                expected=f"{seen.size} entries with the root {seen.root.hex()}, and more",
                got=f"{checkpoint.size} entries with the root {checkpoint.root.hex()}: {error.what}",
                next_step="if it is no older copy of the log, keep both checkpoints: they are evidence",
            ) from error
        files.write_atomic(state, signed)
    at = int(time.time() if now is None else now)
    made = key.id + at.to_bytes(8) + signer.sign(note.cosigned(note.split_note(signed)[0], at))
    return seen, checkpoint, signature_line(key.name, made)
