"""Reading the prompts of many requests: piece by piece through the base, into one cache.

A forward over all rows of many requests is slower than one after another: what lies between its products
no longer fits into the processor's caches. Decoding, a token of each row, is quickest with all of them.

Rules: a piece has as many requests as come to `POSITIONS` positions of rows, and at least one. The cache
is as if all had been read in one forward, to float rounding.

Not covered: caches without keys and values (state-space layers).

    logits_PV, cache = prefill(base, stack, [[0, 3], [3]], ids_QT, mask_QT)

Shapes: Q requests, P rows (as `stacked.py` orders them), T positions, V words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sisa.lm.answer.stacked_adapters import Rows, StackedAdapters, rows_of

POSITIONS = 1600  # of rows, in a forward


def prefill(
    base: Any, stack: StackedAdapters, routes: Sequence[Sequence[int]], ids_QT: Tensor, mask_QT: Tensor
) -> tuple[Tensor, Any]:
    """Logits of the last position [P, V], and the keys and values of all; prompts are padded on the
    left."""
    read = []
    for start, end in pieces(routes, ids_QT.shape[1]):
        mask = mask_QT[start:end]
        with stack.asking(routes[start:end]) as rows:
            output = base(
                input_ids=ids_QT[start:end],
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                use_cache=True,
                logits_to_keep=1,
            )
        read.append((output.logits[:, -1], output.past_key_values, rows))
    if len(read) == 1:
        return read[0][:2]
    order_P = _order(rows_of(routes), [rows for _, _, rows in read])
    logits_PV = torch.cat([logits for logits, _, _ in read])[order_P]
    return logits_PV, _joined([cache for _, cache, _ in read], order_P)


def pieces(
    routes: Sequence[Sequence[int]], num_positions: int, most: int | None = None
) -> Iterator[tuple[int, int]]:
    """Where each piece of the requests starts, and before which request it ends.

    Rows have `num_positions` each, the base alone is a row, too. A piece has at most `most` positions in
    all (None: `POSITIONS`), or one request.

    >>> list(pieces([[0, 1]] * 5, num_positions=300))
    [(0, 2), (2, 4), (4, 5)]
    """
    most = POSITIONS if most is None else most
    start = held = 0
    for at, route in enumerate(routes):
        more = max(1, len(route)) * num_positions
        if at > start and held + more > most:
            yield start, at
            start, held = at, 0
        held += more
    if routes:
        yield start, len(routes)


def _order(whole: Rows, parts: Sequence[Rows]) -> Tensor:
    """For each row of all requests, its place among the pieces' rows."""
    order, request, before = [0] * len(whole.requests), 0, 0
    for part in parts:
        for own in part.of:
            places = range(before, before + len(part.requests))[own]
            for row, place in zip(range(len(order))[whole.of[request]], places, strict=True):
                order[row] = place
            request += 1
        before += len(part.requests)
    return torch.tensor(order)


def _joined(caches: Sequence[Any], order_P: Tensor) -> Any:
    """One cache of all pieces. Layers beneath the adapters hold a row a request, as they came."""
    for layer, *others in zip(*(cache.layers for cache in caches), strict=True):
        for name in ("keys", "values"):
            held = torch.cat([getattr(each, name) for each in (layer, *others)])
            setattr(layer, name, held[order_P] if len(held) == len(order_P) else held)
    return caches[0]
