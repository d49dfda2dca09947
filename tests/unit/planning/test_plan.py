"""The planner: the published schedule's arithmetic, causality of jobs, and what heads and is retired.

The planner does not know what happened; it sees what remains and what is held. So each test lays out a
shard's slices and held checkpoints and asks what follows.
"""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sisa.config.config import TRAINING_KEYS
from sisa.core.domain import Head, HeldCheckpoint, RecordRow, SliceJob, SliceState, record_epochs
from sisa.planning.plan import (
    LAYERWISE,
    Recipe,
    Schedule,
    ShardPlan,
    ShardView,
    jobs,
    passes,
    plan_shard,
    tainted_checkpoints,
)

RECIPE = Recipe(3, "cumulative", 2, {"learning_rate": 0.1}, "base")
schedules = st.sampled_from(["cumulative", "sequential"])


def state(slice_: int, root: str = "a", num_records: int = 4) -> SliceState:
    return SliceState(0, slice_, f"{root}{slice_}", num_records)


FULL = (state(0), state(1), state(2))


def held(job: SliceJob, seq: int = 1) -> HeldCheckpoint:
    return HeldCheckpoint(job.key, job.shard, job.prefix, seq, job.fingerprint, "m", "a", 1, 1.0, 1)


def plan(
    slices: tuple[SliceState, ...],
    *checkpoints: HeldCheckpoint,
    fingerprint: str = "here",
    recipe: Recipe = RECIPE,
) -> ShardPlan:
    return plan_shard(ShardView(0, slices, checkpoints), recipe, fingerprint)


def path(slices: tuple[SliceState, ...], fingerprint: str = "here") -> tuple[SliceJob, ...]:
    return jobs(0, slices, RECIPE, fingerprint)


@given(schedules, st.integers(1, 12), st.integers(1, 30), st.integers(1, 20))
def test_equal_slices_cost_num_epochs_in_total(
    schedule: Schedule, num_slices: int, num_epochs: int, size: int
) -> None:
    """Section V: sum over r of (2E / (R + 1)) x r x (n / R) = E x n, exactly."""
    recipe = Recipe(num_slices, schedule, num_epochs, {}, "base")
    slices = [SliceState(0, number, "root", size) for number in range(num_slices)]
    stages = jobs(0, slices, recipe, "f")
    presented = sum((Fraction(*job.passes) * job.num_records for job in stages), Fraction())
    assert presented == num_epochs * num_slices * size
    rounded = sum(record_epochs(job) for job in stages)
    assert 0 <= rounded - presented < num_slices  # a fractional pass rounds up to a whole record


@pytest.mark.parametrize(
    ("num_epochs", "num_slices", "expected"),
    [(1, 1, (1, 1)), (6, 3, (3, 1)), (20, 1, (20, 1)), (1, 2, (2, 3)), (5, 4, (2, 1)), (3, 5, (1, 1))],
)
def test_golden_passes_of_section_v(num_epochs: int, num_slices: int, expected: tuple[int, int]) -> None:
    assert passes("cumulative", num_epochs, num_slices) == expected
    assert passes("sequential", num_epochs, num_slices) == (num_epochs, 1)


def test_a_cumulative_stage_sees_all_slices_so_far() -> None:
    first, second, third = path(FULL)
    assert [each.slices for each in (first, second, third)] == [
        ((0, "a0"),),
        ((0, "a0"), (1, "a1")),
        ((0, "a0"), (1, "a1"), (2, "a2")),
    ]
    assert [each.num_records for each in (first, second, third)] == [4, 8, 12]
    assert (first.parent, second.parent, third.parent) == (None, first.key, second.key)


def test_a_sequential_stage_sees_its_slice_alone() -> None:
    stages = jobs(0, FULL, replace(RECIPE, schedule="sequential"), "f")
    assert [each.slices for each in stages] == [((0, "a0"),), ((1, "a1"),), ((2, "a2"),)]
    assert stages[2].parent == stages[1].key


def test_an_empty_slice_is_no_stage() -> None:
    first, last = path((state(0), state(2)))
    assert (first.slice, last.slice) == (0, 2)
    assert last.parent == first.key
    assert last.slices == ((0, "a0"), (2, "a2"))
    assert path(()) == ()


def test_passes_come_from_the_configured_slices_not_from_the_filled() -> None:
    """Else emptying a slice would change the stages before it."""
    assert {job.passes for job in path((state(0),))} == {passes("cumulative", 2, 3)}


slice_sets = st.dictionaries(
    st.integers(0, 5), st.tuples(st.sampled_from("abc"), st.integers(1, 5)), max_size=6
)


def states(found: dict[int, tuple[str, int]], order: tuple[int, ...] = ()) -> list[SliceState]:
    return [state(number, *found[number]) for number in order or found]


@given(schedules, slice_sets, slice_sets, st.integers(0, 5))
def test_a_job_depends_on_no_later_slice(
    schedule: Schedule, one: dict[int, tuple[str, int]], other: dict[int, tuple[str, int]], cut: int
) -> None:
    """Jobs of slices 0..cut are the same whatever happens to the slices after."""
    early = {number: each for number, each in one.items() if number <= cut}
    late = {number: each for number, each in other.items() if number > cut}
    recipe = Recipe(6, schedule, 3, {}, "base")
    whole = jobs(0, states(one), recipe, "f")
    changed = jobs(0, states({**early, **late}), recipe, "f")
    before = [job.key for job in whole if job.slice <= cut]
    assert before == [job.key for job in changed if job.slice <= cut]


@given(schedules, slice_sets, st.randoms(use_true_random=False))
def test_the_order_of_the_slices_given_does_not_matter(
    schedule: Schedule, found: dict[int, tuple[str, int]], order: object
) -> None:
    shuffled = list(found)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    recipe = Recipe(6, schedule, 3, {}, "base")
    assert jobs(0, states(found, tuple(shuffled)), recipe, "f") == jobs(0, states(found), recipe, "f")


def test_every_input_reaches_the_key() -> None:
    job = path(FULL)[1]
    others = [
        replace(job, shard=1),
        replace(job, slice=2),
        replace(job, parent=None),
        replace(job, slices=job.slices[:1]),
        replace(job, num_records=9),
        replace(job, passes=(2, 1)),
        replace(job, training={"learning_rate": 0.2}),
        replace(job, base="other"),
        replace(job, fingerprint="there"),
        replace(job, before=(2,)),
    ]
    assert len({each.key for each in [job, *others]}) == len(others) + 1


def test_every_setting_of_the_training_reaches_the_key() -> None:
    training = dict.fromkeys((*TRAINING_KEYS, "lora_layers", LAYERWISE, "device", "dtype"), 0)
    job = replace(path(FULL)[1], training=training)
    others = [replace(job, training={**training, name: 1}) for name in training]
    assert "seed" in training
    assert len({each.key for each in [job, *others]}) == len(others) + 1


def test_a_keys_bytes_are_pinned() -> None:
    """A key that changes with a version would orphan every checkpoint at rest."""
    assert path(FULL)[0].key == "37f19caab4fa9ef4509feedac821094a82b00211d1ba8eea78fc39175a450ce6"


def test_with_nothing_held_all_is_trained_from_the_base() -> None:
    found = plan(FULL)
    assert found.train == found.path == path(FULL)
    assert (found.missing[0].parent, found.retired) == (None, ())
    assert found.head == Head(0, None, 0, path(FULL)[-1].key)


def test_at_the_target_nothing_is_trained() -> None:
    stages = [held(job) for job in path(FULL)]
    found = plan(FULL, *stages)
    assert (found.train, found.missing[0].parent, found.retired) == ((), None, ())
    assert found.head == Head(0, stages[2].key, 3, stages[2].key)
    assert found.head.converged


@pytest.mark.parametrize("depth", [1, 2])
def test_the_suffix_is_trained_from_the_deepest_held_stage(depth: int) -> None:
    stages = [held(job) for job in path(FULL)[:depth]]
    found = plan(FULL, *stages)
    assert found.train == path(FULL)[depth:]
    assert found.missing[0].parent == stages[-1]
    assert found.head == Head(0, stages[-1].key, depth, path(FULL)[-1].key)


def test_a_gap_before_the_deepest_held_stage_is_not_trained() -> None:
    """Only its last stage is needed to go on: the earlier ones may have been lost with their records."""
    found = plan(FULL, held(path(FULL)[1]))
    assert found.train == path(FULL)[2:]
    assert found.missing[0].parent == held(path(FULL)[1])


def test_after_an_addition_the_older_complete_head_serves() -> None:
    """It is clean and knows more than the new path's prefix: it stays until the target is there."""
    grown = (state(0), state(1, "b", 5), state(2))
    old = [held(job) for job in path(FULL)]
    found = plan(grown, *old)
    assert found.head == Head(0, old[2].key, 3, path(grown)[-1].key)
    assert found.train == path(grown)[1:]
    assert found.missing[0].parent == old[0]
    assert found.retired == (old[1].key,)


def test_at_equal_depth_the_path_to_the_target_heads() -> None:
    grown = (state(0), state(1, "b", 5), state(2))
    old, new = held(path(FULL)[1], seq=9), held(path(grown)[1], seq=1)
    assert plan(grown, old, new).head.key == new.key
    assert plan(grown, new, old).head.key == new.key


def test_once_the_target_is_held_the_old_head_is_retired() -> None:
    grown = (state(0), state(1, "b", 5), state(2))
    old, new = [held(job) for job in path(FULL)], [held(job, 2) for job in path(grown)]
    found = plan(grown, *old, *new[1:])
    assert found.head == Head(0, new[2].key, 3, new[2].key)
    assert found.retired == (old[1].key, old[2].key)
    assert found.train == ()


def test_an_emptied_shard_serves_the_base() -> None:
    found = plan(())
    assert found.head == Head(0, None, 0, None)
    assert found.head.converged
    assert (found.path, found.train, found.retired) == ((), (), ())
    left = held(path(FULL)[0])
    assert plan((), left).retired == (left.key,)


def test_a_shard_at_its_target_keeps_its_old_fingerprint() -> None:
    stages = [held(job) for job in path(FULL, "there")]
    found = plan(FULL, *stages, fingerprint="here")
    assert (found.train, found.retired) == ((), ())
    assert found.head == Head(0, stages[2].key, 3, stages[2].key)
    assert found.path == path(FULL, "there")


@pytest.mark.parametrize("depth", [1, 2])
def test_a_shard_that_must_train_takes_the_present_fingerprint_whole(depth: int) -> None:
    """A chain lives under one fingerprint: half of it from another machine proves nothing."""
    stages = [held(job) for job in path(FULL, "there")[:depth]]
    found = plan(FULL, *stages, fingerprint="here")
    assert found.train == path(FULL, "here")
    assert found.missing[0].parent is None
    assert found.head == Head(0, stages[-1].key, depth, path(FULL, "here")[-1].key)
    assert set(found.retired) == {each.key for each in stages[:-1]}


def test_the_present_fingerprint_comes_before_older_ones() -> None:
    here, there = ([held(job) for job in path(FULL, name)] for name in ("here", "there"))
    found = plan(FULL, *there, *here, fingerprint="here")
    assert found.path == path(FULL, "here")
    assert set(found.retired) == {each.key for each in there}


def test_a_changed_recipe_is_another_target() -> None:
    stages = [held(job) for job in path(FULL)]
    changed = replace(RECIPE, training={"learning_rate": 0.2})
    found = plan(FULL, *stages, recipe=changed)
    assert found.train == jobs(0, FULL, changed, "here")
    assert found.head.key == stages[2].key
    assert not found.head.converged


@given(st.sets(st.integers(0, 2)), st.sets(st.integers(0, 2)), st.booleans())
def test_carrying_out_a_plan_converges(old: set[int], new: set[int], grown: bool) -> None:
    """From any held set: train what it says, drop what it retires, and the next plan is empty."""
    slices = (state(0), state(1, "b" if grown else "a"), state(2))
    checkpoints = {path(FULL)[each].key: held(path(FULL)[each]) for each in old}
    checkpoints |= {path(slices)[each].key: held(path(slices)[each], 2) for each in new}
    found = plan(slices, *checkpoints.values())
    checkpoints |= {job.key: held(job, 3) for job in found.train}
    for key in plan(slices, *checkpoints.values()).retired:
        del checkpoints[key]
    final = plan(slices, *checkpoints.values())
    assert (final.train, final.retired, final.head.converged) == ((), (), True)
    assert set(checkpoints) <= {job.key for job in path(slices)}


def row(shard: int, slice_: int, seq: int) -> RecordRow:
    return RecordRow("i", None, "r", "t", "text", shard, slice_, 1, 1, seq)


@pytest.mark.parametrize(
    ("gone", "expected"),
    [
        (row(0, 0, 1), [0, 1, 2]),
        (row(0, 1, 1), [1, 2]),
        (row(0, 2, 1), [2]),
        (row(0, 1, 2), []),  # added after these were trained: it never touched them
        (row(1, 0, 1), []),
    ],
)
def test_tainted_are_those_at_or_after_the_records_slice(gone: RecordRow, expected: list[int]) -> None:
    stages = [held(job, seq=1) for job in path(FULL)]
    assert tainted_checkpoints(stages, [gone]) == tuple(stages[each].key for each in expected)


def test_record_epochs_round_a_fractional_pass_up() -> None:
    job = path(FULL)[0]
    assert record_epochs(replace(job, passes=(3, 2), num_records=3)) == math.ceil(4.5)
    assert record_epochs(replace(job, passes=(3, 2), num_records=4)) == 6
    assert plan(FULL).record_epochs == sum(record_epochs(each) for each in path(FULL))
