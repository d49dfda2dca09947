"""Choose which checkpoints to keep when not all fit: those that spare the most training.

A deletion that hits stage i of an order retrains from the deepest kept stage before it. Each kept stage
spares all training up to itself, for the hits between it and the next kept one. So the best choice of j
stages extends the best choice of j - 1 stages before its last one, and dynamic programming over the path
finds all of them exactly. Every split of the budget over the orders is tried, which is exact when they
share no prefix (rotations share none). The last stage of every order is always kept and takes no part
here. Stages are assumed to be of equal size.

>>> costs, hits = (1.0, 2.0, 3.0, 4.0), (0.25, 0.25, 0.25, 0.25)
>>> [kept.stages for kept in best_kept(costs, hits)]
[(), (1,), (1, 2), (0, 1, 2)]
>>> round(expected(costs, hits, ()), 3), round(expected(costs, hits, (0, 1, 2)), 3)
(10.0, 7.5)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Numbers = Sequence[float] | NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class KeptStages:
    """Kept stages of an order (numbered from 0), and the mean training that they spare."""

    spared: float
    stages: tuple[int, ...]


def best_kept(
    costs: Numbers, hits: Numbers, held: Sequence[int] | None = None, most: int | None = None
) -> list[KeptStages]:
    """Return the best choice among the `held` stages for 0, 1, ... (`most`) kept ones.

    `held` defaults to all stages but the last. `costs` are those of training each stage, `hits` the
    chances that a deletion hits its slice.
    """
    import numpy as np

    stages = [each for each in range(len(costs) - 1) if held is None or each in held]
    limit = len(stages) if most is None else min(most, len(stages))
    found = [KeptStages(0.0, ())]
    if not limit:
        return found
    upto = np.cumsum(costs)[stages]  # training that each spares
    later = np.append(np.cumsum(np.array(hits, dtype=np.float64)[::-1])[::-1], 0.0)
    after = later[np.array(stages) + 1]  # chance of a hit after each
    between = upto[:, None] * (after[:, None] - after[None, :])  # [kept, next kept]
    between[np.tril_indices(len(stages))] = -np.inf
    best, chosen = np.zeros(len(stages)), []  # best[i]: spared before stage i, the last one kept
    for number in range(limit):
        if number:
            options = best[:, None] + between
            chosen.append(options.argmax(axis=0))
            best = options.max(axis=0)
        ends = best + upto * after
        at = int(ends.argmax())
        path = [at]
        for back in reversed(chosen):
            path.append(int(back[path[-1]]))
        found.append(KeptStages(float(ends[at]), tuple(stages[each] for each in reversed(path))))
    return found


def split_budget(orders: Sequence[Sequence[KeptStages]], most: int) -> list[tuple[KeptStages, ...]]:
    """Return what to keep of each order for 0, 1, ... (`most`) stages in total.

    `orders` holds the `best_kept` of each order.
    """
    found: list[tuple[KeptStages, ...]] = [()]
    for choices in orders:
        options: list[tuple[KeptStages, ...]] = []
        for total in range(min(most, len(found) + len(choices) - 2) + 1):
            splits = range(max(0, total - len(found) + 1), min(total, len(choices) - 1) + 1)
            each = ((*found[total - number], choices[number]) for number in splits)
            options.append(max(each, key=lambda kept: sum(one.spared for one in kept)))
        found = options
    return found


def expected(costs: Numbers, hits: Numbers, kept: Sequence[int]) -> float:
    """Return the mean cost of a deletion in an order, with these stages and the last one kept."""
    import numpy as np

    upto = np.cumsum(costs)
    mean, spared = 0.0, 0.0
    for stage, hit in enumerate(hits):
        mean += hit * float(upto[-1] - spared)
        spared = upto[stage] if stage in kept else spared
    return mean
