"""Order and batches of one stage: a pure function of its records, its passes and its seed.

Rules: nothing depends on the order in which records arrived, on another shard, or on how the process
got here. Each pass has its own order: by the hash of seed, shard, slice, pass and the record's keyed
digest. A fractional last pass is a prefix of its order, so that a stage presents exactly
`record_epochs(job)` records. Within windows of 32 micro-batches the records are sorted by length (less
padding), cut into micro-batches, and the batches put back into a hashed order. Micro-batches have the
size that the run file says; only the last of a pass may be smaller.

Not covered: packing several records into one row, which would tie subjects together.

>>> stage_batches(["a", "b", "c"], [5, 2, 2], (3, 2), micro_batch_size=2, seed=0, shard=0, slice_=0)
[[0], [1, 2], [2, 0]]
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

WINDOW_BATCHES = 32  # of TOFU 1% to 2% of tokens are padding then, of windows of 8 3% to 8%


def stage_batches(
    id_digests: Sequence[str],
    lengths: Sequence[int],
    passes: tuple[int, int],
    *,
    micro_batch_size: int,
    seed: int,
    shard: int,
    slice_: int,
) -> list[list[int]]:
    """Indices of records, micro-batch by micro-batch, all passes of the stage in turn.

    `passes` is an exact fraction; `lengths` are in tokens.
    """
    batches: list[list[int]] = []
    remaining = record_presentations(len(id_digests), passes)
    number = 0
    while remaining > 0:
        salt = f"{seed}|{shard}|{slice_}|{number}"
        order = sorted(range(len(id_digests)), key=lambda i: _hash(salt, id_digests[i]))
        order = order[:remaining]
        batches.extend(_pass_batches(order, id_digests, lengths, micro_batch_size, salt))
        remaining -= len(order)
        number += 1
    return batches


def record_presentations(num_records: int, passes: tuple[int, int]) -> int:
    """Records presented in all: whole passes, then a prefix of one more."""
    return -(-passes[0] * num_records // passes[1])


def _pass_batches(
    order: Sequence[int],
    id_digests: Sequence[str],
    lengths: Sequence[int],
    micro_batch_size: int,
    salt: str,
) -> list[list[int]]:
    batches: list[list[int]] = []
    window = WINDOW_BATCHES * micro_batch_size
    for start in range(0, len(order), window):
        by_length = sorted(order[start : start + window], key=lambda i: (lengths[i], id_digests[i]))
        cut = range(0, len(by_length), micro_batch_size)
        rows = [by_length[at : at + micro_batch_size] for at in cut]
        rows.sort(key=lambda row: _hash(salt + "|batch", id_digests[row[0]]))
        batches.extend(rows)
    return batches


def _hash(salt: str, name: str) -> bytes:
    return hashlib.sha256(f"{salt}|{name}".encode()).digest()
