"""The orders in which a shard's slices are trained: order 0 is what counts, the others serve meanwhile.

    rotations   cyclic rotations of the slices that start as far apart as they can
    matched     for given risks: who is likely to go stands late in some order, chosen by matching

Rules: pure, and of the run file alone. Order 0 is always the slices as they are numbered, and only its
last stage is ever a shard's target. Of appended slices each order arranges every generation as it
arranges the first, and generations follow one another. A deletion from slice s leaves of each order the
prefix before s: the deepest of them all serves until order 0 is trained again.

`matched` is exact for one deletion: it maximises the expected number of slices that still serve, the
sum over slices of risk x the latest place that any order gives it. Each slice needs one late place in
one order, so that this is an assignment of slices to places. What is left of each order is filled up by
risk, the least first; equals are rotated, so that orders differ where nothing else decides.

Not covered: jobs (`plan.py`); how long that lasts (`serving.py`).

>>> rotations(6, 3)
((0, 1, 2, 3, 4, 5), (2, 3, 4, 5, 0, 1), (4, 5, 0, 1, 2, 3))
>>> arranged([0, 1, 2, 3, 4, 5], (2, 0, 1))
[2, 0, 1, 5, 3, 4]
>>> matched((5.0, 1.0, 1.0), 2)
((0, 1, 2), (1, 2, 0))

Source: S3T, Chowdhury et al., ICLR 2025 (arXiv 2406.16257), section 3: cyclic rotations, and orders
for known risks by bipartite matching. Theirs matches place by place; ours all places at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from sisa.planning.bands import Bands

Order = tuple[int, ...]
MAX_MATCHED = 1_000  # slices of a shard: matching takes the third power of them


def chosen_orders(num_slices: int, num_orders: int, bands: Bands | None) -> tuple[Order, ...]:
    """The orders of a run file: matched to the risks of its bands, or else rotations."""
    if bands is None:
        return rotations(num_slices, num_orders)
    return matched(bands.slice_risks(num_slices), num_orders)


def rotations(num_slices: int, num_orders: int) -> tuple[Order, ...]:
    """`num_orders` cyclic rotations of the slices, at most one for each slice; order 0 first."""
    starts = (order * num_slices // num_orders for order in range(num_orders))
    return tuple(tuple((start + n) % num_slices for n in range(num_slices)) for start in starts)


def matched(risks: Sequence[float], num_orders: int) -> tuple[Order, ...]:
    """As many orders for slices of given risks of being hit; order 0 first, as the slices are
    numbered."""
    num_slices, others = len(risks), num_orders - 1
    plain = tuple(range(num_slices))
    if not others:
        return (plain,)
    fixed: list[dict[int, int]] = [{} for _ in range(others)]  # of each order: place -> slice
    for slice_, place, order in _late_places(risks, others):
        fixed[order][place] = slice_
    found = [plain]
    for number, places in enumerate(fixed, start=1):
        start = number * num_slices // num_orders
        rest = [each for each in plain if each not in places.values()]
        rest.sort(key=lambda each, start=start: (risks[each], (each - start) % num_slices))  # type: ignore[misc]
        filling = iter(rest)
        found.append(tuple(places[p] if p in places else next(filling) for p in range(num_slices)))
    return tuple(found)


def _late_places(risks: Sequence[float], others: int) -> list[tuple[int, int, int]]:
    """(slice, place, order) of the slices that an order beside order 0 is to put late."""
    from scipy.optimize import linear_sum_assignment

    num_slices = len(risks)
    last = range(num_slices - -(-num_slices // others), num_slices)  # no slice needs an earlier place
    slots = [(place, order) for place in reversed(last) for order in range(others)]
    slices, places = np.arange(num_slices), np.array([place for place, _ in slots])
    depth = np.maximum(places[None, :], slices[:, None])  # order 0 serves a slice's own number anyway
    rows, columns = linear_sum_assignment(np.array(risks)[:, None] * depth, maximize=True)
    pairs = ((int(row), *slots[column]) for row, column in zip(rows, columns, strict=True))
    return [each for each in pairs if each[1] > each[0]]


def arranged(slices: Iterable[int], order: Sequence[int]) -> list[int]:
    """Slices of any generations in an order of the slices of one; no order leaves them ascending."""
    if not order:
        return sorted(slices)
    place = {slice_: at for at, slice_ in enumerate(order)}
    return sorted(slices, key=lambda each: (each // len(order), place[each % len(order)]))


def depth_after(orders: Sequence[Order], hit: Iterable[int]) -> int:
    """How many slices the deepest clean prefix has when these lost a record, nothing trained since.

    The longest prefix of an order beside order 0 is one slice short of all.

    >>> [depth_after(rotations(4, 2), [each]) for each in range(4)]
    [2, 3, 2, 3]
    >>> depth_after(rotations(4, 2), [0, 2])
    0
    """
    gone = set(hit)
    if not gone:
        return len(orders[0])
    return max(next(at for at, each in enumerate(order) if each in gone) for order in orders)
