"""Fake a vault in memory, and a patcher whose patches list what they were made from.

The bytes of an adapter name the job, every record of the sets that were read, and the patches beneath,
so that random histories can be checked for texts that should be gone. The vault does not seal.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Generic, Literal, TypeVar

from sisa.core.checkpoint_files import ADAPTER_FILE
from sisa.core.digest import canonical_json, sha256_hex
from sisa.core.domain import Record
from sisa.core.errors import EnvironmentFault, IntegrityError, InvalidInput
from sisa.core.events import Report
from sisa.core.patches import VaultSet
from sisa.core.ports import CheckpointStore, PatchMade, PatchOrder, Vault

T = TypeVar("T")


def encode(records: Sequence[Record]) -> bytes:
    """Return the plaintext of a set of the vault."""
    return canonical_json([each.to_list() for each in records])


class FakeFiles(Generic[T]):
    """StoredFiles in memory: what fakes of stores have in common."""

    def __init__(self) -> None:
        self.stored: dict[str, T] = {}

    def held(self) -> frozenset[str]:
        return frozenset(self.stored)

    def erase(self, names: Collection[str]) -> None:
        for name in names:
            self.stored.pop(name, None)


class FakeVault(FakeFiles[tuple[Record, ...]]):
    """A Vault whose records can be inspected."""

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


class FakePatchDrafts(FakeFiles[bytes]):
    """Drafts of patches: what the unfinished adapter would confess."""


class FakePatcher:
    """A Patcher that ends as `ends` says, in turn, and makes the patch once `ends` is empty."""

    def __init__(self, vault: Vault, patches: CheckpointStore, drafts: FakePatchDrafts) -> None:
        self.vault, self.patches, self.drafts = vault, patches, drafts
        self.ends: list[Literal["made", "known", "forgotten", "unfinished", "fails", "nothing"]] = []
        self.orders: list[PatchOrder] = []

    def check(
        self,
        settings: Mapping[str, Any],
        forget: Sequence[Record],
        retain: Sequence[Record] | None,
        reference: str = "",
    ) -> None:
        del reference
        if "method" not in settings or not forget or retain == []:
            raise InvalidInput("no patch can be made of this")

    def make(self, order: PatchOrder, report: Report) -> PatchMade:
        del report
        self.orders.append(order)
        touched = sorted({each.text for found in order.sets for each in self.vault.read(found)})
        beneath = [
            self.patches.load(each.key, each.manifest_sha256)[ADAPTER_FILE] for each in order.beneath
        ]
        for data in beneath:
            touched += json.loads(data)["touched"]
        adapter = canonical_json(
            {
                "job": order.job.key,
                "touched": sorted(set(touched)),
                "beneath": [sha256_hex(data) for data in beneath],
            }
        )
        end = self.ends.pop(0) if self.ends else "made"
        if end != "nothing":
            self.drafts.stored[order.job.key] = adapter
        if end == "fails":
            raise EnvironmentFault("the machine failed")
        if end == "unfinished":
            return PatchMade(None, unfinished=True, report={"steps": 1})
        if end == "nothing":
            return PatchMade(None, unfinished=False, report={"steps": 0})
        files = {ADAPTER_FILE: adapter, "adapter_config.json": b"{}"}
        saved = self.patches.save(order.job, files)
        left = {"known": {"still_known": {"after": 1}}, "forgotten": {"still_known": {"after": 0}}}
        return PatchMade(saved, unfinished=False, report={"steps": 2, **left.get(end, {})})
