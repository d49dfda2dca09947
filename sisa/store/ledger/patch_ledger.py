"""The ledger's queries about patches, the vault's sets, and the records whose texts are in them.

These tables are small. Which sets a record is in is read from all rows, so that a damaged index can't
keep a deletion from a patch that it touches.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from typing import Any

from sisa.core.patch import Patch, VaultSet, parse_patch_job
from sisa.store.ledger.database import Database, having
from sisa.store.ledger.schema import PATCHES, VAULT, VAULTED


@dataclass(frozen=True, slots=True)
class _Vaulted:
    name: str
    id_digest: str


class PatchLedger(Database):
    """A Ledger's queries about patches."""

    def patches(self) -> list[Patch]:
        found = self._whole(Patch, PATCHES, None, PATCHES.c.version)
        with self._parsing("a patch"):
            return [_patch(each) for each in found]

    def vault(self) -> list[VaultSet]:
        found = self._whole(VaultSet, VAULT, None, VAULT.c.name)
        return [replace(each, held=bool(each.held)) for each in found]

    def vaulted(self, name: str) -> list[str]:
        with self._reading() as connection:
            found = having(connection, _Vaulted, VAULTED.c.name, [name], full_scan=True)
        return sorted(each.id_digest for each in found)

    def sets_with(self, id_digests: Collection[str]) -> dict[str, list[str]]:
        named: dict[str, list[str]] = {}
        with self._reading() as connection:
            found = having(connection, _Vaulted, VAULTED.c.id_digest, sorted(id_digests), full_scan=True)
        for each in sorted(found, key=lambda row: row.name):
            named.setdefault(each.id_digest, []).append(each.name)
        return named


def patch_row(patch: Patch) -> dict[str, Any]:
    """Return a patch as a row."""
    row = {**asdict(patch), "key": patch.key}
    return row | {name: json.dumps(row[name], sort_keys=True) for name in ("job", "report")}


def _patch(row: Patch) -> Patch:
    """Return a patch whose job and report are still JSON."""
    raw: Any = row
    return replace(row, job=parse_patch_job(json.loads(raw.job)), report=json.loads(raw.report))
