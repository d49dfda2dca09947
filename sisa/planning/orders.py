"""Arrange the slices of a shard in orders.

A shard's slices are trained in one or more orders. Order 0 has the slices as they are numbered, and its
last stage is the shard's target. After a deletion from slice s, the prefix before s of each order is
clean; the deepest of them serves until order 0 is trained again. Each order arranges the slices of every
generation alike, and generations follow one another.

>>> rotations(6, 3)
((0, 1, 2, 3, 4, 5), (2, 3, 4, 5, 0, 1), (4, 5, 0, 1, 2, 3))
>>> arranged([0, 1, 2, 3, 4, 5], (2, 0, 1))
[2, 0, 1, 5, 3, 4]
>>> matched((5.0, 1.0, 1.0), 2)
((0, 1, 2), (1, 2, 0))

Source: S3T, Chowdhury et al., ICLR 2025 (arXiv 2406.16257), section 3: cyclic rotations, and orders for
known risks by bipartite matching.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sisa.planning.bands import Bands

Order = tuple[int, ...]
MAX_MATCHED = 1_000  # most slices of a shard for `matched`, which takes cubic time


def chosen_orders(num_slices: int, num_orders: int, bands: Bands | None) -> tuple[Order, ...]:
    """Return the orders of a run file: matched to the risks of its bands, or else rotations."""
    if bands is None:
        return rotations(num_slices, num_orders)
    return matched(bands.slice_risks(num_slices), num_orders)


def rotations(num_slices: int, num_orders: int) -> tuple[Order, ...]:
    """Return `num_orders` cyclic rotations of the slices, at most one for each slice; order 0 first."""
    starts = (order * num_slices // num_orders for order in range(num_orders))
    return tuple(tuple((start + n) % num_slices for n in range(num_slices)) for start in starts)


def matched(risks: Sequence[float], num_orders: int) -> tuple[Order, ...]:
    """Return `num_orders` orders for slices with given risks of being hit; order 0 first.

    They maximise the expected number of slices that still serve after one deletion, the sum over slices
    of risk x the latest position in any order. Each slice needs one late position in one order, so this
    is an assignment problem. The rest of each order is filled by ascending risk; equal risks are
    rotated, so that orders differ when nothing else decides.
    """
    num_slices, others = len(risks), num_orders - 1
    plain = tuple(range(num_slices))
    found = [plain]
    fixed: list[dict[int, int]] = [{} for _ in range(others)]  # of each order: position -> slice
    for slice_, position, order in _late_positions(risks, others) if others else ():
        fixed[order][position] = slice_
    for number, positions in enumerate(fixed, start=1):
        start = number * num_slices // num_orders
        rotated = (*plain[start:], *plain[:start])
        taken = set(positions.values())
        filling = iter(sorted((s for s in rotated if s not in taken), key=lambda s: risks[s]))
        found.append(tuple(positions[p] if p in positions else next(filling) for p in range(num_slices)))
    return tuple(found)


def _late_positions(risks: Sequence[float], others: int) -> list[tuple[int, int, int]]:
    """Return (slice, position, order) for the slices that an order other than order 0 puts late."""
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    num_slices = len(risks)
    last = range(num_slices - -(-num_slices // others), num_slices)  # no slice needs an earlier position
    slots = [(position, order) for position in reversed(last) for order in range(others)]
    slices, positions = np.arange(num_slices), np.array([position for position, _ in slots])
    depth = np.maximum(positions[None, :], slices[:, None])  # order 0: each at its number
    rows, columns = linear_sum_assignment(np.array(risks)[:, None] * depth, maximize=True)
    pairs = ((int(row), *slots[column]) for row, column in zip(rows, columns, strict=True))
    return [each for each in pairs if each[1] > each[0]]


def arranged(slices: Iterable[int], order: Sequence[int]) -> list[int]:
    """Return slices of any generations in an order of one generation's slices, by default ascending."""
    if not order:
        return sorted(slices)
    position = {slice_: at for at, slice_ in enumerate(order)}
    return sorted(slices, key=lambda each: (each // len(order), position[each % len(order)]))
