"""The nouns of approximate unlearning: patches, and the sets of texts that they are made from.

A `Patch` is a LoRA adapter on the frozen base, beneath every constituent model, which makes the base
reveal less of what it knew before any record arrived. It is always approximate. Like a checkpoint it is
named by the digest of the `PatchJob` that makes it. The vault keeps the texts that it is made from,
encrypted, by recorded consent, until no patch needs them.

    served base = frozen base + active patches, in the order of their versions

>>> job = PatchJob("base", (), ("a",), WRITTEN, {"method": "npo"}, "fingerprint")
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
WRITTEN = "written"  # a retain set that the base generates, so that no user's record enters a patch


@dataclass(frozen=True)
class PatchJob:
    """Everything that a patch depends on.

    `beneath` are keys of the patches below it, lowest first; `forget` and `retain` name vault sets;
    `settings` are method, hyper-parameters, adapter, schedule and bounds, as JSON values.
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
        """Return the names of the vault's sets from which it is made."""
        return self.forget if self.retain == WRITTEN else (*self.forget, self.retain)


@dataclass(frozen=True)
class Patch:
    """A patch in the ledger, from the wish for it to its end.

    `version`, from 1, is its position in the stack. Digests are empty until it is made. `report` is the
    ApproxReport as JSON, kept after the patch is gone. `request_id` names the request whose text it
    forgets, or whose deletion caused it to be made again.
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
    """Return the patch with a report that lacks measurements of these shards, and all means."""
    found = patch.report.get("composition")
    gone = {str(each) for each in shards}
    if not found or gone.isdisjoint(found["by_shard"]):
        return patch
    left = {key: each for key, each in found["by_shard"].items() if key not in gone}
    bounded = {**found, "base": None, "shards": None, "by_shard": left}
    return replace(patch, report={**patch.report, "composition": bounded})


@dataclass(frozen=True, slots=True)
class VaultSet:
    """A set of texts in the vault, named by a keyed digest of its content; `consent` is as given.

    When `held` is False its text is erased; the row stays while a patch that was made from it does.
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
    """Return the job that JSON describes. Raise TypeError, ValueError, KeyError for anything else."""
    sets = {name: tuple(str(each) for each in parsed[name]) for name in ("beneath", "forget")}
    return PatchJob(**{**parsed, **sets})


def active(patches: Sequence[Patch]) -> list[Patch]:
    """Return the served stack, lowest first."""
    return [each for each in patches if each.state == "active"]


def wanted(patches: Sequence[Patch]) -> list[Patch]:
    """Return the patches to be made, in the order in which they must be made."""
    return [each for each in patches if each.state == "wanted"]
