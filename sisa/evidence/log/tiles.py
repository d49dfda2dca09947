"""Compute with the tree of a log in tiles, and read and write the files that hold it.

    checkpoint                     the log's size and root, signed by the log's key and by cosigners
    tile/<L>/<N>[.p/<W>]           hashes of the Merkle tree, 256 to a tile; a partial one has W
    tile/entries/<N>[.p/<W>]       entries: each names a statement by its type and its sha256
    statements/<sha256>.json       statements, signed (DSSE)

>>> Tiles({"tile/0/000.p/2": b"a" * 32 + b"b" * 32}.__getitem__, 2).inclusion(0) == [b"b" * 32]
True
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sisa.core.errors import IntegrityError
from sisa.verifier import merkle, note
from sisa.verifier.envelope import Refused
from sisa.verifier.note import WIDTH, Checkpoint, tile_path

CHECKPOINT = "checkpoint"
NO_ENTRIES = Checkpoint("", 0, merkle.EMPTY_ROOT)
MAX_ENTRY_BYTES = 0xFFFF
Read = Callable[[str], bytes]  # a file of a log, by its path


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
        return merkle.root(hashes_in(tile)[first % WIDTH : first % WIDTH + (num >> 8 * level)])

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


def hashes_in(tile: bytes) -> list[bytes]:
    return [tile[at : at + 32] for at in range(0, len(tile), 32)]


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


def encode_bundle(entries: Sequence[bytes]) -> bytes:
    """Return entries as a bundle of them."""
    return b"".join(len(each).to_bytes(2) + each for each in entries)


def signature_line(name: str, signature: bytes) -> bytes:
    """Return the line of a signature that begins with its key's id."""
    return f"— {name} {note.b64(signature)}\n".encode()


def statement_path(sha256: str) -> str:
    return f"statements/{sha256}.json"
