"""The nouns of patches: LoRA adapters that lie on the frozen base, beneath every constituent model.

A patch makes the base say less of what it knew before any record arrived. It is approximate, always.
Like a checkpoint it is a build product: named by the digest of the `PatchJob` that makes it. The texts
that it is made from rest in the vault, encrypted, by recorded consent; they are erased when no patch
needs them.

    served base = frozen base + active patches, in the order of their versions

Rules: nothing here does I/O, and nothing holds a text or an id. `WRITTEN` stands for a retain set that
the base writes itself, so that no record of a user enters a patch.

Not covered: how a patch is made (`approx/`), which patches there should be (`patch_plan.py`).

>>> job = PatchJob("base", (), ("a",), WRITTEN, {"method": "npo"}, "fingerprint")
>>> job.key == PatchJob("base", (), ("a",), WRITTEN, {"method": "npo"}, "fingerprint").key
True
>>> job.sets
('a',)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from sisa.core.digest import digest_of

PatchMode = Literal["sequential", "joint"]
PatchState = Literal["wanted", "active", "superseded", "reverted", "dropped"]
SetRole = Literal["forget", "retain"]
WRITTEN = "written"  # the retain set that the base writes itself


@dataclass(frozen=True)
class PatchJob:
    """All that a patch depends on.

    `beneath` are the keys of the patches it lies upon, lowest first; `forget` and `retain` name sets of
    the vault; `settings` are method, hyper-parameters, adapter, pace and bounds, as JSON values.
    """

    base: str
    beneath: tuple[str, ...]
    forget: tuple[str, ...]
    retain: str
    settings: Mapping[str, Any]
    fingerprint: str

    @cached_property
    def key(self) -> str:
        return digest_of(asdict(self))

    @property
    def sets(self) -> tuple[str, ...]:
        """Names of the vault's sets that it is made from."""
        return self.forget if self.retain == WRITTEN else (*self.forget, self.retain)


@dataclass(frozen=True)
class Patch:
    """A patch as the ledger keeps it, from the wish for it to its end.

    `version` counts from 1 and is its place in the stack. The digests are empty until it is made.
    `report` is the ApproxReport as JSON: numbers and names, kept when the patch is gone.
    `request_id` names the request whose text it forgets, or whose deletion made it be derived again.
    """

    version: int
    job: PatchJob
    state: PatchState
    wanted_at: str
    made_at: str = ""
    manifest_sha256: str = ""
    adapter_sha256: str = ""
    num_bytes: int = 0
    request_id: str = ""
    report: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return self.job.key


def without_shards(patch: Patch, shards: Collection[int]) -> Patch:
    """The patch, its report without what was measured on records of these shards: a deletion there may
    have taken one of them. Means over several shards go, too."""
    found = patch.report.get("composition")
    gone = {str(each) for each in shards}
    if not found or gone.isdisjoint(found["by_shard"]):
        return patch
    left = {key: each for key, each in found["by_shard"].items() if key not in gone}
    bounded = {**found, "base": None, "shards": None, "by_shard": left}
    return replace(patch, report={**patch.report, "composition": bounded})


@dataclass(frozen=True, slots=True)
class VaultSet:
    """A set of texts in the vault: what it is for, by whose consent, and the file that holds it.

    `name` is a keyed digest of its content. When `held` is False its text is erased, and the row stays
    while a patch that was made from it does. `consent` is kept as given.
    """

    name: str
    role: SetRole
    num_records: int
    consent: str
    put_at: str
    sha256: str
    num_bytes: int
    held: bool = True
    request_id: str = ""


def parse_patch_job(parsed: Any) -> PatchJob:
    """A job out of its JSON. Raises TypeError, ValueError, KeyError for anything else."""
    sets = {name: tuple(str(each) for each in parsed[name]) for name in ("beneath", "forget")}
    return PatchJob(**{**parsed, **sets})


def patched_digest(base: str, adapters: Sequence[str]) -> str:
    """The name of a base under patches, given by the sha256 of their adapter files, lowest first.

    >>> patched_digest("base", []) == "base" != patched_digest("base", ["a"])
    True
    """
    return digest_of({"base": base, "patches": list(adapters)}) if adapters else base
