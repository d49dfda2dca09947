"""A transparency log as it is published, in the formats of C2SP: notes, checkpoints, proofs and tiles.

    signed-note         a text and its signatures              tlog-cosignature    a cosigner's signature
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

ED25519_TYPE, COSIGNATURE_TYPE = 1, 4  # types of signature
MAX_NOTE_BYTES = 1 << 18
WIDTH = 256  # hashes in a full tile, entries in a full bundle
_VKEY = re.compile(r"([^\s+]+)\+[0-9a-f]{8}\+([A-Za-z0-9+/]{44})")
_SIGNATURE = re.compile(r"— ([^\s+]+) (\S+)")
_CHECKPOINT = re.compile(r"(.+)\n(0|[1-9][0-9]{0,17})\n(.+)\n(?:.+\n)*")
_PROOF = re.compile(
    r"c2sp\.org/tlog-proof@v1\n(?:extra [A-Za-z0-9+/=]+\n)?"  # nobody vouches for extra data
    r"index (0|[1-9][0-9]{0,17})\n((?:[A-Za-z0-9+/=]{44}\n){0,63})\n([\s\S]*)"
)


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


@dataclass(frozen=True)
class Checkpoint:
    """The size and the root of the log that is named by its origin."""

    origin: str
    size: int
    root: bytes


def parse_vkey(vkey: str) -> NoteKey:
    """Return the key that a vkey describes. Raise Refused."""
    found = _VKEY.fullmatch(vkey)
    name, data = (found[1], b64decode(found[2])) if found else ("", b"\x00")
    key = NoteKey(name, data[0], data[1:])
    if key.type not in (ED25519_TYPE, COSIGNATURE_TYPE) or str(key) != vkey:
        raise Refused("a key of signed notes can't be read", "NAME+ID+KEY, of Ed25519")
    return key


def cosigned(text: bytes, timestamp: int) -> bytes:
    """Return what a cosigner signs at a time, in seconds since 1970."""
    return f"cosignature/v1\ntime {timestamp}\n".encode() + text


def split_note(note: bytes) -> tuple[bytes, list[tuple[str, bytes]]]:
    """Return a note's text, and each signature with its key's name. Raise Refused for bad syntax."""
    text, gap, lines = _decoded(note).rpartition("\n\n")
    found = [_SIGNATURE.fullmatch(line) for line in lines.removesuffix("\n").split("\n")]
    if not gap or not lines.endswith("\n") or None in found:
        raise Refused("a note is malformed", "a text, an empty line, and lines of signatures")
    signatures = [(each[1], base64_bytes(each[2], "a signature")) for each in found if each]
    return f"{text}\n".encode(), signatures


def open_note(note: bytes, vkeys: Sequence[str]) -> bytes:
    """Return the text of a note. Raise Refused unless each of the keys signed it, once."""
    text, signatures = split_note(note)
    for key in map(parse_vkey, vkeys):
        made = [data[4:] for name, data in signatures if (name, data[:4]) == (key.name, key.id)]
        if len(made) != 1:
            raise Refused("a note is not signed as expected", f"one signature of {key}", f"{len(made)}")
        signature, message = made[0], text
        if key.type == COSIGNATURE_TYPE:
            signature, message = made[0][8:], cosigned(text, int.from_bytes(made[0][:8]))
        try:
            Ed25519PublicKey.from_public_bytes(key.public).verify(signature, message)
        except (InvalidSignature, ValueError):
            raise Refused(f"the signature of {key.name} does not fit the note") from None
    return text


def open_checkpoint(note: bytes, vkey: str, *, cosigners: Sequence[str] = ()) -> Checkpoint:
    """Return a log's checkpoint. Raise Refused unless the log and each of these cosigners signed it."""
    if any(parse_vkey(each).type != COSIGNATURE_TYPE for each in cosigners):
        raise Refused("a cosigner's key is of another type", "the vkey of a cosigner, of type 4")
    if not (lines := _CHECKPOINT.fullmatch(open_note(note, [vkey, *cosigners]).decode())):
        raise Refused("a checkpoint is malformed", "lines with the origin, the size and the root")
    found = Checkpoint(lines[1], int(lines[2]), base64_bytes(lines[3], "a root"))
    if len(found.root) != 32 or (not found.size and found.root != merkle.EMPTY_ROOT):
        raise Refused("a checkpoint's root can't be one", "32 bytes; of no entries, the empty root")
    if found.origin != (name := parse_vkey(vkey).name):
        raise Refused("a checkpoint is of another log", name, found.origin)
    return found


def parse_proof(text: bytes) -> tuple[int, list[bytes], bytes]:
    """Return a `.tlog-proof`'s index, path and checkpoint, unverified. Raise Refused."""
    if not (found := _PROOF.fullmatch(_decoded(text))):
        raise Refused("a proof of the log is malformed", "c2sp.org/tlog-proof@v1")
    path = [base64_bytes(each, "a hash") for each in found[2].split()]
    return int(found[1]), path, found[3].encode()


def verify_proof(text: bytes, entry: bytes, vkey: str) -> tuple[int, Checkpoint]:
    """Return the index of an entry, and the checkpoint that covers it. Raise Refused."""
    index, path, checkpoint = parse_proof(text)
    found = open_checkpoint(checkpoint, vkey)
    merkle.verify_inclusion(merkle.leaf_hash(entry), index, found.size, path, found.root)
    return index, found


def tile_path(level: int | str, index: int, width: int = WIDTH) -> str:
    """Return the path of a tile, or of a bundle of entries (level `entries`)."""
    path = f"{index % 1000:03}" + ("" if width == WIDTH else f".p/{width}")
    while index := index // 1000:
        path = f"x{index % 1000:03}/{path}"
    return f"tile/{level}/{path}"


def split_bundle(bundle: bytes, num: int) -> list[bytes]:
    """Return the entries of a bundle. Raise Refused if there are not `num`."""
    entries, at = [], 0
    while at < len(bundle):
        start, at = at + 2, at + 2 + int.from_bytes(bundle[at : at + 2])
        entries.append(bundle[start:at])
    if len(entries) != num or at != len(bundle):
        raise Refused("a bundle of entries is damaged", f"{num} entries", f"{len(entries)}")
    return entries


def read_log(read: Callable[[str], bytes], checkpoint: Checkpoint) -> list[bytes]:
    """Return all entries of a published log; `read` returns a file by its path.

    Raise Refused unless they are those of the checkpoint. What an older checkpoint covers is the
    beginning of them if `merkle.root` over the hashes of as many is the older root.
    """
    entries: list[bytes] = []
    for at in range(0, checkpoint.size, WIDTH):
        num = min(WIDTH, checkpoint.size - at)
        entries += split_bundle(read(tile_path("entries", at // WIDTH, num)), num)
    if (found := merkle.root([*map(merkle.leaf_hash, entries)])) != checkpoint.root:
        raise Refused("the entries are not those of the checkpoint", checkpoint.root.hex(), found.hex())
    return entries


def b64(data: bytes) -> str:
    """Return bytes in base64."""
    return b64encode(data).decode()


def _decoded(data: bytes) -> str:
    text = data.decode(errors="replace")
    if len(data) > MAX_NOTE_BYTES or text.encode() != data or re.search("[\x00-\x09\x0b-\x1f]", text):
        raise Refused("a note is malformed", f"printable UTF-8 of at most {MAX_NOTE_BYTES} bytes")
    return text
