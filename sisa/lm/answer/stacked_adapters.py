"""Stacked adapters: the adapters of all chosen shards over one base, in a single forward.

    rows      request q asks some constituents; each pair (request, constituent) is a row
    below     layers below the first adapted one give the same for all rows of a request, so they are
              computed, and their keys and values kept, once per request
    above     base products over all rows at once; LoRA as two batched products with each row's matrices:
              y = x W + (x A[row]) B[row]. If all requests have the same route, each adapter's matrices
              are read once for all requests, not once per row

The base's weights are never written to. Ranks are padded with zeros to the largest one, the scale is
folded into B, and the base alone is an adapter of zeros. Results differ from those of one constituent at
a time by float rounding alone. Adapters are in float32; over a base in another dtype, each sum is
rounded to it once. Dropout, and adapters on modules before the layers, are not supported.

Shapes: Q requests, P rows, T positions, I and O features of a module, R rank, N adapters, G groups of
rows with one adapter, V words.

    stack = StackedAdapters(base, {0: read_change(files), 3: read_change(other_files)})
    with stack.asking([[0, 3], [3]]) as rows:
        logits_PTV = base(ids_QT).logits
    logits_PTV[rows.of[0]]      # of the first request, constituent by constituent

>>> rows_of([[0, 3], [3]])
Rows(requests=[0, 0, 1], groups=[0, 3, 3], of=(slice(0, 2, 1), slice(2, 3, 1)))
>>> rows_of([[0, 3], [0, 3]])
Rows(requests=[0, 1, 0, 1], groups=[0, 3], of=(slice(0, 4, 2), slice(1, 4, 2)))
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sisa.core.errors import IntegrityError
from sisa.lm.base.adapter import ADAPTER_FILE
from sisa.lm.base.low_rank import Factors, LowRankChange, shape_of

_PER_REQUEST = frozenset({"hidden_states", "attention_mask", "position_ids", "position_embeddings"})


class Rows(NamedTuple):
    """The rows of a forward.

    `requests` is the request of each row. `groups` is the constituent (None: the base alone) of each
    group of rows, all of the same size: if all requests have one route, a constituent's rows; else each
    single row. `of` is where each request's rows are, in the order of its route.
    """

    requests: list[int]
    groups: list[int | None]
    of: tuple[slice, ...]


def rows_of(routes: Sequence[Sequence[int]]) -> Rows:
    """Return the rows of some routes; an empty route is one row of the base alone."""
    asked: list[Sequence[int | None]] = [tuple(route) or (None,) for route in routes]
    if asked and all(route == asked[0] for route in asked):
        every = range(len(asked))
        of = tuple(slice(q, len(asked) * len(asked[0]), len(asked)) for q in every)
        return Rows([*every] * len(asked[0]), [*asked[0]], of)
    ends = list(accumulate(map(len, asked)))
    return Rows(
        [q for q, route in enumerate(asked) for _ in route],
        [name for route in asked for name in route],
        tuple(slice(end - len(route), end, 1) for end, route in zip(ends, asked, strict=True)),
    )


class StackedLinear(nn.Module):
    """A linear module of the base, with the matrices of all adapters."""

    def __init__(self, base: Any, down_NRI: Tensor, up_NRO: Tensor) -> None:
        super().__init__()
        self.base = base
        self._all = (down_NRI, up_NRO)
        self._groups: tuple[Tensor, Tensor] | None = None

    def choose(self, adapters_G: Tensor | None) -> None:
        """Set the adapter of each group of rows; None leaves the base alone."""
        down, up = self._all
        self._groups = None if adapters_G is None else (down[adapters_G], up[adapters_G])

    def forward(self, x_PTI: Tensor) -> Tensor:
        y_PTO: Tensor = self.base(x_PTI)
        if self._groups is None:
            return y_PTO
        down_GRI, up_GRO = self._groups
        x_GXI = x_PTI.reshape(len(down_GRI), -1, x_PTI.shape[-1])
        y_GXO = y_PTO.view(len(down_GRI), -1, y_PTO.shape[-1])
        # with the thin matrix on the left: faster than x A
        low_GRX = torch.bmm(down_GRI, x_GXI.mT.to(down_GRI.dtype))
        if y_GXO.dtype == low_GRX.dtype:
            y_GXO.baddbmm_(low_GRX.mT, up_GRO)  # in place: nobody else holds the base's output
            return y_PTO
        return torch.baddbmm(y_GXO.to(low_GRX.dtype), low_GRX.mT, up_GRO).to(y_PTO.dtype).view_as(y_PTO)


class StackedAdapters:
    """Adapters by name (shard) on a base, whose modules are the caller's own and are replaced."""

    def __init__(self, base: Any, adapters: Mapping[int, LowRankChange]) -> None:
        """Stack adapters over a base. Raise IntegrityError if an adapter does not fit the base."""
        self._places = {name: number for number, name in enumerate(sorted(adapters))}
        changes = [adapters[name] for name in self._places]
        adapted = {module for each in changes for module in each}
        modules = dict(base.named_modules())
        self._linears = [
            _put_stacked(base, module, modules.get(module), [each.get(module) for each in changes])
            for module in sorted(adapted)
        ]
        for layer in _layers_above(base, adapted):
            layer.register_forward_pre_hook(self._expand, with_kwargs=True)
        self._requests_P: Tensor | None = None
        self._device = next(base.parameters()).device

    @contextmanager
    def asking(self, routes: Sequence[Sequence[int]]) -> Iterator[Rows]:
        """Run the base's forwards with the adapters of these routes; yield their outputs' rows."""
        rows = rows_of(routes)
        self._requests_P = torch.tensor(rows.requests, device=self._device)
        self._num_requests = len(routes)
        alone = len(self._places)  # the adapter of zeros
        chosen = [alone if name is None else self._places[name] for name in rows.groups]
        chosen_G = torch.tensor(chosen, device=self._device)
        try:
            for each in self._linears:
                each.choose(chosen_G)
            yield rows
        finally:
            self._requests_P = None
            for each in self._linears:
                each.choose(None)

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


def _put_stacked(base: Any, module: str, held: Any, parts: Sequence[Factors | None]) -> StackedLinear:
    """Replace one module of the base; the last adapter is zero and stands for the base alone."""
    shape = shape_of(held)
    if not shape:
        raise _unfit("matrices of a module that the base does not have, or that is not linear")
    num_outputs, num_inputs = shape
    rank = max(len(each.a_RI) for each in parts if each is not None)
    down = torch.zeros(len(parts) + 1, rank, num_inputs, device=held.weight.device)
    up = torch.zeros(len(parts) + 1, rank, num_outputs, device=held.weight.device)
    for number, part in enumerate(parts):
        if part is not None:
            if (part.b_OR.shape[0], part.a_RI.shape[1]) != shape:
                raise _unfit("matrices of another shape")
            down[number, : len(part.a_RI)] = part.a_RI
            up[number, : len(part.a_RI)] = part.b_OR.T
    stacked = StackedLinear(held, down, up)
    base.set_submodule(module, stacked)
    return stacked


def _unfit(got: str) -> IntegrityError:
    return IntegrityError(
        "an adapter does not fit the base model",
        where=ADAPTER_FILE,
        got=got,
        next_step="run `sisa verify` on the model",
    )


def _layers_above(base: Any, modules: set[str]) -> list[Any]:
    """Return the layers from the first adapted one on; all of them if a module outside is adapted."""
    lists = {name: each for name, each in base.named_modules() if isinstance(each, nn.ModuleList)}
    inside = {
        name: [m.removeprefix(f"{name}.") for m in modules if m.startswith(f"{name}.")] for name in lists
    }
    name = max(lists, key=lambda each: (len(inside[each]), -len(each)), default="")
    if not modules or not lists or not inside[name]:
        return []
    first = min(int(module.partition(".")[0]) for module in inside[name])
    return list(lists[name])[first if len(inside[name]) == len(modules) else 0 :]
