"""Orders in which a shard's slices are trained: order 0 is the target, the others serve meanwhile.

    rotations   cyclic rotations of the slices that start as far apart as possible
    matched     for given risks: slices that are likely to be hit stand late in some order, by matching

Order 0 always has the slices as they are numbered, and only its last stage is ever a shard's target.
Each order arranges the appended slices of every generation as it arranges the first generation, and
generations follow one another. After a deletion from slice s, the prefix before s of each order is
clean; the deepest of them serves until order 0 is trained again.

`matched` is exact for one deletion: it maximises the expected number of slices that still serve, the sum
over slices of risk x the latest position in any order. Each slice needs one late position in one order,
so this is an assignment problem. The rest of each order is filled by ascending risk; equal risks are
rotated, so that orders differ when nothing else decides.

>>> rotations(6, 3)
((0, 1, 2, 3, 4, 5), (2, 3, 4, 5, 0, 1), (4, 5, 0, 1, 2, 3))
>>> arranged([0, 1, 2, 3, 4, 5], (2, 0, 1))
[2, 0, 1, 5, 3, 4]
>>> matched((5.0, 1.0, 1.0), 2)
((0, 1, 2), (1, 2, 0))

Source: S3T, Chowdhury et al., ICLR 2025 (arXiv 2406.16257), section 3: cyclic rotations, and orders for
known risks by bipartite matching. S3T matches position by position; this module all positions at once.
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
    """Return `num_orders` orders for slices with given risks of being hit; order 0 first."""
    num_slices, others = len(risks), num_orders - 1
    plain = tuple(range(num_slices))
    if not others:
        return (plain,)
    fixed: list[dict[int, int]] = [{} for _ in range(others)]  # of each order: position -> slice
    for slice_, position, order in _late_positions(risks, others):
        fixed[order][position] = slice_
    found = [plain]
    for number, positions in enumerate(fixed, start=1):
        start = number * num_slices // num_orders
        rest = [each for each in plain if each not in positions.values()]
        rest.sort(key=lambda each, start=start: (risks[each], (each - start) % num_slices))  # type: ignore[misc]
        filling = iter(rest)
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
    """Return slices of any generations in an order of one generation's slices.

    Without an order, they ascend.
    """
    if not order:
        return sorted(slices)
    position = {slice_: at for at, slice_ in enumerate(order)}
    return sorted(slices, key=lambda each: (each // len(order), position[each % len(order)]))


def depth_after(orders: Sequence[Order], hit: Iterable[int]) -> int:
    """Return the depth of the deepest clean prefix after these slices lost a record.

    The longest prefix of an order other than order 0 is one slice short of all.

    >>> [depth_after(rotations(4, 2), [each]) for each in range(4)]
    [2, 3, 2, 3]
    >>> depth_after(rotations(4, 2), [0, 2])
    0
    """
    gone = set(hit)
    if not gone:
        return len(orders[0])
    return max(next(at for at, each in enumerate(order) if each in gone) for order in orders)
