"""Greedy answers to many requests: prompts are read piece by piece into one cache, and continued.

A forward over all rows of many requests is slower than several smaller ones, since its intermediate
results do not fit into the processor's caches. Decoding one token of each row is fastest with all of
them; the rows of answers that have ended are dropped. The cache equals that of one forward, up to float
rounding. Caches without keys and values (state-space layers) are not supported.

Shapes: Q requests, P rows (in the order of `stacked_adapters.py`), T positions, V words.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sisa.lm.answer.stacked_adapters import Rows, StackedAdapters, rows_of

POSITIONS = 1600  # of rows, in a forward
DROPPED_BELOW = 0.8  # share of requests that go on; dropping the rows of the others copies the cache

Pick = Callable[[Tensor, Sequence[int], Rows], list[int]]  # of logits [P, V], requests and their rows


def continue_all(
    base: Any,
    stack: StackedAdapters,
    asked: Sequence[Sequence[int]],
    prompts: Sequence[Sequence[int]],
    pick: Pick,
    ends: Collection[int],
    max_new_tokens: int,
) -> list[list[int]]:
    """Return what `pick` appends to each prompt, token by token, without the end token.

    `asked` are the adapters that each request asks, here and below.
    """
    ids_QT, mask_QT = padded(prompts, base.device)
    answers: list[list[int]] = [[] for _ in asked]
    logits_PV, cache = prefill(base, stack, asked, ids_QT, mask_QT)
    held = going = list(range(len(asked)))
    with ExitStack() as scope:
        rows = scope.enter_context(stack.asking(asked))
        for step in range(1, max_new_tokens + 1):
            picked = dict(zip(held, pick(logits_PV, held, rows), strict=True))
            going = [each for each in going if picked[each] not in ends]
            for each in going:
                answers[each].append(picked[each])
            if not going or step == max_new_tokens:
                break
            if len(going) < DROPPED_BELOW * len(held):
                scope.close()
                places, before = [held.index(each) for each in going], rows
                rows = scope.enter_context(stack.asking([asked[each] for each in going]))
                _drop(cache, places, before, rows)
                mask_QT, held = mask_QT[places], going
            mask_QT = torch.cat([mask_QT, torch.ones_like(mask_QT[:, :1])], dim=1)
            ids_Q = torch.tensor([picked[each] for each in held], device=mask_QT.device)
            logits_PV = decode_next(base, ids_Q, mask_QT, cache)
    return answers


def _drop(cache: Any, places: Sequence[int], before: Rows, after: Rows) -> None:
    """Keep the requests at these places of a cache, in the order of the rows after it."""
    order_P = torch.empty(len(after.requests), dtype=torch.long)
    for own, place in zip(after.by_request, places, strict=True):
        order_P[own] = torch.arange(len(before.requests))[before.by_request[place]]
    for layer in cache.layers:
        kept = order_P if len(layer.keys) == len(before.requests) else torch.tensor(places)
        layer.keys, layer.values = layer.keys[kept], layer.values[kept]


def padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the ids of prompts, padded on the left, and their mask.

    >>> padded([[5, 6], [7]], torch.device("cpu"))
    (tensor([[5, 6],
            [0, 7]]), tensor([[1, 1],
            [0, 1]]))
    """
    ids = [torch.tensor(each, device=device) for each in prompts]
    mask_QT = pad_sequence([torch.ones_like(each) for each in ids], True, 0, "left")
    return pad_sequence(ids, True, 0, "left"), mask_QT


def prefill(
    base: Any, stack: StackedAdapters, asked: Sequence[Sequence[int]], ids_QT: Tensor, mask_QT: Tensor
) -> tuple[Tensor, Any]:
    """Return the last position's logits [P, V] and the cache; prompts are padded on the left."""
    read = []
    for start, end in pieces(asked, ids_QT.shape[1]):
        mask = mask_QT[start:end]
        with stack.asking(asked[start:end]) as rows:
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
    order_P = _order(rows_of(asked), [rows for _, _, rows in read])
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
    asked: Sequence[Sequence[int]], num_positions: int, most: int | None = None
) -> Iterator[tuple[int, int]]:
    """Yield the start and the end of each piece of the requests.

    Rows have `num_positions` each; the base alone counts as a row. A piece has at most `most` positions
    in all (None: `POSITIONS`), or one request.

    >>> list(pieces([[0, 1]] * 5, num_positions=300))
    [(0, 2), (2, 4), (4, 5)]
    """
    most = POSITIONS if most is None else most
    start = held = 0
    for at, adapters in enumerate(asked):
        more = max(1, len(adapters)) * num_positions
        if at > start and held + more > most:
            yield start, at
            start, held = at, 0
        held += more
    if asked:
        yield start, len(asked)


def _order(whole: Rows, parts: Sequence[Rows]) -> Tensor:
    """Return, for each row of all requests, its index among the pieces' rows."""
    order, rows, before = [0] * len(whole.requests), iter(whole.by_request), 0
    for part in parts:
        places = range(before, before + len(part.requests))
        for own in part.by_request:
            order[next(rows)] = places[own]
        before = places.stop
    return torch.tensor(order)


def _joined(caches: Sequence[Any], order_P: Tensor) -> Any:
    """Return one cache of all pieces; layers below the adapters hold one row per request, in order."""
    for layer, *others in zip(*(cache.layers for cache in caches), strict=True):
        for name in ("keys", "values"):
            held = torch.cat([getattr(each, name) for each in (layer, *others)])
            setattr(layer, name, held[order_P] if len(held) == len(order_P) else held)
    return caches[0]
