"""Slots: the keys and values of running requests, in tensors that requests join and leave.

All requests end at the same column, so one step writes one column for all of them:

    request 0   . . a b c d |        start  the first column of the longest request
    request 1   . . . . e f |        end    the column that the next tokens are written to

The last request takes the place of one that leaves, whose keys and values are overwritten with zeros;
nothing else is copied if each has one row. New tensors are made when columns or rows run out. Layers
below the first adapted one have a row per request, the others a row per constituent of a request, as in
`stacked_adapters.py`. A layer that looks back only within a window keeps all columns; the base's own
mask hides the older ones.

    slots = Slots(base, stack)
    logits_PV = slots.join([[0, 3], [3]], prompts)      # the rows of new requests, one after another
    logits_PV = slots.decode([7, 9])                    # the rows of all requests, one after another
    slots.leave([0])

Shapes: Q requests, P rows, T positions, H heads, D features of a head, V words.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from sisa.lm.answer.generation import padded, prefill
from sisa.lm.answer.stacked_adapters import StackedAdapters, rows_of

SPARE_COLUMNS = 256  # of new tensors


class Slots:
    """The running requests of one base and its stacked adapters."""

    def __init__(self, base: Any, stack: StackedAdapters) -> None:
        self.end = 0
        self._base, self._stack = base, stack
        self._asked: list[Sequence[int]] = []  # the adapters of each request
        self._lengths: list[int] = []  # of each request, in tokens
        self._layers: list[SlotLayer] = []

    @property
    def start(self) -> int:
        """Return the first column in use."""
        return self.end - max(self._lengths, default=0)

    def join(self, asked: Sequence[Sequence[int]], prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read the prompts of new requests and their adapters; return their last logits [P, V]."""
        ids_QT, mask_QT = padded(prompts, self._base.device)
        logits_PV, read = prefill(self._base, self._stack, asked, ids_QT, mask_QT)
        places_Q = torch.arange(len(asked), device=logits_PV.device)
        places_P = torch.arange(len(logits_PV), device=logits_PV.device)
        order_P = torch.cat([places_P[own] for own in rows_of(asked).by_request])
        if not self._layers:
            self._layers = [SlotLayer(self, each) for each in read.layers]
        self._make_room(ids_QT.shape[1])
        for number, (layer, new) in enumerate(zip(self._layers, read.layers, strict=True)):
            shared = number < self._stack.num_shared
            layer.join(new, places_Q if shared else order_P)
        self._asked += asked
        self._lengths += map(len, prompts)
        return logits_PV[order_P]

    def decode(self, ids: Sequence[int]) -> Tensor:
        """Append a token to each request; return the logits [P, V] after it."""
        self._make_room(0)
        width = self.end - self.start
        lengths_Q1 = torch.tensor(self._lengths, device=self._base.device)[:, None]
        with self._stack.decoding(self._asked):
            logits_P1V: Tensor = self._base(
                input_ids=torch.tensor(ids, device=self._base.device)[:, None],
                attention_mask=torch.arange(width + 1, device=self._base.device) >= width - lengths_Q1,
                position_ids=lengths_Q1,
                past_key_values=Cache(layers=self._layers),
                use_cache=True,
            ).logits
        self.end += 1
        self._lengths = [each + 1 for each in self._lengths]
        return logits_P1V[:, -1]

    def leave(self, gone: Collection[int]) -> list[int]:
        """Remove requests; return the former places of those that stay, in their new order."""
        kept = _closed_up(len(self._asked), gone)
        ends = [0, *accumulate(max(1, len(adapters)) for adapters in self._asked)]
        kept_rows = [row for each in kept for row in range(ends[each], ends[each + 1])]
        for number, layer in enumerate(self._layers):
            layer.keep(kept if number < self._stack.num_shared else kept_rows)
        self._asked = [self._asked[each] for each in kept]
        self._lengths = [self._lengths[each] for each in kept]
        if not kept:
            self._layers, self.end = [], 0
        return kept

    def _make_room(self, num_columns: int) -> None:
        """Make room for a prompt of so many columns before the end, and for a token after it."""
        if self.end >= num_columns and all(self.end < layer.num_columns for layer in self._layers):
            return
        end = max(num_columns, self.end - self.start)
        for layer in self._layers:
            layer.move(end)
        self.end = end


class SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """The keys and values [rows, H, columns, D] of one layer; rows and columns not in use are zero."""

    def __init__(self, slots: Slots, like: CacheLayerMixin) -> None:
        super().__init__()
        self._slots, self._num_rows = slots, 0
        self.keys, self.values = (
            each.new_zeros(0, each.shape[1], 0, each.shape[3]) for each in (like.keys, like.values)
        )
        self.is_initialized = True

    @property
    def num_columns(self) -> int:
        """Return the number of columns that there is room for."""
        return int(self.keys.shape[2])

    def join(self, new: CacheLayerMixin, order: Tensor) -> None:
        """Append rows of a prefill, in this order, so that they end where all others do."""
        first, end = self._num_rows, self._slots.end
        self._num_rows += len(order)
        if self._num_rows > len(self.keys):
            self._make_anew(max(self._num_rows, 2 * len(self.keys)), self.num_columns, end)
        for held, added in ((self.keys, new.keys), (self.values, new.values)):
            held[first : self._num_rows, :, end - added.shape[2] : end] = added[order]

    def keep(self, kept: Sequence[int]) -> None:
        """Keep the rows at these places, in this order."""
        used = slice(self._slots.start, self._slots.end)
        moved = [to for to, at in enumerate(kept) if to != at]
        for held in (self.keys, self.values):
            if moved:
                held[moved, :, used] = held[[kept[to] for to in moved], :, used]
            held[len(kept) : self._num_rows] = 0
        self._num_rows = len(kept)

    def move(self, end: int) -> None:
        """Move all columns so that the last is before `end`, with room for more."""
        self._make_anew(len(self.keys), end + SPARE_COLUMNS, end)

    def _make_anew(self, num_rows: int, num_columns: int, end: int) -> None:
        used = slice(self._slots.start, self._slots.end)
        for name in ("keys", "values"):
            held = getattr(self, name)
            made = held.new_zeros(num_rows, held.shape[1], num_columns, held.shape[3])
            made[: len(held), :, end - (used.stop - used.start) : end] = held[:, :, used]
            setattr(self, name, made)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        """Write one column; return all columns in use, as a forward of the base asks for."""
        rows, start, end = len(key_states), self._slots.start, self._slots.end
        found = []
        for held, new in ((self.keys, key_states), (self.values, value_states)):
            held[:rows, :, end : end + 1] = new
            found.append(held[:rows, :, start : end + 1])
        return tuple(found)

    def get_seq_length(self) -> int:
        """Return the number of columns in use."""
        return self._slots.end - self._slots.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of columns that a query sees, and the first of them."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the tensors are made with the layer."""


def _closed_up(number: int, gone: Collection[int]) -> list[int]:
    """Return what stays of `number` places if the last ones fill the gaps.

    >>> _closed_up(5, [1, 3])
    [0, 4, 2]
    """
    kept = list(range(number))
    for each in sorted(gone, reverse=True):
        last = kept.pop()
        if each < len(kept):
            kept[each] = last
    return kept
