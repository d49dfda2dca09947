"""Keep the sorted Merkle tree of a model's records, and prove that an id is in it, or is not.

`sisa/verifier/membership.py` defines the tree, a function of the set of records alone. At rest it is
four tables of MODEL/evidence.sqlite:

    leaves    label and keyed id of each record, its place, and since when it is in its shard
    nodes     hashes of the subtrees of more than BUCKET leaves; those of smaller ones are computed
    taken     roots and sizes of the ledger's slices, as the tree has them
    tree      the root, and the public key of the labels

`sync` looks at what is there: it compares the slices whose root has changed, and reads a slice file only
for ids that are new, so that a deletion reads none. Each changed record rewrites the nodes above one
subtree of at most BUCKET leaves: O(log N). Before that, the stored nodes beside these must give the
stored root, so that no root is computed from damaged nodes.

A date is that of the first `sync` that found the record in its shard. No other file has it: a rebuilt
tree gives all of its records new dates.
"""

from __future__ import annotations

import os
import re
import sqlite3
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

from sisa.core.digest import canonical_json
from sisa.core.domain import SliceFile
from sisa.core.errors import IntegrityError
from sisa.core.events import Notice
from sisa.evidence.database import damaged_database, transaction
from sisa.evidence.keys.vrf_key import VrfKey
from sisa.flows.context.context import Context
from sisa.flows.context.slices import SlicePosition
from sisa.verifier.membership import EMPTY_TREE, LABEL_BITS, LABEL_BYTES, bits, fold, leaf
from sisa.verifier.merkle import node_hash

BUCKET = 16  # most leaves of a subtree whose hash is not stored
MANY = 10_000  # labels, of which a core computes some 6,000 in a second
TABLES = ("leaves", "nodes", "taken", "tree")
SCHEMA = """
CREATE TABLE IF NOT EXISTS leaves (
    label BLOB PRIMARY KEY, id_digest BLOB, shard INTEGER, slice INTEGER, since TEXT
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS leaves_of_slice ON leaves (shard, slice, id_digest, since);
CREATE TABLE IF NOT EXISTS nodes (prefix TEXT PRIMARY KEY, hash BLOB) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS taken (
    shard INTEGER, slice INTEGER, root TEXT, num_records INTEGER, PRIMARY KEY (shard, slice)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS tree (name TEXT PRIMARY KEY, value BLOB) STRICT, WITHOUT ROWID;
"""
_KEY, _ROOT = "key", "root"  # rows of `tree`
_NODE = re.compile(f"[01]{{0,{LABEL_BITS - 1}}}")  # prefix of an inner node
_TYPES: dict[str, type] = {
    **dict.fromkeys(("label", "id_digest", "hash", "value"), bytes),
    **dict.fromkeys(("since", "prefix", "root"), str),
    **dict.fromkeys(("shard", "slice", "num_records"), int),
}

Row = tuple[bytes, bytes, int, int, str]  # of `leaves`


class DamagedTree(ValueError):
    """Raised for rows of the tree that are damaged; its words quote no row, which may hold anything."""


@dataclass(frozen=True)
class Tree:
    """The tables of the tree, within a transaction."""

    db: sqlite3.Connection

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """Return the rows of a query. Raise DamagedTree for a cell whose type is not its column's.

        SQLite compares a strict table's types when it writes a cell, and not when it reads one.
        """
        found = self.db.execute(query, values)
        types = [_TYPES[column] for column, *_ in found.description]
        rows: list[tuple[Any, ...]] = found.fetchall()
        if any([type(cell) for cell in row] != types for row in rows):
            raise DamagedTree("a cell of another type")
        return rows

    def get(self, name: str, default: bytes) -> bytes:
        found = self.rows("SELECT value FROM tree WHERE name = ?", name)
        return found[0][0] if found else default

    def put(self, name: str, value: bytes) -> None:
        self.db.execute("INSERT OR REPLACE INTO tree VALUES (?, ?)", (name, value))

    @property
    def root(self) -> bytes:
        return self.get(_ROOT, EMPTY_TREE)

    @property
    def num_records(self) -> int:
        return sum(number for (number,) in self.rows("SELECT num_records FROM taken"))

    def changed(self, slices: Mapping[SlicePosition, SliceFile]) -> list[SlicePosition]:
        """Return the places of slices that are not as the tree has them."""
        taken = {
            tuple(place): root for *place, root in self.rows("SELECT shard, slice, root FROM taken")
        }
        now = {place: file.root for place, file in slices.items()}
        return sorted(place for place in taken.keys() | now.keys() if taken.get(place) != now.get(place))

    def take(self, place: SlicePosition, file: SliceFile | None) -> None:
        """Note a slice as the tree has it now."""
        self.db.execute("DELETE FROM taken WHERE shard = ? AND slice = ?", place)
        if file is not None:
            self.db.execute(
                "INSERT INTO taken VALUES (?, ?, ?, ?)", (*place, file.root, file.num_records)
            )

    def of_slice(self, place: SlicePosition) -> dict[bytes, Row]:
        """Return the rows of a slice by keyed id."""
        query = "SELECT label, id_digest, shard, slice, since FROM leaves WHERE shard = ? AND slice = ?"
        return {row[1]: row for row in self.rows(query, *place)}

    def value(self, label: bytes) -> dict[str, Any] | None:
        """Return the tree's leaf of a label; None if it has none."""
        found = self.rows("SELECT shard, since FROM leaves WHERE label = ?", label)
        return dict(zip(("shard", "since"), found[0], strict=True)) if found else None

    def leaves(self, prefix: str, limit: int) -> list[tuple[bytes, bytes]]:
        """Return label and hash of the value of the first leaves below a prefix."""
        query = (
            "SELECT label, shard, since FROM leaves WHERE label BETWEEN ? AND ? ORDER BY label LIMIT ?"
        )
        first, last = _label(prefix, "0"), _label(prefix, "1")
        rows = self.rows(query, first, last, limit)
        labels = [label for label, _, _ in rows]
        below = all(len(each) == LABEL_BYTES and first <= each <= last for each in labels)
        if not below or labels != sorted(set(labels)):
            raise DamagedTree("labels that are not in order")
        return [(label, _value_hash(shard, since)) for label, shard, since in rows]

    def hash(self, prefix: str = "", changed: Sequence[bytes] = (), *, keep: bool = False) -> bytes:
        """Return the hash of a subtree, computed anew above the `changed` labels, which are sorted.

        With `keep`, the nodes above changed labels are stored, and nodes that no longer exist removed.
        """
        query = "SELECT hash FROM nodes WHERE prefix = ?"
        if not changed and (stored := self.rows(query, prefix)):
            return bytes(stored[0][0])
        few = self.leaves(prefix, BUCKET + 1)
        if len(few) <= BUCKET:
            if keep and changed:
                self.db.execute("DELETE FROM nodes WHERE prefix BETWEEN ? AND ?", (prefix, prefix + "2"))
            return tree_hash(few, len(prefix))
        middle = bisect_left(changed, _label(prefix + "1", "0"))
        left = self.hash(prefix + "0", changed[:middle], keep=keep)
        found = node_hash(left, self.hash(prefix + "1", changed[middle:], keep=keep))
        if keep and changed:
            self.db.execute("INSERT OR REPLACE INTO nodes VALUES (?, ?)", (prefix, found))
        return found

    def replace(self, gone: Collection[bytes], new: Collection[Row]) -> None:
        """Remove labels, add leaves, and bring nodes and root along. Raise DamagedTree."""
        changed = sorted({*gone, *(row[0] for row in new)})
        if self.hash(changed=changed) != self.root:
            raise DamagedTree("subtrees that do not give the root")
        self.db.executemany("DELETE FROM leaves WHERE label = ?", ((label,) for label in gone))
        self.db.executemany("INSERT INTO leaves VALUES (?, ?, ?, ?, ?)", sorted(new))
        self.put(_ROOT, self.hash(changed=changed, keep=True))

    def path(self, label: bytes) -> tuple[list[bytes], tuple[bytes, bytes] | None]:
        """Return the siblings on a label's way from the root down, and the leaf where it ends."""
        siblings: list[bytes] = []
        way = bits(label)
        while len(found := self.leaves(way[: len(siblings)], 2)) > 1:
            beside = "0" if way[len(siblings)] == "1" else "1"
            siblings.append(self.hash(way[: len(siblings)] + beside))
        return siblings, found[0] if found else None

    def check(self) -> None:
        """Raise DamagedTree unless every node is the hash of its children, down to the leaves."""
        for prefix, stored in self.rows("SELECT prefix, hash FROM nodes"):
            if not _NODE.fullmatch(prefix):
                raise DamagedTree("a node of no prefix")
            if node_hash(self.hash(prefix + "0"), self.hash(prefix + "1")) != stored:
                raise DamagedTree("a node that is not the hash of its children")
        if self.hash() != self.root:
            raise DamagedTree("nodes that do not give the root")


def tree_hash(leaves: Sequence[tuple[bytes, bytes]], depth: int = 0) -> bytes:
    """Return the hash of a subtree at a depth, given its leaves in order: label and hash of the value.

    >>> tree_hash([]) == EMPTY_TREE
    True
    """
    if len(leaves) <= 1:
        return leaf(*leaves[0]) if leaves else EMPTY_TREE
    middle = bisect_left(leaves, "1", key=lambda each: bits(each[0])[depth])
    return node_hash(tree_hash(leaves[:middle], depth + 1), tree_hash(leaves[middle:], depth + 1))


@lru_cache(maxsize=1 << 16)
def _value_hash(shard: int, since: str) -> bytes:
    return sha256(canonical_json({"shard": shard, "since": since})).digest()


def _label(prefix: str, digit: str) -> bytes:
    """Return the first label (digit 0) or the last one (1) below a prefix."""
    return int(prefix.ljust(LABEL_BITS, digit), 2).to_bytes(LABEL_BYTES, "big")


def _slices(context: Context) -> dict[SlicePosition, SliceFile]:
    return {(file.shard, file.slice): file for file in context.stores.ledger.slices()}


class Membership:
    """The tree of one model, in a file, with the key of its labels."""

    def __init__(self, path: Path, vrf_secret: bytes) -> None:
        self.path = path
        self._key = VrfKey(vrf_secret)

    @property
    def root(self) -> str:
        """Return the root in hexadecimal. Raise IntegrityError if there is no tree."""
        with self._tree(write=False) as tree:
            return tree.root.hex()

    @property
    def num_records(self) -> int:
        """Return the number of records. Raise IntegrityError if there is no tree."""
        with self._tree(write=False) as tree:
            return tree.num_records

    def is_behind(self, context: Context) -> bool:
        """Return whether the tree lacks changes of the ledger's slices. Raise IntegrityError."""
        with self._tree(write=False) as tree:
            return bool(tree.changed(_slices(context)))

    def sync(self, context: Context) -> tuple[str, str]:
        """Bring the tree to what the ledger holds; return its roots before and after.

        A damaged tree, or one under another key, is built again, from an empty one. Raise IntegrityError
        for a file that is damaged as a whole.
        """
        try:
            return self._synced(context)
        except IntegrityError as error:
            if error.where != str(self.path):
                raise
            context.report(Notice(f"the tree of records is built again: {error.got}"))
        with transaction(self.path, "") as db:  # the other tables of the file stay
            for table in TABLES:
                db.execute(f"DROP TABLE IF EXISTS {table}")
        return self._synced(context)

    def check(self) -> None:
        """Compute every node again. Raise IntegrityError for damage."""
        with self._tree(write=False) as tree:
            tree.check()

    def check_records(self, context: Context, shards: Collection[int]) -> None:
        """Compare the leaves with the ledger's records, and in these shards the labels with their ids.

        Raise IntegrityError unless the tree holds these records, and no others.
        """
        slices = _slices(context)
        with self._tree(write=False) as tree:
            rows = tree.rows("SELECT label, id_digest, shard, slice FROM leaves")
            leaves: dict[SlicePosition, dict[bytes, bytes]] = {place: {} for place in slices}
            for label, id_digest, shard, slice_ in rows:
                leaves.setdefault((shard, slice_), {})[id_digest] = label
            for (shard, slice_), labels in leaves.items():
                file = slices.get((shard, slice_))
                listed = context.stores.ledger.contents(shard, slice_) if file else []
                if labels.keys() != {bytes.fromhex(each) for each, _ in listed}:
                    raise DamagedTree(f"other records than the ledger's, in shard {shard}")
                if file and shard in shards and labels != self._labels(context, file, labels):
                    raise DamagedTree(f"labels that are not those of the ids, in shard {shard}")

    def prove(self, record_id: str) -> dict[str, Any]:
        """Return the proof that an id is in the tree, or that it is not. Raise IntegrityError.

        `vrf` proves the id's label. `leaf` is what stands in its place: what the tree says of the id,
        label and hash of another leaf, or None. `path` has the siblings from the root down.
        """
        alpha = record_id.encode()
        label = self._key.output(alpha)[:LABEL_BYTES]
        with self._tree(write=False) as tree:
            path, end = tree.path(label)
            if fold(label, leaf(*end) if end else EMPTY_TREE, path) != tree.root:
                raise DamagedTree("a path that does not give the root")
            neighbour = end and {"label": end[0].hex(), "value_hash": end[1].hex()}
            return {
                "vrf": self._key.prove(alpha).hex(),
                "leaf": tree.value(label) or neighbour,
                "path": [each.hex() for each in path],
            }

    @contextmanager
    def _tree(self, *, write: bool) -> Iterator[Tree]:
        """Open the tables in a transaction. Raise IntegrityError for damage, and for another key."""
        try:
            with transaction(self.path, SCHEMA, write=write) as db:
                tree = Tree(db)
                if tree.get(_KEY, self._key.public) != self._key.public:
                    raise DamagedTree("labels under another key")
                yield tree
        except DamagedTree as error:
            raise damaged_database(self.path, str(error)) from error

    def _synced(self, context: Context) -> tuple[str, str]:
        slices = _slices(context)
        with self._tree(write=True) as tree:
            before, changed = tree.root, tree.changed(slices)
            if changed:
                gone, new = self._differences(context, tree, changed, slices)
                tree.replace(gone, new)
                tree.put(_KEY, self._key.public)
            for place in changed:
                tree.take(place, slices.get(place))
            return before.hex(), tree.root.hex()

    def _differences(
        self,
        context: Context,
        tree: Tree,
        changed: Sequence[SlicePosition],
        slices: Mapping[SlicePosition, SliceFile],
    ) -> tuple[list[bytes], list[Row]]:
        """Return the labels of rows to remove, and the rows to add; a moved record keeps its label."""
        gone: dict[bytes, Row] = {}
        new: dict[bytes, SlicePosition] = {}
        for place in changed:
            held = tree.of_slice(place)
            now = {bytes.fromhex(each) for each, _ in context.stores.ledger.contents(*place)}
            gone |= {each: held[each] for each in held.keys() - now}
            new |= dict.fromkeys(now - held.keys(), place)
        today, num_new = context.now()[:10], len(new)
        rows: list[Row] = []
        for moved in gone.keys() & new.keys():
            label, _, former_shard, _, since = gone[moved]
            shard, slice_ = new.pop(moved)
            rows.append((label, moved, shard, slice_, since if shard == former_shard else today))
        if len(new) >= MANY:
            context.report(Notice(f"computing the labels of {len(new):,} records for membership proofs"))
        for place in sorted(set(new.values())):
            labels = self._labels(context, slices[place], new.keys())
            rows += [(label, each, *place, today) for each, label in labels.items()]
        if len(rows) < num_new:
            raise IntegrityError("the ledger holds records that its slice files do not")
        return [row[0] for row in gone.values()], rows

    def _labels(
        self, context: Context, file: SliceFile, wanted: Collection[bytes]
    ) -> dict[bytes, bytes]:
        """Return the labels of a slice's wanted records by keyed id, computed in several threads."""
        stored = [(bytes.fromhex(s.id_digest), s.record.id) for s in context.stores.records.read(file)]
        ids = {id_digest: record_id for id_digest, record_id in stored if id_digest in wanted}

        def labels_of(record_ids: Sequence[str]) -> list[bytes]:
            return [self._key.output(each.encode())[:LABEL_BYTES] for each in record_ids]

        record_ids, threads = list(ids.values()), os.cpu_count() or 1
        size = -(-len(record_ids) // threads) or 1
        starts = range(0, len(record_ids), size)
        with ThreadPoolExecutor(threads) as pool:
            parts = pool.map(labels_of, (record_ids[at : at + size] for at in starts))
            return dict(zip(ids, chain.from_iterable(parts), strict=True))
