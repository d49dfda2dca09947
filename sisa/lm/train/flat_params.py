"""Parameters that are trained, with their gradients, as one tensor each: one update for all of them.

Rules: each parameter is a view of its part, in the order of names; a tall matrix rests transposed there,
as its gradient arrives. What is told by name (values, moments) has the parameter's own shape. Gradients
are added up in place; `clear` makes them zero.

Not covered: parameters of several dtypes or devices; learning rates by group.

>>> import torch
>>> layer = torch.nn.Linear(2, 3)
>>> flat = FlatParams(dict(layer.named_parameters()))
>>> layer(torch.ones(1, 2)).sum().backward()
>>> flat.values.grad.sum().item(), flat.by_name(flat.values.data)["weight"].shape
(9.0, torch.Size([3, 2]))
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class FlatParams:
    """All values in one parameter, all gradients in its gradient."""

    def __init__(self, named: Mapping[str, torch.nn.Parameter]) -> None:
        self._shapes = {name: each.shape for name, each in named.items()}
        device = next(iter(named.values())).device if named else None
        size = sum(each.numel() for each in named.values())
        self.values = torch.nn.Parameter(torch.empty(size, device=device))
        self.values.grad = torch.zeros(size, device=device)
        values, gradients = self.by_name(self.values.data), self.by_name(self.values.grad)
        for name, each in named.items():
            values[name].copy_(each.data)
            each.data, each.grad = values[name], gradients[name]

    def by_name(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of a tensor of the same size as `values`."""
        found: dict[str, Tensor] = {}
        at = 0
        for name, shape in self._shapes.items():
            part = flat[at : at + shape.numel()]
            at += shape.numel()
            tall = len(shape) == 2 and shape[0] > shape[1]
            found[name] = part.view(shape[1], shape[0]).t() if tall else part.view(shape)
        return found

    def clear(self) -> None:
        """Make all gradients zero."""
        if self.values.grad is not None:
            self.values.grad.zero_()
