"""PDU, primal-dual unlearning: flatten forget tokens' logits, with a bound on the retain loss.

    minimise F   subject to   R(retain) <= retain_loss_eps

    F = mean over answer tokens of (largest logit - mean logit)^2
    L = forget_weight * F + weight * R(retain),   R = NLL or KL(reference || current)
    weight of the next step = max(0, weight + dual_step_size * (R - retain_loss_eps))

The weight starts at `retain_weight` and is constant for `dual_warmup_epochs` passes over the forget
set. It is the state of a run, not of a loss: the loss is that of one step, the update a function
(`next_retain_weight`), and the loop holds and saves the number. The constant -weight * retain_loss_eps
of the Lagrangian has no gradient and is left out.

F is 0 for the uniform distribution. It flattens words that are none of the forget answer's, too, so an
unlikely answer becomes more likely. It is a square of logits, and large: the weight must be, too.
`retain_loss_eps` must lie above the retain loss of the base (the log's `retain` at the first step), or
the weight grows without end.

Source: Entesari et al. 2025, "Constrained entropic unlearning: a primal-dual framework for large
language models". Defaults are those of open-unlearning's script for TOFU
(`community/methods/PDU/run.sh`: weight 100, step 5, bound 0.3, 5 epochs), because its configuration
names no bound. Its code (`src/trainer/unlearn/pdu.py`) averages F over prompt and padding, too, and
updates the weight after each micro-batch; here it is after each step, from the step's mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from approx.methods.method import Family, Method, RetainLoss, Role, answer_values_NV
from approx.unlearning.target import Rows


@dataclass(frozen=True)
class Pdu(Method):
    """PDU with the bound `retain_loss_eps`, and the weight of the retain term at the start."""

    retain_loss_eps: float = 0.3
    dual_step_size: float = 5.0
    dual_warmup_epochs: float = 5.0
    forget_weight: float = 1.0
    retain_weight: float = 100.0
    retain_loss: RetainLoss = "nll"
    name: ClassVar[str] = "pdu"
    family: ClassVar[Family] = "flattening"
    paper: ClassVar[str] = "Entesari et al. 2025, Constrained entropic unlearning"
    not_negative: ClassVar[tuple[str, ...]] = (
        *("retain_loss_eps", "dual_step_size", "dual_warmup_epochs", "retain_weight"),
    )
    always_reads: ClassVar[frozenset[Role]] = frozenset({"forget", "retain"})

    def forget_term(self, rows: Mapping[Role, Rows]) -> Tensor:
        logits_NV = answer_values_NV(rows["forget"].current_BTV, rows["forget"].batch)
        return (logits_NV.amax(dim=-1) - logits_NV.mean(dim=-1)).square().mean()

    def next_retain_weight(self, weight: float, retain: float | None, num_epochs: float) -> float:
        """Return the weight after a dual step, which the bound's excess takes up, and slack down.

        >>> method = Pdu(retain_loss_eps=0.25, dual_step_size=4.0, dual_warmup_epochs=5)
        >>> [method.next_retain_weight(1.5, *each) for each in ((0.75, 4), (0.75, 5), (0.0, 5))]
        [1.5, 3.5, 0.5]
        >>> method.next_retain_weight(0.5, 0.0, 6)
        0.0
        """
        if retain is None or num_epochs < self.dual_warmup_epochs:
            return weight
        return max(0.0, weight + self.dual_step_size * (retain - self.retain_loss_eps))
