"""Steps are a pure function of the stage's records: right counts, right sizes, no arrival order."""

from __future__ import annotations

from collections import Counter
from itertools import chain

from hypothesis import given
from hypothesis import strategies as st

from sisa.core.domain import SliceJob, record_epochs
from sisa.lm.train.steps import stage_steps

RECORDS = st.dictionaries(st.text("0123456789abcdef", min_size=4, max_size=8), st.integers(1, 99))
PASSES = st.tuples(st.integers(1, 12), st.integers(1, 6))
Steps = list[list[list[str]]]


def steps_by_name(
    records: dict[str, int],
    passes: tuple[int, int],
    size: int,
    per_step: int = 1,
    seed: int = 0,
    slice_: int = 0,
) -> Steps:
    names = list(records)
    training = {"micro_batch_size": size, "gradient_accumulation_steps": per_step, "seed": seed}
    job = SliceJob(3, slice_, None, (), len(records), passes, training, "base", "fp")
    found = stage_steps(job, names, [records[name] for name in names])
    return [[[names[index] for index in batch] for batch in step] for step in found]


def presented(steps: Steps) -> list[str]:
    return [name for step in steps for batch in step for name in batch]


@given(RECORDS, PASSES, st.integers(1, 5), st.integers(1, 3))
def test_presents_what_the_job_counts(
    records: dict[str, int], passes: tuple[int, int], size: int, per_step: int
) -> None:
    found = steps_by_name(records, passes, size, per_step)
    job = SliceJob(3, 0, None, (), len(records), passes, {}, "base", "fp")
    times = Counter(presented(found))
    assert sum(times.values()) == record_epochs(job)
    assert all(passes[0] // passes[1] <= times[name] <= -(-passes[0] // passes[1]) for name in records)
    for step in found:
        together = [*chain.from_iterable(step)]
        assert len(set(together)) == len(together)
        assert 1 <= len(step) <= per_step
        assert all(len(batch) == size for batch in step[:-1])
        assert 1 <= len(step[-1]) <= size


@given(RECORDS, PASSES, st.integers(1, 5), st.randoms())
def test_arrival_order_is_irrelevant(
    records: dict[str, int], passes: tuple[int, int], size: int, random: object
) -> None:
    names = list(records)
    random.shuffle(names)  # type: ignore[attr-defined]
    shuffled = {name: records[name] for name in names}
    assert steps_by_name(records, passes, size) == steps_by_name(shuffled, passes, size)


def test_order_differs_by_pass_seed_and_slice() -> None:
    records = {f"{number:04x}": 1 for number in range(50)}
    twice = presented(steps_by_name(records, (2, 1), 1))
    assert twice[:50] != twice[50:]
    assert presented(steps_by_name(records, (1, 1), 1)) == twice[:50]
    assert presented(steps_by_name(records, (1, 1), 1, seed=1)) != twice[:50]
    assert presented(steps_by_name(records, (1, 1), 1, slice_=1)) != twice[:50]


def test_a_fractional_pass_is_a_prefix() -> None:
    records = {f"{number:04x}": 1 for number in range(10)}
    assert steps_by_name(records, (1, 3), 1) != []
    part = set(presented(steps_by_name(records, (1, 3), 1)))
    longer = set(presented(steps_by_name(records, (1, 2), 1)))
    assert len(part) == 4
    assert part < longer


@given(RECORDS, st.integers(1, 5), st.integers(1, 4))
def test_length_chooses_micro_batches_and_no_step(
    records: dict[str, int], size: int, per_step: int
) -> None:
    """Steps hold the same records whatever their lengths; within a step they go up in length."""
    alike = dict.fromkeys(records, 1)
    by_length = steps_by_name(records, (2, 1), size, per_step)
    without = steps_by_name(alike, (2, 1), size, per_step)
    assert [{*chain(*step)} for step in by_length] == [{*chain(*step)} for step in without]
    for step in by_length:
        lengths = [records[name] for name in chain(*step)]
        assert lengths == sorted(lengths)
