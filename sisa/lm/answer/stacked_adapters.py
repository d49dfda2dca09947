"""Stacked adapters: the adapters of all chosen shards over one base, in a single forward.

    rows      request q asks some adapters; each pair (request, adapter) is a row
    below     layers below the first adapted one give the same for all rows of a request, so they are
              computed, and their keys and values kept, once per request
    above     base products over all rows at once; LoRA as two batched products with each row's matrices:
              y = x W + (x A[row]) B[row]. If all requests ask the same adapters, the matrices
              of each are read once for all requests, not once per row
    decode    one token of each row (`decoding`): the matrices of all adapters in use stand side by side,
              y = x W + own(x [A A' ..]) [B B' ..], where `own` sets to zero what is another adapter's

Adapters can be put in and dropped between forwards. The base's weights are never written to. Ranks are
padded with zeros to the largest one, the scale is folded into B, and the base alone is an adapter of
zeros. Results differ from those of one constituent at a time by float rounding alone. Adapters are in
float32; over a base in another dtype, each sum is rounded to it once. Dropout, and adapters on modules
before the layers, are not supported.

Shapes: Q requests, P rows, T positions, I and O features of a module, R rank, G groups of rows, X
positions of all rows of a group, V words.

    stack = StackedAdapters(base, {0: read_change(files), 3: read_change(other_files)})
    with stack.asking([[0, 3], [3]]) as rows:
        logits_PTV = base(ids_QT).logits
    logits_PTV[rows.by_request[0]]      # of the first request, adapter by adapter

>>> rows_of([[0, 3], [3]])
Rows(requests=[0, 0, 1], groups=[0, 3, 3], by_request=(slice(0, 2, 1), slice(2, 3, 1)))
>>> rows_of([[0, 3], [0, 3]])
Rows(requests=[0, 1, 0, 1], groups=[0, 3], by_request=(slice(0, 4, 2), slice(1, 4, 2)))
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from sisa.lm.base.low_rank import Factors, LowRankChange, check_fits, shape_of

_PER_REQUEST = frozenset({"hidden_states", "attention_mask", "position_ids", "position_embeddings"})


class Rows(NamedTuple):
    """The rows of a forward.

    `requests` is the request of each row. `groups` is the adapter (None: the base alone) of each group
    of rows, all of the same size: if all requests ask the same, an adapter's rows; else each single row.
    `by_request` is where each request's rows are, in the order of its adapters.
    """

    requests: list[int]
    groups: list[int | None]
    by_request: tuple[slice, ...]


def rows_of(asked: Sequence[Sequence[int]]) -> Rows:
    """Return the rows of requests, given the adapters that each asks.

    A request that asks none is one row of the base alone.
    """
    held: list[Sequence[int | None]] = [tuple(adapters) or (None,) for adapters in asked]
    if held and all(adapters == held[0] for adapters in held):
        every = range(len(held))
        by_request = tuple(slice(q, len(held) * len(held[0]), len(held)) for q in every)
        return Rows([*every] * len(held[0]), [*held[0]], by_request)
    ends = list(accumulate(map(len, held)))
    return Rows(
        [q for q, adapters in enumerate(held) for _ in adapters],
        [adapter for adapters in held for adapter in adapters],
        tuple(slice(end - len(own), end, 1) for end, own in zip(ends, held, strict=True)),
    )


class StackedLinear(nn.Module):
    """A linear module of the base, with the matrices of the adapters that change it."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = base
        self.held: dict[int, tuple[Tensor, Tensor]] = {}  # down [R, I] and up [R, O]
        num_outputs, num_inputs = shape_of(base)
        like = torch.empty(0, device=base.weight.device)
        self._alone = like.new_zeros(0, num_inputs), like.new_zeros(0, num_outputs)
        self._groups: tuple[Tensor, Tensor] | None = None
        self._beside: tuple[Tensor, Tensor] | None = None
        self._foreign_GRX: Tensor | None = None

    def put(self, adapter: int, factors: Factors) -> None:
        """Hold the matrices of an adapter."""
        device = self.base.weight.device
        self.held[adapter] = factors.a_RI.to(device), factors.b_OR.T.contiguous().to(device)

    def rank(self, adapter: int) -> int:
        """Return the rank of an adapter, 0 if it does not change this module."""
        return len(self.held[adapter][0]) if adapter in self.held else 0

    def choose(self, groups: Sequence[int | None]) -> None:
        """Set the adapter of each group of rows; none, or no groups, leaves the base alone."""
        down_GRI, up_GRO = self._padded(groups) if groups else self._alone
        self._groups = (down_GRI, up_GRO) if down_GRI.numel() else None
        self._foreign_GRX = None

    def put_side_by_side(self, adapters: Sequence[int], rank: int) -> None:
        """Put the matrices of some adapters into one pair, each padded to `rank`."""
        down_GRI, up_GRO = self._padded([*adapters] or [None], rank)
        self._beside = down_GRI.flatten(0, 1)[None], up_GRO.flatten(0, 1)[None]

    def choose_beside(self, foreign_GRX: Tensor) -> None:
        """Set the adapters that stand side by side; `foreign_GRX` says what a row is not given."""
        self._groups, self._foreign_GRX = self._beside, foreign_GRX

    def _padded(self, adapters: Sequence[int | None], rank: int = 0) -> tuple[Tensor, Tensor]:
        """Return the matrices of adapters, stacked, with zeros up to the largest rank or `rank`."""
        found = [self._alone if each is None else self.held.get(each, self._alone) for each in adapters]
        down_GRI, up_GRO = (pad_sequence([each[n] for each in found], True) for n in (0, 1))
        missing = (0, 0, 0, max(0, rank - down_GRI.shape[1]))
        return pad(down_GRI, missing), pad(up_GRO, missing)

    def forward(self, x_PTI: Tensor) -> Tensor:
        y_PTO: Tensor = self.base(x_PTI)
        if self._groups is None:
            return y_PTO
        down_GRI, up_GRO = self._groups
        x_GXI = x_PTI.reshape(len(down_GRI), -1, x_PTI.shape[-1])
        y_GXO = y_PTO.view(len(down_GRI), -1, y_PTO.shape[-1])
        # with the thin matrix on the left: faster than x A
        low_GRX = torch.bmm(down_GRI, x_GXI.mT.to(down_GRI.dtype))
        if self._foreign_GRX is not None:
            low_GRX.masked_fill_(self._foreign_GRX, 0)
        if y_GXO.dtype == low_GRX.dtype:
            y_GXO.baddbmm_(low_GRX.mT, up_GRO)  # in place: nobody else holds the base's output
            return y_PTO
        return torch.baddbmm(y_GXO.to(low_GRX.dtype), low_GRX.mT, up_GRO).to(y_PTO.dtype).view_as(y_PTO)


class StackedAdapters:
    """Numbered adapters on a base, whose modules are the caller's own and are replaced."""

    def __init__(self, base: Any, adapters: Mapping[int, LowRankChange]) -> None:
        """Stack adapters over a base. Raise IntegrityError if an adapter does not fit the base."""
        self._base, self._device = base, next(base.parameters()).device
        self._linears: dict[str, StackedLinear] = {}
        self._hooks: list[Any] = []
        self._requests_P: Tensor | None = None
        self._beside: list[int] = []  # adapters that stand side by side
        self._rank = 0
        self.num_shared = 0  # layers below the first adapted one
        for adapter, change in sorted(adapters.items()):
            self.put(adapter, change)

    @property
    def linears(self) -> Collection[StackedLinear]:
        """Return the modules that an adapter changes."""
        return self._linears.values()

    def put(self, adapter: int, change: LowRankChange) -> None:
        """Hold an adapter under a new number. Raise IntegrityError if it does not fit the base."""
        modules = dict(self._base.named_modules())
        modules |= {name: each.base for name, each in self._linears.items()}
        check_fits(modules, change)
        for module, factors in change.items():
            if module not in self._linears:
                self._linears[module] = StackedLinear(modules[module])
                self._base.set_submodule(module, self._linears[module])
            self._linears[module].put(adapter, factors)
        self._expand_above()

    def drop(self, adapter: int) -> None:
        """Forget an adapter; a number that is not held is ignored."""
        for each in self.linears:
            each.held.pop(adapter, None)
        if adapter in self._beside:
            self._put_side_by_side([each for each in self._beside if each != adapter])

    @contextmanager
    def asking(self, asked: Sequence[Sequence[int]]) -> Iterator[Rows]:
        """Run the base's forwards with the adapters that each request asks; yield the outputs' rows."""
        rows = rows_of(asked)
        with self._expanding(rows.requests, len(asked)):
            for each in self.linears:
                each.choose(rows.groups)
            yield rows

    @contextmanager
    def decoding(self, asked: Sequence[Sequence[int]]) -> Iterator[None]:
        """Run forwards of one token per row; the rows of a request follow one another.

        The adapters of one call stay side by side for the next ones, unless most are not used.
        """
        adapters = [adapter for own in asked for adapter in own or (None,)]
        requests = [request for request, own in enumerate(asked) for _ in own or (None,)]
        used = [each for each in dict.fromkeys(adapters) if each is not None]
        if not set(used).issubset(self._beside) or len(self._beside) > 2 * len(used):
            self._put_side_by_side(used)
        foreign_PG = torch.tensor([[each != own for each in self._beside] for own in adapters]).bool()
        foreign_1RX = foreign_PG.T.repeat_interleave(self._rank, 0)[None].to(self._device)
        with self._expanding(requests, len(asked)):
            for each in self.linears if used else ():
                each.choose_beside(foreign_1RX)
            yield

    def _put_side_by_side(self, adapters: list[int]) -> None:
        ranks = [each.rank(adapter) for each in self.linears for adapter in adapters]
        self._beside, self._rank = adapters, max(ranks, default=0)
        for each in self.linears:
            each.put_side_by_side(adapters, self._rank)

    @contextmanager
    def _expanding(self, requests: Sequence[int], num_requests: int) -> Iterator[None]:
        self._requests_P = torch.tensor(requests, device=self._device)
        self._num_requests = num_requests
        try:
            yield
        finally:
            self._requests_P = None
            for each in self.linears:
                each.choose(())

    def _expand_above(self) -> None:
        """Expand requests to rows from the first adapted layer on."""
        for hook in self._hooks:
            hook.remove()
        layers, self.num_shared = _layers_above(self._base, set(self._linears))
        self._hooks = [each.register_forward_pre_hook(self._expand, with_kwargs=True) for each in layers]

    def _expand(self, _layer: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Expand a layer's inputs from one row per request to one row per constituent."""
        rows = self._requests_P
        if rows is None or len(rows) == self._num_requests:
            return args, kwargs
        wide = {name: self._widened(each, rows) for name, each in kwargs.items() if name in _PER_REQUEST}
        return tuple(self._widened(each, rows) for each in args), kwargs | wide

    def _widened(self, value: Any, rows_P: Tensor) -> Any:
        if isinstance(value, tuple):
            return tuple(self._widened(each, rows_P) for each in value)
        narrow = isinstance(value, Tensor) and value.dim() > 1 and len(value) == self._num_requests
        return value[rows_P] if narrow else value


def _layers_above(base: Any, modules: set[str]) -> tuple[list[Any], int]:
    """Return the layers from the first adapted one on, and how many there are below.

    Return all layers if a module outside of them is adapted.
    """
    lists = {name: each for name, each in base.named_modules() if isinstance(each, nn.ModuleList)}
    inside = {
        name: [m.removeprefix(f"{name}.") for m in modules if m.startswith(f"{name}.")] for name in lists
    }
    name = max(lists, key=lambda each: (len(inside[each]), -len(each)), default="")
    if not modules or not lists or not inside[name]:
        return [], 0
    first = min(int(module.partition(".")[0]) for module in inside[name])
    first = first if len(inside[name]) == len(modules) else 0
    return list(lists[name])[first:], first
