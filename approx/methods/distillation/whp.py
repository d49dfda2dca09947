"""WHP, "Who's Harry Potter": learn what a model would say that knew nothing in particular.

    v_generic = v_b - alpha * ReLU(v_r - v_b)
    label     = the likeliest word of v_generic
    F = mean over labelled positions of -log p(label)
    L = forget_weight * F + retain_weight * R(retain),   R = NLL or KL(reference || current)

v_b are the base's logits on the text with its anchor terms, here its names, replaced by invented ones.
v_r are those of a reinforced model, which was trained further on the texts, on the text itself. A word
that reinforcement makes likelier belongs to the text and not to the language. The labels are made once,
before the run: `unlearning/written/generic_labels.py`.

Labels are hard: of the generic distribution the likeliest word alone is taught. Where the generic word
is the text's own, as for most of grammar, the label keeps it.

Source: Eldan and Russinovich 2023, "Who's Harry Potter? Approximate unlearning in LLMs" (arXiv
2310.02238), sections 2.1 to 2.3; alpha 5 there, and no retain term. Their anchor terms and translations
are lists by GPT-4.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from approx.methods.idk_nll import IdkNll
from approx.methods.method import Alternative, Family


def generic_label(
    baseline_V: Tensor, reinforced_V: Tensor, alpha: float, barred: Collection[int] = ()
) -> int:
    """Return the likeliest word of the generic logits that is not barred.

    >>> baseline, reinforced = torch.tensor([3.0, 2.5, 0.0]), torch.tensor([4.0, 2.0, 0.0])
    >>> [generic_label(baseline, reinforced, alpha) for alpha in (0.25, 1.0)]
    [0, 1]
    """
    generic_V = baseline_V - alpha * (reinforced_V - baseline_V).relu()
    generic_V[list(barred)] = -torch.inf
    return int(generic_V.argmax())


@dataclass(frozen=True)
class Whp(IdkNll):
    """WHP with the weight `alpha` of what reinforcement adds, on generic labels as preferred answers."""

    alpha: float = 5.0
    retain_weight: float = 0.0
    name: ClassVar[str] = "whp"
    family: ClassVar[Family] = "distillation"
    paper: ClassVar[str] = "Eldan and Russinovich 2023, Who's Harry Potter?"
    positive: ClassVar[tuple[str, ...]] = ("alpha", "forget_weight")
    prefers: ClassVar[Alternative] = "generic labels"
