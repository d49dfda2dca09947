"""Prefill: the prompts of many requests, run through the base piece by piece into one cache.

A forward over all rows of many requests is slower than several smaller ones, since its intermediate
results do not fit into the processor's caches. Decoding one token of each row is fastest with all of
them. The resulting cache equals that of one forward, up to float rounding. Caches without keys and
values (state-space layers) are not supported.

Shapes: Q requests, P rows (in the order of `stacked_adapters.py`), T positions, V words.
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
    """Return the last position's logits [P, V] and the cache; prompts are padded on the left."""
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


def decode_next(base: Any, ids_P: Tensor, mask_PT: Tensor, cache: Any) -> Tensor:
    """Return the logits [P, V] after one more token of each row; the mask includes that token."""
    logits_P1V: Tensor = base(
        input_ids=ids_P[:, None],
        attention_mask=mask_PT,
        position_ids=(mask_PT.cumsum(-1) - 1)[:, -1:],
        past_key_values=cache,
        use_cache=True,
    ).logits
    return logits_P1V[:, -1]


def pieces(
    routes: Sequence[Sequence[int]], num_positions: int, most: int | None = None
) -> Iterator[tuple[int, int]]:
    """Yield the start and the end of each piece of the requests.

    Rows have `num_positions` each; the base alone counts as a row. A piece has at most `most` positions
    in all (None: `POSITIONS`), or one request.

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
    """Return, for each row of all requests, its index among the pieces' rows."""
    order, of, before = [0] * len(whole.requests), iter(whole.of), 0
    for part in parts:
        places = range(before, before + len(part.requests))
        for own in part.of:
            order[next(of)] = places[own]
        before = places.stop
    return torch.tensor(order)


def _joined(caches: Sequence[Any], order_P: Tensor) -> Any:
    """Return one cache of all pieces; layers below the adapters hold one row per request, in order."""
    for layer, *others in zip(*(cache.layers for cache in caches), strict=True):
        for name in ("keys", "values"):
            held = torch.cat([getattr(each, name) for each in (layer, *others)])
            setattr(layer, name, held[order_P] if len(held) == len(order_P) else held)
    return caches[0]
