"""The vault in memory, and a patcher whose patches confess what they were made from.

Rules: as `fakes.py`. The bytes of an adapter name the job, every record of the sets that were read, and
what lies beneath, so that random histories can be checked for texts that should have been gone.

Not covered: sealing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sisa.digest import sha256_hex
from sisa.domain import Record
from sisa.errors import IntegrityError
from sisa.patch import VaultSet
from sisa.store.vault import encode


class FakeVault:
    """A Vault of records that can be looked at."""

    def __init__(self) -> None:
        self.stored: dict[str, tuple[Record, ...]] = {}

    def put(self, name: str, records: Sequence[Record]) -> tuple[str, int]:
        self.stored[name] = tuple(records)
        data = encode(records)
        return sha256_hex(data), len(data)

    def read(self, found: VaultSet) -> tuple[Record, ...]:
        if found.name not in self.stored:
            raise IntegrityError("a set of the vault is missing")
        records = self.stored[found.name]
        if sha256_hex(encode(records)) != found.sha256:
            raise IntegrityError("a set of the vault is not the one that was recorded")
        return records

    def check(self, found: VaultSet) -> None:
        self.read(found)

    def held(self) -> frozenset[str]:
        return frozenset(self.stored)

    def erase(self, names: Collection[str]) -> None:
        for name in names:
            self.stored.pop(name, None)
