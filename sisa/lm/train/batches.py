"""Order, steps and batches of one stage: a pure function of its records, its passes and its seed.

Rules: nothing depends on the order in which records arrived, on another shard, or on how the process
got here. Each pass has its own order: by the hash of seed, shard, slice, pass and the record's keyed
digest. A fractional last pass is a prefix of its order, so that a stage presents exactly
`record_epochs(job)` records. A pass is cut into optimizer steps, and only its last step may be smaller.
Which records a step sees has nothing to do with their length: steps of long records alone would weigh
each of their tokens less, and were seen to end at a higher loss. Within a step the records are sorted by
length and cut into micro-batches, which reaches no sum but saves padding where there is any.

Not covered: how a micro-batch is laid out (`losses.py`).

>>> stage_steps(["a", "b", "c"], [5, 2, 2], (3, 2), micro_batch_size=2, per_step=1, seed=0, shard=0,
...             slice_=0)
[[[1, 0]], [[2]], [[2, 0]]]
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def stage_steps(
    id_digests: Sequence[str],
    lengths: Sequence[int],
    passes: tuple[int, int],
    *,
    micro_batch_size: int,
    per_step: int,
    seed: int,
    shard: int,
    slice_: int,
) -> list[list[list[int]]]:
    """Indices of records: steps of up to `per_step` micro-batches, all passes of the stage in turn.

    `passes` is an exact fraction; `lengths` are in tokens.
    """
    steps: list[list[list[int]]] = []
    remaining = record_presentations(len(id_digests), passes)
    number = 0
    while remaining > 0:
        salt = f"{seed}|{shard}|{slice_}|{number}"
        order = sorted(range(len(id_digests)), key=lambda i: _hash(salt, id_digests[i]))
        order = order[:remaining]
        for step in _cut(order, micro_batch_size * per_step):
            step.sort(key=lambda i: (lengths[i], id_digests[i]))
            steps.append(_cut(step, micro_batch_size))
        remaining -= len(order)
        number += 1
    return steps


def record_presentations(num_records: int, passes: tuple[int, int]) -> int:
    """Records presented in all: whole passes, then a prefix of one more."""
    return -(-passes[0] * num_records // passes[1])


def _cut(whole: list[int], size: int) -> list[list[int]]:
    return [whole[start : start + size] for start in range(0, len(whole), size)]


def _hash(salt: str, name: str) -> bytes:
    return hashlib.sha256(f"{salt}|{name}".encode()).digest()
