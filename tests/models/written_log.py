"""A transparency log in a directory, with keys beside it, for tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from sisa.core.digest import sha256_hex
from sisa.evidence.log.log import Log
from sisa.evidence.log.published import check_log, log_reader
from sisa.evidence.log.tiles import Tiles, encode_bundle
from sisa.store.blobs.local_blobs import LocalBlobs
from sisa.verifier import merkle, note
from sisa.verifier.certificate import log_entry
from sisa.verifier.note import WIDTH, Checkpoint, NoteKey, tile_path

TYPE = "urn:deletion-ready-model:state:v1"


@dataclass(frozen=True)
class Keys:
    """The keys of a model, as `sisa.evidence.keys.keys` has them."""

    directory: Path
    model: str = "0f" * 16
    log_seed: bytes = b"l" * 32


@dataclass
class Place:
    """A log in a directory, and the keys beside it."""

    root: Path
    keys: Keys = field(init=False)

    def __post_init__(self) -> None:
        self.keys = Keys(self.root / "keys")

    @property
    def at(self) -> Path:
        return self.root / "log"

    @property
    def log(self) -> Log:
        """Return the log, opened anew."""
        return Log(LocalBlobs(self.at), self.keys)

    @property
    def vkey(self) -> str:
        return str(self.log.key)

    def read(self, path: str) -> bytes:
        return log_reader(str(self.at))(path)

    def outsider(self) -> tuple[Checkpoint, list[bytes]]:
        """Return what an outsider finds. Raise Refused or IntegrityError if it does not fit."""
        return check_log(self.read, self.vkey)

    def append(self, *numbers: int) -> None:
        """Log the statements with these numbers."""
        for number in numbers:
            self.log.append(statement(number), TYPE)


def statement(number: int) -> bytes:
    return b'{"statement":%d}' % number


def entry(number: int) -> bytes:
    return log_entry(sha256_hex(statement(number)), TYPE)


def fill(place: Place, size: int) -> None:
    """Write a log of many entries at once, and sign it."""
    entries = [entry(number) for number in range(size)]
    blobs = LocalBlobs(place.at)
    nodes, level = [merkle.leaf_hash(each) for each in entries], 0
    for at in range(0, size, WIDTH):
        bundle = entries[at : at + WIDTH]
        blobs.put(tile_path("entries", at // WIDTH, len(bundle)), encode_bundle(bundle))
    while nodes:
        tiles = [nodes[at : at + WIDTH] for at in range(0, len(nodes), WIDTH)]
        for at, tile in enumerate(tiles):
            blobs.put(tile_path(level, at, len(tile)), b"".join(tile))
        nodes, level = [merkle.root(tile) for tile in tiles if len(tile) == WIDTH], level + 1
    place.log._sign(Checkpoint(place.log.key.name, size, Tiles(place.read, size).hash(0, size)))


def some_cosigner_key(name: str) -> tuple[str, str]:
    """Return the private key and the vkey of a cosigner, always the same."""
    seed = sha256_hex(name.encode())[:32].encode()
    public = Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()
    id_ = NoteKey(name, note.ED25519_TYPE, public).id.hex()
    private = f"PRIVATE+KEY+{name}+{id_}+{note.b64(bytes([note.ED25519_TYPE]) + seed)}"
    return private, str(NoteKey(name, note.COSIGNATURE_TYPE, public))
