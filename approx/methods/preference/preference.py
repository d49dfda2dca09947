"""The loss of all preference methods: one answer less likely than another, or than it was before.

    F = scale * mean over examples of -log sigmoid(beta * (s(preferred) - s(forget)) - gamma)

    s = log p(answer) - log p_reference(answer), the whole answer
    reference-free:      without the reference's term
    length-normalised:   divided by the number of the answer's tokens
    scale: 1, or 2 / beta, with which the initial slope does not depend on beta

| method | preferred | reference-free | length-normalised | scale | gamma |
| --- | --- | --- | --- | --- | --- |
| `dpo` | refusals | no | no | 1 | 0 |
| `idk_dpo` | refusals | no | no | 2 / beta | 0 |
| `altpo` | alternates that the base writes | a choice | a choice | 2 / beta | 0 |
| `npo` | none: s(preferred) is 0 | no | no | 2 / beta | 0 |
| `simnpo` | none | yes | yes | 2 / beta | a choice |

F is bounded below by 0. Row i of the preferred answers belongs to row i of the forget answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from approx.evaluation.answers import sum_logprobs_B
from approx.methods.method import Family, Method, RetainLoss, Role
from approx.unlearning.target import Rows


@dataclass(frozen=True)
class Preference(Method):
    """A preference with the inverse temperature `beta`: towards 0 its scaled loss becomes linear."""

    beta: float = 0.1
    forget_weight: float = 1.0
    retain_weight: float = 1.0
    retain_loss: RetainLoss = "nll"
    family: ClassVar[Family] = "preference"

    @property
    def scale(self) -> float:
        return 2 / self.beta

    @property
    def gamma(self) -> float:
        return 0.0

    @property
    def reference_free(self) -> bool:
        return False

    @property
    def length_normalised(self) -> bool:
        return False

    @property
    def compares_answers(self) -> frozenset[Role]:
        return frozenset() if self.reference_free else self.always_reads

    def scores_B(self, rows: Rows) -> Tensor:
        """Return s of each answer."""
        if self.reference_free:
            found_B = sum_logprobs_B(rows.current_BTV, rows.batch)
        else:
            found_B = rows.log_ratios_B
        return found_B / rows.batch.num_tokens_B if self.length_normalised else found_B

    def forget_term(self, rows: Mapping[Role, Rows]) -> Tensor:
        margins_B = -self.scores_B(rows["forget"])
        if "preferred" in self.always_reads:
            margins_B = margins_B + self.scores_B(rows["preferred"])
        return -self.scale * logsigmoid(self.beta * margins_B - self.gamma).mean()
