"""ROME: one fact after another, a rank-one change of one layer's last MLP matrix.

    W' = W + (v* - W k*) u^T / (u^T k*),   u = C^-1 k*

so that W' k* = v*, and among all such matrices W' changes the outputs of keys with second moment C
least. v* = W k* + d, where d makes the refusal likely when it is added to the layer's output at the
key's position. It is found by `value_steps` steps of Adam, at a rate of `value_rate` times the root mean
square of the hidden state there, and is at most `max_value_norm` times as long as that state.

The key is that of the last token of the last name in the prompt, or of the prompt's last token if it
names nobody. Without a `layer` it is the one with the largest effect in causal tracing. A later fact is
edited into what the earlier ones left, and may undo some of it: `memit` writes all of them at once.

Source: Meng et al. 2022, "Locating and editing factual associations in GPT" (arXiv 2202.05262), section
3.1 and eq. 2; code `rome/compute_u.py`, `rome/compute_v.py`. There the target is another object, the key
is a mean over random prefixes, and d has a KL term on "{subject} is a". Here the target is a refusal,
the prompt has the form of the records alone, and the retain set gives C. In a patch `max_value_norm` is
1, found on RWKU's people and confirmed on TOFU's authors (`tests/bench/patches/README.md`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from approx.methods.editing.edit import Edit
from approx.methods.editing.edit_run import Editing
from sisa.lm.base.low_rank import Factors


def rank_one_update(key_I: Tensor, change_O: Tensor, moment_II: Tensor) -> Factors:
    """Return the update after which the key's value differs by `change_O`.

    >>> a_RI, b_OR = rank_one_update(torch.tensor([2.0, 0.0]), torch.tensor([4.0]), torch.eye(2))
    >>> (b_OR @ a_RI).tolist()
    [[2.0, 0.0]]
    """
    key_I = key_I.double()
    along_I = torch.linalg.solve(moment_II.double(), key_I)
    right_O = change_O.double() / (along_I @ key_I)
    return Factors(along_I.unsqueeze(0), right_O.unsqueeze(1))


@dataclass(frozen=True)
class Rome(Edit):
    """ROME in one layer."""

    name: ClassVar[str] = "rome"
    paper: ClassVar[str] = "Meng et al. 2022, Locating and editing factual associations in GPT"
    in_a_patch: ClassVar[Mapping[str, Any]] = {"max_value_norm": 1.0}

    def edits(self, editing: Editing) -> Iterator[int]:
        """Write one fact after another."""
        (edited,) = editing.matrices
        moment_II = editing.moment(edited)
        for number in range(len(editing.facts.positions)):
            fact = editing.facts.only(number)
            changes_NO = editing.changes(edited.layer, fact)
            keys_NI = editing.keys(edited, fact)
            edited.write(rank_one_update(keys_NI[0], changes_NO[0], moment_II), number)
            yield number + 1
