"""Provide a tiny base that was fine-tuned to know some people, and the plain parts that make a patch.

Everything is in one folder. Sets are put into a real vault, sealed by a real keyring.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from approx.patches.patch_maker import PatchMaker
from approx.patches.patch_settings import Adapter, settings_of
from sisa.core.digest import digest_of
from sisa.core.domain import BaseFiles, Record
from sisa.core.events import Event
from sisa.core.patches import WRITTEN, Patch, PatchJob, VaultSet
from sisa.core.ports import PatchMade, PatchOrder, PatchSite
from sisa.lm.base.numerics import fingerprint
from sisa.lm.base.weights import base_digest
from sisa.store.areas import PATCHES
from sisa.store.blobs.keyring import FileKeyring
from sisa.store.blobs.local_blobs import LocalBlobs
from sisa.store.checkpoints import FileCheckpoints
from sisa.store.vault import FileVault
from tests.fakes.keyring import PLAIN
from tests.models.knowing_base import record, teach
from tests.models.tiny_base import make_tiny_base
from tests.models.tiny_model import of_people

KNOWN, STRANGERS = of_people("p003", "p005"), of_people("p001", "p009")
# Settings for one weak round, in which task arithmetic has little to learn.
ENOUGH: dict[str, dict[str, Any]] = {"task_arithmetic": {"alpha": 64.0}}
SMALL = Adapter(lora_r=4, lora_alpha=8)
PACE: dict[str, Any] = {  # no search, and no end before the last step
    **{"num_epochs": 15, "num_rounds": 1, "retain_batch_size": None, "learning_rate": 1e-2},
    **{"max_utility_drop": None, "target_probability": 0.0, "check_every": 5},
}


def make_knowing_base(folder: Path) -> Path:
    """Return a base that knows KNOWN by heart."""
    plain, knowing = make_tiny_base(folder / "plain", hidden=96), folder / "base"
    teach(plain, [record(row) for row in KNOWN], to=knowing, steps=120, learning_rate=3e-3)
    return knowing


def settings(method: str, **values: Any) -> dict[str, Any]:
    return settings_of(method, {**PACE, **values}, SMALL, seed=3, sequence_len=256)


@dataclass
class Bench:
    """Hold a folder with a vault and a store of patches, over one base."""

    folder: Path
    base: Path
    events: list[Event] = field(default_factory=list)

    @property
    def site(self) -> PatchSite:
        return PatchSite(
            vault_dir=self.folder / "vault",
            patches_at=LocalBlobs(self.folder / "patches"),
            runs_dir=self.folder / "runs",
            base=BaseFiles(self.base, base_digest(self.base)),
            threads=1,
            sequence_len=256,
            vault_keyring=FileKeyring(self.folder / "keys"),
            patches_keyring=PLAIN,
        )

    @property
    def maker(self) -> PatchMaker:
        return PatchMaker(self.site)

    @property
    def store(self) -> FileCheckpoints:
        return FileCheckpoints(self.site.patches_at, PLAIN, PATCHES)

    def put(self, role: Any, records: Sequence[Record]) -> VaultSet:
        name = digest_of([role, [each.id for each in records]])
        sha256, size = FileVault(self.site.vault_dir, self.site.vault_keyring).put(name, records)
        return VaultSet(name, role, len(records), "asked", "now", sha256, size)

    def order(
        self,
        asked: Mapping[str, Any],
        forget: Sequence[Record],
        retain: Sequence[Record] | None = None,
        *,
        beneath: Sequence[Patch] = (),
        max_seconds: float | None = None,
    ) -> PatchOrder:
        sets = [self.put("forget", forget)]
        if retain is not None:
            sets.append(self.put("retain", retain))
        job = PatchJob(
            self.site.base.digest,
            tuple(each.key for each in beneath),
            (sets[0].name,),
            sets[1].name if retain is not None else WRITTEN,
            dict(asked),
            fingerprint(1),
        )
        return PatchOrder(job, tuple(sets), tuple(beneath), max_seconds)

    def make(self, order: PatchOrder) -> PatchMade:
        return self.maker.make(order, self.events.append)

    def files(self, made: PatchMade) -> dict[str, bytes]:
        assert made.saved is not None
        return self.store.load(made.saved.key, made.saved.manifest_sha256)


def made_patch(order: PatchOrder, made: PatchMade) -> Patch:
    """Return the row that a ledger would keep."""
    assert made.saved is not None
    return Patch(
        1,
        order.job,
        "active",
        "now",
        "now",
        made.saved.manifest_sha256,
        made.saved.adapter_sha256,
        made.saved.num_bytes,
    )
