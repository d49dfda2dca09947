"""What ROME and MEMIT share: keys, values and the update of one matrix by least squares.

Shapes: I inputs and O outputs of a layer's last MLP matrix W, N facts. A key is the input of W at the
last token of a fact's subject, a value its output there.

Both updates are low-rank, so a patch holds them exactly: `b_ON @ a_NI` is added to W. They weigh a
change by the second moment of the keys of other texts, C = E[k k^T], which says where W may be changed
at no cost for them. Texts have fewer tokens than W has inputs, so that C is singular: RIDGE times its
mean eigenvalue is added to its diagonal.

Computed in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from approx.methods.method import Alternative, Family, Method, Role, Rows, mean_nll
from approx.methods.value_checks import whole_numbers
from sisa.core.errors import Problem

RIDGE = 1e-2


def second_moment(keys_NI: Tensor) -> Tensor:
    """Return C, [I, I], of the keys of texts that an edit should leave alone."""
    keys_NI = keys_NI.double()
    moment_II = keys_NI.T @ keys_NI / len(keys_NI)
    return moment_II + RIDGE * moment_II.diagonal().mean() * torch.eye(len(moment_II)).to(moment_II)


@dataclass(frozen=True)
class Edit(Method):
    """An edit towards a refusal: how far a value may move, and in how many steps it is found."""

    layer: int | None = None
    value_steps: int = 25
    value_rate: float = 0.2
    max_value_norm: float = 4.0
    family: ClassVar[Family] = "editing"
    positive: ClassVar[tuple[str, ...]] = ("value_rate", "max_value_norm")
    always_reads: ClassVar[frozenset[Role]] = frozenset({"forget", "preferred", "retain"})
    prefers: ClassVar[Alternative] = "refusals"

    def problems(self) -> Iterator[Problem]:
        """Yield a problem for each value for which the edit is not defined."""
        yield from super().problems()
        yield from whole_numbers(1, value_steps=self.value_steps)
        yield from whole_numbers(0, **({} if self.layer is None else {"layer": self.layer}))

    def forget_term(self, rows: Mapping[Role, Rows]) -> Tensor:
        """Return the loss by which values are found."""
        return mean_nll(rows["preferred"].current_BTV, rows["preferred"].batch)
