"""The patches that there should be and the texts that they need, case by case."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sisa.core.digest import patched_digest
from sisa.core.patches import WRITTEN, Patch, PatchJob, PatchMode, PatchState, VaultSet, active, wanted
from sisa.planning.patch_plan import (
    activated,
    needed,
    next_job,
    next_version,
    patches_from,
    rederive,
    tainted_patches,
    unmade,
    unneeded_sets,
)

NOW, THEN = "now", "then"


def job(*beneath: Patch, forget: str = "a", retain: str = WRITTEN, method: str = "npo") -> PatchJob:
    keys = tuple(each.key for each in beneath)
    return PatchJob("base", keys, tuple(forget), retain, {"method": method}, "f")


def patch(version: int, of: PatchJob, state: PatchState = "active") -> Patch:
    return Patch(version, of, state, THEN, request_id="first")


def vault_set(name: str, *, retain: bool = False, held: bool = True) -> VaultSet:
    return VaultSet(name, "retain" if retain else "forget", 1, "asked", THEN, "s", 1, held)


def stack_of(*forgets: str, retains: str = "") -> list[Patch]:
    """Return active patches, each above all before it; `retains` name their retain sets."""
    stack: list[Patch] = []
    for place, forget in enumerate(forgets):
        retain = retains[place] if retains and retains[place] != "-" else WRITTEN
        stack.append(patch(place + 1, job(*stack, forget=forget, retain=retain)))
    return stack


def names(job_: PatchJob) -> str:
    return "".join(job_.forget)


def test_a_sequential_patch_lies_upon_all() -> None:
    stack = stack_of("a", "b")
    found = next_job(stack, {"a", "b", "c"}, "sequential", job(), ("c",))
    assert found == replace(job(*stack), forget=("c",))


def test_a_joint_patch_takes_the_place_of_all_whose_texts_are_held() -> None:
    stack = stack_of("a", "b")
    assert next_job(stack, {"a", "b", "c"}, "joint", job(), ("c",)) == job(forget="abc")
    assert next_job(stack, {"b", "c"}, "joint", job(), ("c",)) == job(stack[0], forget="bc")


def test_a_joint_patch_does_not_depend_on_the_joint_patches_before_it() -> None:
    held = set("abcde")
    first = patch(1, next_job([], held, "joint", job(), ("a", "b")))
    second = patch(2, next_job([first], held, "joint", job(), ("c",)))
    at_once = next_job([], held, "joint", job(), ("a", "b", "c", "d", "e"))
    assert next_job([second], held, "joint", job(), ("d", "e")).key == at_once.key


def test_a_patch_that_stays_keeps_those_that_it_was_made_upon() -> None:
    """Otherwise a record in the lower one's retain set would persist unnoticed in the upper one."""
    stack = stack_of("a", "b", "c")
    assert next_job(stack, {"a", "c", "d"}, "joint", job(), ("d",)) == job(*stack[:2], forget="cd")


def test_the_same_texts_are_named_once() -> None:
    assert next_job(stack_of("a"), {"a"}, "joint", job(), ("a",)) == job(forget="a")


def test_what_becomes_active_supersedes_what_is_not_beneath_it() -> None:
    stack = stack_of("a", "b")
    upon = patch(3, job(*stack, forget="c"), "wanted")
    assert activated([*stack, upon], upon) == [replace(upon, state="active")]
    joint = patch(3, job(stack[0], forget="bc"), "wanted")
    found = activated([*stack, joint], joint)
    assert found == [replace(joint, state="active"), replace(stack[1], state="superseded")]


def test_versions_count_what_there_ever_was() -> None:
    assert next_version([]) == 1
    assert next_version([patch(4, job(), "reverted"), patch(2, job())]) == 5


@pytest.mark.parametrize("mode", ["sequential", "joint"])
def test_a_wanted_patch_needs_its_texts_and_others_wait_for_one(mode: PatchMode) -> None:
    sets = [vault_set("a"), vault_set("r", retain=True), vault_set("w")]
    wish = patch(1, job(forget="a", retain="r"), "wanted")
    assert needed([wish], mode, sets, ()) == {"a", "r", "w"}
    for state in ("superseded", "reverted", "dropped"):
        assert needed([replace(wish, state=state)], mode, sets, ()) == {"w"}


def test_an_active_patch_needs_its_texts_in_joint_mode_alone() -> None:
    sets = [vault_set("a"), vault_set("r", retain=True)]
    stack = [patch(1, job(forget="a", retain="r"))]
    assert needed(stack, "joint", sets, ()) == {"a", "r"}
    assert needed(stack, "sequential", sets, ()) == frozenset()


def test_what_a_deletion_may_drop_keeps_its_texts() -> None:
    """Keep the texts of the patch whose retain set holds records, and of patches on top of it."""
    stack = stack_of("a", "b", "c", retains="-r-")
    sets = [vault_set(each) for each in "abc"] + [vault_set("r", retain=True)]
    assert needed(stack, "sequential", sets, {"r"}) == {"b", "c", "r"}


def test_texts_go_and_rows_stay_while_something_was_made_from_them() -> None:
    served, gone = patch(1, job(forget="a")), patch(2, job(forget="b"), "reverted")
    sets = [vault_set("a"), vault_set("b"), vault_set("w")]
    erased, rows = unneeded_sets([served, gone], "sequential", sets, ())
    assert (erased, rows) == ([replace(sets[0], held=False)], ["b"])
    erased, rows = unneeded_sets([served, gone], "sequential", sets, (), [gone.key])
    assert (erased, rows) == ([replace(each, held=False) for each in sets[:2]], [])
    assert unneeded_sets([served], "sequential", [vault_set("a", held=False)], ()) == ([], [])


def test_a_touched_patch_taints_those_upon_it() -> None:
    stack = stack_of("a", "b", "c", retains="-r-")
    assert tainted_patches(stack, {"r"}) == stack[1:]
    assert tainted_patches(stack, (), [stack[2].key]) == stack[2:]
    assert tainted_patches(stack, {"other"}) == []
    reverted = [replace(each, state="reverted") for each in stack]
    assert tainted_patches(reverted, {"r"}) == []
    assert patches_from(reverted, {"r"}) == reverted[1:]


def test_touched_patches_are_wanted_again_without_the_record() -> None:
    stack = stack_of("a", "b", "c", retains="-r-")
    found = rederive(stack, {"r": "q"}, {"b", "c", "q"}, "g", NOW, "req")
    assert found.changed == tuple(replace(each, state="dropped") for each in stack[1:])
    second, third = found.fresh
    assert second.job == replace(stack[1].job, retain="q", fingerprint="g")
    assert third.job == replace(stack[2].job, beneath=(stack[0].key, second.key), fingerprint="g")
    assert [(each.version, each.state) for each in found.fresh] == [(4, "wanted"), (5, "wanted")]
    assert {(each.wanted_at, each.request_id) for each in found.fresh} == {(NOW, "req")}
    assert found.dropped == {each.key for each in stack[1:]}


def test_a_retain_set_of_which_nothing_is_left_is_written() -> None:
    stack = stack_of("a", retains="r")
    (again,) = rederive(stack, {"r": WRITTEN}, {"a"}, "f", NOW, "req").fresh
    assert again.job == job(forget="a")


def test_what_can_not_be_made_again_is_dropped_and_the_rest_goes_on_without_it() -> None:
    stack = stack_of("a", "b", retains="r-")
    found = rederive(stack, {"r": "q"}, {"b", "q"}, "f", NOW, "req")
    assert [each.job for each in found.fresh] == [job(forget="b")]
    assert not rederive(stack, {"r": "r"}, set(), "f", NOW, "req").fresh


def test_wishes_keep_their_order() -> None:
    """A joint wish that came later than a patch that is made again must take its place, not lose it."""
    served = patch(1, job(forget="a", retain="r"))
    wish = patch(2, job(forget="ab"), "wanted")
    found = rederive([served, wish], {"r": "q"}, {"a", "b", "q"}, "f", NOW, "req")
    assert found.changed == (replace(served, state="dropped"),)
    assert [(each.version, names(each.job)) for each in found.fresh] == [(3, "a"), (4, "ab")]
    assert [each.request_id for each in found.fresh] == ["req", "first"]


def test_what_comes_out_like_an_active_patch_is_that_patch() -> None:
    served = patch(1, job(forget="a", retain="q"))
    wish = patch(2, job(forget="a", retain="r"), "wanted")
    found = rederive([served, wish], {"r": "q"}, {"a", "q"}, "f", NOW, "req")
    assert (found.changed, found.fresh) == ((replace(wish, state="dropped"),), ())


def test_a_damaged_patch_is_wanted_again_as_it_was() -> None:
    stack = stack_of("a", "b")
    found = rederive(stack, {}, {"a", "b"}, "f", NOW, "", [stack[0].key])
    assert [each.job for each in found.fresh] == [each.job for each in stack]
    assert [each.version for each in found.fresh] == [3, 4]


def test_where_nothing_comes_of_a_patch_the_others_go_on_without_it() -> None:
    first = patch(1, job(forget="a"), "wanted")
    second = patch(2, job(first, forget="b"), "wanted")
    third = patch(3, job(first, second, forget="c"), "wanted")
    reported = replace(first, report={"steps": 0})
    changed = {each.key: each for each in unmade([first, second, third], reported)}
    assert changed[first.key] == replace(reported, state="dropped")
    left = wanted(sorted(changed.values(), key=lambda each: each.version))
    assert [names(each.job) for each in left] == ["b", "c"]
    assert [each.job.beneath for each in left] == [(), (left[0].key,)]
    assert not active(list(changed.values()))


def test_the_name_of_a_patched_base_depends_on_the_order() -> None:
    one, two = patched_digest("base", ["x", "y"]), patched_digest("base", ["y", "x"])
    assert len({one, two, patched_digest("base", ["x"]), "base"}) == 4
