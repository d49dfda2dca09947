"""Batches are a pure function of the stage's records: right counts, right sizes, no arrival order."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from sisa.domain import SliceJob, record_epochs
from sisa.model.batches import WINDOW_BATCHES, stage_batches

RECORDS = st.dictionaries(st.text("0123456789abcdef", min_size=4, max_size=8), st.integers(1, 99))
PASSES = st.tuples(st.integers(1, 12), st.integers(1, 6))


def batches_by_name(
    records: dict[str, int], passes: tuple[int, int], size: int, seed: int = 0, slice_: int = 0
) -> list[list[str]]:
    names = list(records)
    found = stage_batches(
        names,
        [records[name] for name in names],
        passes,
        micro_batch_size=size,
        seed=seed,
        shard=3,
        slice_=slice_,
    )
    return [[names[index] for index in batch] for batch in found]


@given(RECORDS, PASSES, st.integers(1, 5))
def test_presents_what_the_job_counts(
    records: dict[str, int], passes: tuple[int, int], size: int
) -> None:
    found = batches_by_name(records, passes, size)
    job = SliceJob(3, 0, None, (), len(records), passes, {}, "base", "fp")
    times = Counter(name for batch in found for name in batch)
    assert sum(times.values()) == record_epochs(job)
    assert all(passes[0] // passes[1] <= times[name] <= -(-passes[0] // passes[1]) for name in records)
    assert all(1 <= len(batch) <= size and len(set(batch)) == len(batch) for batch in found)


@given(RECORDS, PASSES, st.integers(1, 5), st.randoms())
def test_arrival_order_is_irrelevant(
    records: dict[str, int], passes: tuple[int, int], size: int, random: object
) -> None:
    names = list(records)
    random.shuffle(names)  # type: ignore[attr-defined]
    shuffled = {name: records[name] for name in names}
    assert batches_by_name(records, passes, size) == batches_by_name(shuffled, passes, size)


def test_order_differs_by_pass_seed_and_slice() -> None:
    records = {f"{number:04x}": 1 for number in range(50)}
    twice = batches_by_name(records, (2, 1), 1)
    assert twice[:50] != twice[50:]
    assert batches_by_name(records, (1, 1), 1) == twice[:50]
    assert batches_by_name(records, (1, 1), 1, seed=1) != twice[:50]
    assert batches_by_name(records, (1, 1), 1, slice_=1) != twice[:50]


def test_a_fractional_pass_is_a_prefix() -> None:
    records = {f"{number:04x}": 1 for number in range(10)}
    assert batches_by_name(records, (1, 3), 1) != []
    part = {name for batch in batches_by_name(records, (1, 3), 1) for name in batch}
    longer = {name for batch in batches_by_name(records, (1, 2), 1) for name in batch}
    assert len(part) == 4
    assert part < longer


def test_windows_keep_lengths_together() -> None:
    records = {f"{number:04x}": 1 + (number * 37) % 100 for number in range(WINDOW_BATCHES * 4)}
    spreads = [
        max(records[name] for name in batch) - min(records[name] for name in batch)
        for batch in batches_by_name(records, (1, 1), 4)
    ]
    assert sum(spreads) / len(spreads) < 20
