"""Checkpoints and patches found anywhere: what they are, and what is wrong with them.

    damaged        bytes are not those that the ledger, or the manifest beside them, names
    tainted        a checkpoint that was not made of held records alone
    stale_patch    a patch that is neither served nor trained over
    unreadable     a manifest that can't be parsed, so that it proves nothing

Rules: nothing is changed. What the ledger does not know is judged, too: a checkpoint that was retired,
or of another copy of the model, is clean if its records are all still held.

Not covered: where groups lie and how they are read (`residue.py`, `stored_residue.py`); files that no
manifest names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sisa.audit.lineage import parse_manifest, parse_patch_manifest, proves_clean
from sisa.core.digest import sha256_hex
from sisa.core.domain import SliceJob
from sisa.flows.wiring.world import World, known_by_area

Are = Callable[[Mapping[str, str]], bool]
Fault = tuple[str, str]  # its kind, and in words; both empty where there is none
NONE: Fault = ("", "")


@dataclass(frozen=True, slots=True)
class Verdict:
    """The room that a group is of, its key, and the sha256 of each file that it should have."""

    room: str
    key: str
    names: Mapping[str, str]
    fault: Fault


class FoundGroups:
    """What a model's ledger says of groups; the checkpoints that it holds, and the patches in use."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.checkpoints = {each.key: each for each in world.ledger.checkpoints()}
        used = known_by_area(world)["patches"]
        self.patches = {each.key: each for each in world.ledger.patches() if each.key in used}

    def judge(self, manifest: bytes, are: Are) -> Verdict:
        """By its manifest, and by whether its files `are` those that it names."""
        if patch := parse_patch_manifest(manifest):
            job, names = patch
            return Verdict("patches", job.key, names, self._patch(job.key, manifest, are(names)))
        if parsed := parse_manifest(manifest):
            stage, names = parsed
            return Verdict("checkpoints", stage.key, names, self._stage(stage, manifest, are(names)))
        fault = "unreadable", "a checkpoint whose manifest can't be parsed"
        return Verdict("checkpoints", "", {}, fault)

    def _patch(self, key: str, manifest: bytes, whole: bool) -> Fault:
        known = self.patches.get(key)
        if known is None:
            what = "a patch that is not served any more: it may tell of records deleted since"
            return "stale_patch", what
        if sha256_hex(manifest) != known.manifest_sha256 or not whole:
            return "damaged", "a patch whose bytes are not the recorded ones"
        return NONE

    def _stage(self, job: SliceJob, manifest: bytes, whole: bool) -> Fault:
        held, ledger = self.checkpoints.get(job.key), self._world.ledger
        if not whole or (held and sha256_hex(manifest) != held.manifest_sha256):
            return "damaged", "a checkpoint whose bytes are not the recorded ones"
        seq = held.seq if held else ledger.seq()
        if proves_clean(job, ledger.rows(job.shard), seq, self._world.recipe.num_slices):
            return NONE
        known = "held, though" if held else "not in the ledger, and"
        return "tainted", f"a checkpoint {known} not of held records alone"
