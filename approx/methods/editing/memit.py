"""MEMIT: all facts at once, spread over the last MLP matrices of several layers.

    D = R K^T (moment_weight C + K K^T)^-1

the minimum over D of |D K - R|^2 + moment_weight tr(D C D^T). K are the keys of the facts and R what is
still missing of their values at the highest of the layers, divided by the number of layers left; layers
are written from the lowest up, and keys and what is missing are measured again in between.

Values, keys and C are those of `rome`, with d found at the highest layer. `moment_weight` counts in
tokens: how many tokens of other texts weigh as much as one fact. A larger one changes less and forgets
less.

Source: Meng et al. 2023, "Mass-editing memory in a transformer" (arXiv 2210.07229), sections 4.2 and
4.3; code `memit/memit_main.py`. Its GPT-J configuration has a weight of 15000 and 6 of 28 layers. On a
tiny base that knew three answers by heart (NLL 0.03), 15000 raises their NLL to 1.4, 1000 to 4.9 and 1
to 5.5, and none of them changes what is to be kept (0.0334). In a patch the weight is 100, found on
RWKU's people and confirmed on TOFU's authors (`tests/bench/patches/README.md`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from approx.methods.editing.edit import Edit
from approx.methods.editing.edit_run import Editing
from approx.unlearning.value_checks import whole_numbers
from sisa.core.errors import Problem
from sisa.lm.base.low_rank import Factors


def least_squares_update(
    keys_NI: Tensor, changes_NO: Tensor, moment_II: Tensor, weight: float
) -> Factors:
    """Return the update whose change of the keys' values is closest to `changes_NO`.

    >>> keys, changes = torch.tensor([[2.0, 0.0]]), torch.tensor([[4.0]])
    >>> a_RI, b_OR = least_squares_update(keys, changes, torch.eye(2), weight=4.0)
    >>> (b_OR @ a_RI).tolist()
    [[1.0, 0.0]]
    """
    keys_NI = keys_NI.double()
    system_II = weight * moment_II.double() + keys_NI.T @ keys_NI
    return Factors(torch.linalg.solve(system_II, keys_NI.T).T, changes_NO.double().T)


@dataclass(frozen=True)
class Memit(Edit):
    """MEMIT in `num_layers` layers up to `layer`."""

    num_layers: int = 3
    moment_weight: float = 1000.0
    name: ClassVar[str] = "memit"
    paper: ClassVar[str] = "Meng et al. 2023, Mass-editing memory in a transformer"
    in_a_patch: ClassVar[Mapping[str, Any]] = {"moment_weight": 100.0}
    positive: ClassVar[tuple[str, ...]] = (*Edit.positive, "moment_weight")

    def problems(self) -> Iterator[Problem]:
        """Yield a problem for each value for which the edit is not defined."""
        yield from super().problems()
        yield from whole_numbers(1, num_layers=self.num_layers)

    def edits(self, editing: Editing) -> Iterator[int]:
        """Write all facts into one layer after another."""
        facts, matrices = editing.facts, editing.matrices
        moments, top = [editing.moment(each) for each in matrices], matrices[-1].layer
        wanted_NO = editing.states(top, facts) + editing.changes(top, facts)
        for left, edited, moment_II in zip(range(len(matrices), 0, -1), matrices, moments, strict=True):
            missing_NO = (wanted_NO - editing.states(top, facts)) / left
            keys_NI = editing.keys(edited, facts)
            edited.write(least_squares_update(keys_NI, missing_NO, moment_II, self.moment_weight), 0)
        yield len(facts.positions)
