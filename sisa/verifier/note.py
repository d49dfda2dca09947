"""A transparency log as it is published, in the formats of C2SP: notes, checkpoints, proofs and tiles.

    signed-note         a text and its signatures              tlog-cosignature    a witness's signature
    tlog-checkpoint     a note: origin, size and root          tlog-proof          an entry is in the log
    tlog-tiles          PREFIX/checkpoint, PREFIX/tile/<L>/<N>[.p/<W>], PREFIX/tile/entries/<N>[.p/<W>]

>>> tile_path(0, 1234067), tile_path("entries", 1, 44)
('tile/0/x001/x234/067', 'tile/entries/001.p/44')
"""

from __future__ import annotations

import re
from base64 import b64decode, b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from sisa.verifier import merkle
from sisa.verifier.envelope import Refused, base64_bytes

ED25519, COSIGNATURE = 1, 4  # types of signature
MAX_NOTE_BYTES, MAX_PATH, MAX_SIZE = 1 << 18, 63, (1 << 63) - 1
PROOF = "c2sp.org/tlog-proof@v1"
WIDTH = 256  # hashes in a full tile, entries in a full bundle
_VKEY = re.compile(r"([^\s+]+)\+([0-9a-f]{8})\+([A-Za-z0-9+/]{44})")
_SIGNATURE = re.compile(r"— ([^\s+]+) (\S+)")


@dataclass(frozen=True)
class NoteKey:
    """A public key of signed notes; `str` gives its vkey, NAME+ID+KEY."""

    name: str
    type: int
    public: bytes

    @property
    def id(self) -> bytes:
        return sha256(f"{self.name}\n".encode() + bytes([self.type]) + self.public).digest()[:4]

    def __str__(self) -> str:
        return f"{self.name}+{self.id.hex()}+{b64(bytes([self.type]) + self.public)}"

    def verify(self, text: bytes, signature: bytes) -> None:
        """Raise Refused unless the key made this signature, which begins with the key's id."""
        made = signature[4:]
        if self.type == COSIGNATURE:
            text, made = cosigned(text, int.from_bytes(made[:8])), made[8:]
        try:
            Ed25519PublicKey.from_public_bytes(self.public).verify(made, text)
        except (InvalidSignature, ValueError):
            raise _refused(f"the signature of {self.name} does not fit the note") from None


@dataclass(frozen=True)
class Checkpoint:
    """The size and the root of the log that is named by its origin."""

    origin: str
    size: int
    root: bytes

    def text(self) -> bytes:
        """Return the text that the log signs."""
        return f"{self.origin}\n{self.size}\n{b64(self.root)}\n".encode()


@dataclass(frozen=True)
class TlogProof:
    """A proof that verifies offline: the entry's index, its path, and the checkpoint as published."""

    index: int
    path: tuple[bytes, ...]
    checkpoint: bytes

    def text(self) -> bytes:
        """Return the proof as a `.tlog-proof` file."""
        lines = [PROOF, f"index {self.index}", *map(b64, self.path)]
        return "\n".join(lines).encode() + b"\n\n" + self.checkpoint


def parse_vkey(vkey: str) -> NoteKey:
    """Return the key that a vkey describes. Raise Refused."""
    found = _VKEY.fullmatch(vkey)
    data = b64decode(found[3]) if found else b"\x00"
    if not found or data[0] not in (ED25519, COSIGNATURE):
        raise _refused("a key of signed notes can't be read", "NAME+ID+KEY, of Ed25519")
    key = NoteKey(found[1], data[0], data[1:])
    if str(key) != vkey:
        raise _refused("the id of a key of signed notes is not its own", key.id.hex(), found[2])
    return key


def cosigned(text: bytes, timestamp: int) -> bytes:
    """Return what a witness signs at a time, in seconds since 1970."""
    return f"cosignature/v1\ntime {timestamp}\n".encode() + text


def split_note(note: bytes) -> tuple[bytes, list[tuple[str, bytes]]]:
    """Return a note's text, and each signature with its key's name. Raise Refused for bad syntax."""
    text, gap, lines = _decoded(note).rpartition("\n\n")
    found = [_SIGNATURE.fullmatch(line) for line in lines.removesuffix("\n").split("\n")]
    if not gap or not lines.endswith("\n") or None in found:
        raise _refused("a note is malformed", "a text, an empty line, and lines of signatures")
    signatures = [(each[1], base64_bytes(each[2], "a signature")) for each in found if each]
    if any(len(data) < 5 for _, data in signatures):
        raise _refused("a note is malformed", "signatures that begin with the id of their key")
    return f"{text}\n".encode(), signatures


def open_note(note: bytes, vkeys: Sequence[str]) -> bytes:
    """Return the text of a note. Raise Refused unless each of the keys signed it, once."""
    text, signatures = split_note(note)
    for key in map(parse_vkey, vkeys):
        made = [data for name, data in signatures if (name, data[:4]) == (key.name, key.id)]
        if len(made) != 1:
            raise _refused("a note is not signed as expected", f"one signature of {key}", str(len(made)))
        key.verify(text, made[0])
    return text


def parse_checkpoint(text: bytes) -> Checkpoint:
    """Return the checkpoint that a note's text describes. Raise Refused."""
    lines = _decoded(text).split("\n")
    if len(lines) < 4 or lines.pop() or not all(lines):
        raise _refused("a checkpoint is malformed", "lines with the origin, the size and the root")
    found = Checkpoint(lines[0], _number(lines[1]), base64_bytes(lines[2], "a root"))
    if len(found.root) != 32 or (found.size == 0 and found.root != merkle.EMPTY_ROOT):
        raise _refused("a checkpoint's root can't be one", "32 bytes; of no entries, the empty root")
    return found


def open_checkpoint(note: bytes, vkey: str, *, witnesses: Sequence[str] = ()) -> Checkpoint:
    """Return a log's checkpoint. Raise Refused unless the log and each of these witnesses signed it."""
    if any(parse_vkey(each).type != COSIGNATURE for each in witnesses):
        raise _refused("a witness's key is of another type", "the vkey of a cosigner, of type 4")
    found = parse_checkpoint(open_note(note, [vkey, *witnesses]))
    if found.origin != parse_vkey(vkey).name:
        raise _refused("a checkpoint is of another log", parse_vkey(vkey).name, found.origin)
    return found


def parse_proof(text: bytes) -> TlogProof:
    """Return the proof that a `.tlog-proof` file contains, unverified. Raise Refused."""
    head, _, checkpoint = text.partition(b"\n\n")
    first, *lines = _decoded(head).split("\n")
    if lines and lines[0].startswith("extra "):
        base64_bytes(lines.pop(0).removeprefix("extra "), "extra data")  # nobody vouches for it
    if first != PROOF or not lines or not lines[0].startswith("index ") or len(lines) > MAX_PATH + 1:
        raise _refused(
            "a proof of the log is malformed", f"{PROOF}, the index, at most {MAX_PATH} hashes"
        )
    path = tuple(base64_bytes(each, "a hash") for each in lines[1:])
    return TlogProof(_number(lines[0].removeprefix("index ")), path, checkpoint)


def verify_proof(
    text: bytes, entry: bytes, vkey: str, *, witnesses: Sequence[str] = ()
) -> tuple[int, Checkpoint]:
    """Return the index of an entry, and the checkpoint that covers it. Raise Refused."""
    proof = parse_proof(text)
    found = open_checkpoint(proof.checkpoint, vkey, witnesses=witnesses)
    merkle.verify_inclusion(merkle.leaf_hash(entry), proof.index, found.size, proof.path, found.root)
    return proof.index, found


def tile_path(level: int | str, index: int, width: int = WIDTH) -> str:
    """Return the path of a tile, or of a bundle of entries (level `entries`)."""
    parts = [f"{index % 1000:03}"]
    while index := index // 1000:
        parts.insert(0, f"x{index % 1000:03}")
    return "/".join(["tile", str(level), *parts]) + ("" if width == WIDTH else f".p/{width}")


def split_bundle(bundle: bytes, num: int) -> list[bytes]:
    """Return the entries of a bundle. Raise Refused if there are not `num`."""
    entries, at = [], 0
    while at < len(bundle):
        end = at + 2 + int.from_bytes(bundle[at : at + 2])
        entries.append(bundle[at + 2 : end])
        at = end
    if len(entries) != num or at != len(bundle):
        raise _refused("a bundle of entries is damaged", f"{num} entries", str(len(entries)))
    return entries


def read_log(read: Callable[[str], bytes], checkpoint: Checkpoint) -> list[bytes]:
    """Return all entries of a published log, of which `read` reads a file by its path.

    Raise Refused unless entries, tiles and checkpoint agree. What an older checkpoint covers is the
    beginning of it if `merkle.root` over the hashes of its entries is the older root.
    """
    entries: list[bytes] = []
    for at in range(0, checkpoint.size, WIDTH):
        num = min(WIDTH, checkpoint.size - at)
        entries += split_bundle(read(tile_path("entries", at // WIDTH, num)), num)
    nodes, level = [merkle.leaf_hash(each) for each in entries], 0
    if (found := merkle.root(nodes)) != checkpoint.root:
        raise _refused(
            "the log's entries are not those of its checkpoint", b64(checkpoint.root), b64(found)
        )
    while nodes:
        tiles = [nodes[at : at + WIDTH] for at in range(0, len(nodes), WIDTH)]
        for at, tile in enumerate(tiles):
            path = tile_path(level, at, len(tile))
            if read(path) != b"".join(tile):
                raise _refused("a tile of the log is not that of its entries", where=path)
        nodes, level = [merkle.root(tile) for tile in tiles if len(tile) == WIDTH], level + 1
    return entries


def b64(data: bytes) -> str:
    """Return bytes in base64."""
    return b64encode(data).decode()


def _number(text: str) -> int:
    if not re.fullmatch("0|[1-9][0-9]{0,18}", text) or int(text) > MAX_SIZE:
        raise _refused("a number can't be read", f"a decimal from 0 to {MAX_SIZE}")
    return int(text)


def _decoded(data: bytes) -> str:
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text = "\x00"
    if len(data) > MAX_NOTE_BYTES or any(each < " " and each != "\n" for each in text):
        raise _refused("a note is malformed", f"printable UTF-8 of at most {MAX_NOTE_BYTES} bytes")
    return text


def _refused(what: str, expected: str = "", got: str = "", where: str = "") -> Refused:
    return Refused(what, where, expected, got, "keep the files: they may be evidence against the log")
