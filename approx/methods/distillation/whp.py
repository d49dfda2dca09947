"""WHP, "Who's Harry Potter": learn what a model would say that knew nothing in particular.

    v_generic = v_b - alpha * ReLU(v_r - v_b)
    label     = the likeliest word of v_generic
    F = mean over labelled positions of -log p(label)
    L = forget_weight * F + retain_weight * R(retain),   R = NLL or KL(reference || current)

v_b are the base's logits on the text with its anchor terms, here its names, replaced by invented ones.
v_r are those of a reinforced model, which was trained further on the texts, on the text itself. A word
that reinforcement makes likelier belongs to the text and not to the language. The labels are made once,
before the run, by a copy that learns the texts in one round at the run's pace
(`unlearning/written/generic_labels.py`).

Labels are hard: of the generic distribution the likeliest word alone is taught. Where the generic word
is the text's own, as for most of grammar, the label keeps it.

Source: Eldan and Russinovich 2023, "Who's Harry Potter? Approximate unlearning in LLMs" (arXiv
2310.02238), sections 2.1 to 2.3; alpha 5 there, and no retain term. Their anchor terms and translations
are lists by GPT-4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from approx.methods.idk_nll import IdkNll
from approx.methods.method import Alternative, Family
from approx.methods.task_arithmetic import TaskArithmetic
from approx.unlearning.compute import Compute
from approx.unlearning.descent import Descent
from approx.unlearning.examples import Sets
from approx.unlearning.schedule import Pace
from approx.unlearning.stopping import Bounds
from approx.unlearning.target import Target
from approx.unlearning.unlearn import Run
from approx.unlearning.written.generic_labels import write_generic_labels
from approx.unlearning.written.preferred import Prepared, Writing


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
    in_a_patch: ClassVar[Mapping[str, Any]] = {"retain_weight": 1.0}

    def write_preferred(self, writing: Writing) -> Prepared:
        """Return the sets with generic labels, for which a copy learns the texts by heart."""
        sets, reinforced = writing.sets, writing.fresh()
        cost = learn_by_heart(reinforced, sets, writing.pace)
        found = write_generic_labels(
            writing.model, reinforced, writing.tokenizer, writing.records, sets.forget, self.alpha
        )
        cost = replace(cost, tokens_forward=cost.tokens_forward + found.num_tokens)
        return Prepared(replace(sets, preferred=found.examples), cost)


def learn_by_heart(patched: Any, sets: Sets, pace: Pace) -> Compute:
    """Train a patch on the forget set in one round at this pace, and return what it costs."""
    run = Run(Target(patched), Sets(sets.forget), replace(pace, num_rounds=1), Bounds())
    return Descent(TaskArithmetic(), run).run().compute  # whose loss is that of learning by heart
