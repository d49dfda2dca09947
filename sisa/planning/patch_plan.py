"""Decide which patches there should be, and which texts they still need.

    sequential   a new patch goes on top of all active ones
    joint        a new patch is made on the untouched base, from its own forget sets and those of every
                 active patch whose texts are still held, and replaces these patches. A patch whose texts
                 are gone stays beneath, with those it was made on top of
    deletion     of a record in a patch's retain set: the patch, and every patch on top of it, is dropped
                 at once and made again without that record, if its texts are held

>>> from sisa.core.patches import WRITTEN
>>> one = Patch(1, PatchJob("base", (), ("a",), WRITTEN, {}, ""), "active", "now")
>>> next_job([one], {"a", "b"}, "joint", one.job, ("b",)).forget
('a', 'b')
>>> next_job([one], {"b"}, "joint", one.job, ("b",)).beneath == (one.key,)
True
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from sisa.core.patches import Patch, PatchJob, PatchMode, VaultSet, active, wanted


def next_version(patches: Sequence[Patch]) -> int:
    """Return the version of the next patch."""
    return max((each.version for each in patches), default=0) + 1


def next_job(
    patches: Sequence[Patch],
    held: Collection[str],
    mode: PatchMode,
    like: PatchJob,
    forget: Sequence[str],
) -> PatchJob:
    """Return the job of a new patch that forgets the sets `forget`, and is otherwise as `like`.

    `held` names the sets whose texts are held.
    """
    stack = active(patches)
    kept: set[str] = set()
    for patch in stack:
        if mode == "sequential" or not set(patch.job.forget) <= set(held):
            kept |= {patch.key, *patch.job.beneath}
    beneath = tuple(each.key for each in stack if each.key in kept)
    merged = [each for each in stack if each.key not in kept]
    names = dict.fromkeys([*(name for each in merged for name in each.job.forget), *forget])
    return replace(like, beneath=beneath, forget=tuple(names))


def activated(patches: Sequence[Patch], made: Patch) -> list[Patch]:
    """Return the rows that change when a wanted patch is made: it supersedes what is not beneath it."""
    kept = {made.key, *made.job.beneath}
    gone = [each for each in active(patches) if each.key not in kept]
    return [replace(made, state="active"), *(replace(each, state="superseded") for each in gone)]


def needed(
    patches: Sequence[Patch], mode: PatchMode, sets: Sequence[VaultSet], deletable: Collection[str]
) -> frozenset[str]:
    """Return the names of the sets whose texts must stay.

    A set is needed by a patch that is wanted; in joint mode by every active patch; and by an active
    patch that may have to be made again, since its retain set or that of one beneath holds records of
    the model (`deletable`). A set from which no patch was ever made waits for one. So does one of which
    the base still knows something after every attempt.
    """
    held = {each.name for each in sets if each.held}
    waiting = held - {name for patch in patches for name in patch.job.sets}
    risky = {each.key for each in patches_from(active(patches), deletable)}  # a deletion may drop them
    to_make = {
        name
        for patch in patches
        if patch.state == "wanted"
        or (patch.state == "active" and (mode == "joint" or patch.key in risky))
        for name in patch.job.sets
    }
    tried = [each for each in patches if "still_known" in each.report]
    forgotten = {name for each in tried if not num_still_known(each) for name in each.job.forget}
    still_known = {name for each in tried for name in each.job.forget} - forgotten
    return frozenset(waiting | to_make | still_known)


def num_still_known(patch: Patch) -> int:
    """Return how many texts the probe still knew after a patch or an attempt; 0 if not measured."""
    return int(patch.report.get("still_known", {}).get("after", 0))


def unneeded_sets(
    patches: Sequence[Patch],
    mode: PatchMode,
    sets: Sequence[VaultSet],
    deletable: Collection[str],
    elsewhere: Collection[str] = (),
) -> tuple[list[VaultSet], list[str]]:
    """Return the rows of sets whose texts are to be erased, and the names of rows to remove.

    A row is removed when no held or wanted patch was made from its set. `elsewhere` are the keys of
    patches in exports or beneath trained shards.
    """
    keep = needed(patches, mode, sets, deletable)
    there = [p for p in patches if p.state in ("active", "wanted") or p.key in elsewhere]
    live = {name for p in there for name in p.job.sets}
    erased = [replace(each, held=False) for each in sets if each.held and each.name not in keep]
    gone = [each.name for each in sets if each.name not in keep and each.name not in live]
    return [each for each in erased if each.name not in gone], gone


@dataclass(frozen=True)
class Rederived:
    """Effect of a deletion on patches: rows that change, and new ones to be made."""

    changed: tuple[Patch, ...] = ()
    fresh: tuple[Patch, ...] = ()

    @property
    def dropped(self) -> frozenset[str]:
        """Return the keys of the patches that the deletion touched."""
        return frozenset(each.key for each in self.changed)


def patches_from(
    patches: Sequence[Patch], touched: Collection[str], damaged: Collection[str] = ()
) -> list[Patch]:
    """Return all patches with one of these retain sets or keys, and all patches on top of them."""
    keys = {each.key for each in patches if each.job.retain in touched}.union(damaged)
    return [each for each in patches if not keys.isdisjoint((*each.job.beneath, each.key))]


def tainted_patches(
    patches: Sequence[Patch], touched: Collection[str], damaged: Collection[str] = ()
) -> list[Patch]:
    """Return those of `patches_from` that are served or wanted."""
    return [e for e in patches_from(patches, touched, damaged) if e.state in ("active", "wanted")]


def rederive(
    patches: Sequence[Patch],
    without: Mapping[str, str],
    held: Collection[str],
    fingerprint: str,
    now: str,
    request_id: str,
    damaged: Collection[str] = (),
) -> Rederived:
    """Drop the patches that a deletion touched, and want them again without the deleted records.

    `without` maps each touched retain set to its replacement (WRITTEN when nothing is left); `damaged`
    are keys of patches whose files are damaged, which are treated alike. A patch whose texts are not
    `held` is dropped, and patches on top of it are made on what is left.
    """

    def renewed(job: PatchJob) -> PatchJob | None:
        again = replace(job, retain=without.get(job.retain, job.retain), fingerprint=fingerprint)
        return again if set(again.sets) <= set(held) else None

    gone = tainted_patches(patches, without, damaged)
    same = {each.key for each in wanted(patches)} - {each.key for each in gone}
    fresh = tuple(
        each if each.key in same else replace(each, wanted_at=now, request_id=request_id)
        for each in _again(patches, gone, renewed)
    )
    return Rederived(tuple(replace(each, state="dropped") for each in gone), fresh)


def unmade(patches: Sequence[Patch], patch: Patch) -> list[Patch]:
    """Return the rows that change when a wanted patch fails.

    The patch is dropped, and those planned on top of it are made on what is left.
    """
    gone = tainted_patches(patches, (), (patch.key,))
    fresh = _again(patches, gone, lambda job: None if job == patch.job else job)
    dropped = [patch, *(each for each in gone if each.key != patch.key)]
    return [*(replace(each, state="dropped") for each in dropped), *fresh]


def _again(
    patches: Sequence[Patch], gone: Sequence[Patch], renewed: Callable[[PatchJob], PatchJob | None]
) -> list[Patch]:
    """Return new wishes in place of the patches that go.

    `renewed` returns the new job of such a patch, or None to give it up. A wish that equals an active
    patch is that patch. Wishes keep their order: an unchanged wish that comes after a patch that goes
    gets a later version, too.
    """
    served = {each.key for each in active(patches) if each not in gone}
    instead: dict[str, str | None] = {}  # by the key of a former patch or wish
    wishes: dict[str, Patch] = {}
    for patch in patches:
        goes = patch in gone
        if not goes and not (instead and patch.state == "wanted"):
            continue
        job = renewed(patch.job) if goes else patch.job
        if job is None:
            instead[patch.key] = None
            continue
        beneath = tuple(key for each in job.beneath if (key := instead.get(each, each)) is not None)
        again = replace(job, beneath=beneath)
        instead[patch.key] = again.key
        if again.key not in served:
            wish = Patch(0, again, "wanted", patch.wanted_at, request_id=patch.request_id)
            wishes.setdefault(again.key, wish)
    version = next_version(patches)
    return [replace(each, version=version + at) for at, each in enumerate(wishes.values())]
