"""DP-SGD: train a LoRA adapter so that no example can be told from the weights, up to epsilon.

    each step   take every example with probability q = batch_size / n
    gradient    (sum over the taken ones of g min(1, C / |g|) + sigma C N(0, 1)) / batch_size
    epsilon     opacus' RDP accountant, of (sigma, q, steps), at `delta`

g is the gradient of an example's mean NLL per answer token by all trained weights together, C is
`max_grad_norm` and sigma `noise_multiplier`. The guarantee is for one example more or less; a person
with k examples has a weaker one (epsilon grows at least k times). It holds for the adapter, given the
base and the number of examples, and not for what the base knew.

This is a reference for what a guarantee costs in utility: privacy bounds what any record can do, while
exact deletion removes it. Its pseudo-random noise is not cryptographically secure.

Source: Abadi et al. 2016, "Deep learning with differential privacy" (arXiv 1607.00133), algorithm 1;
Mironov 2017, "Renyi differential privacy" (arXiv 1702.07476).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from approx.evaluation.answers import collate, model_logprobs_B
from approx.unlearning.target import Target
from approx.unlearning.value_checks import above_zero, check_values, whole_numbers
from sisa.core.errors import Problem
from sisa.lm.base.tokens import Tokens


@dataclass(frozen=True)
class PrivacySettings:
    """The settings of a run; `batch_size` is the expected number of examples in a step."""

    noise_multiplier: float = 1.0
    max_grad_norm: float = 1.0
    batch_size: int = 8
    num_steps: int = 100
    learning_rate: float = 1e-3
    delta: float = 1e-5
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = {"batch_size": self.batch_size, "num_steps": self.num_steps}
        names = ("noise_multiplier", "max_grad_norm", "learning_rate", "delta")
        check_values(
            "a private run",
            above_zero(**{name: getattr(self, name) for name in names}),
            whole_numbers(1, **sizes),
            whole_numbers(seed=self.seed),
        )


def epsilon_of(settings: PrivacySettings, num_examples: int) -> float:
    """Return the epsilon of a whole run. Raise InvalidInput for impossible values."""
    problems = []
    if settings.batch_size > num_examples:
        problems.append(
            Problem("batch_size", f"{settings.batch_size}, more than {num_examples} examples")
        )
    if settings.delta >= 1:
        problems.append(Problem("delta", f"{settings.delta}, expected a number below 1"))
    check_values("a private run", problems)
    from opacus.accountants import RDPAccountant  # where it is not installed, the row is left out

    accountant = RDPAccountant()
    rate = settings.batch_size / num_examples
    accountant.history = [(settings.noise_multiplier, rate, settings.num_steps)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that more orders might give a smaller epsilon
        return float(accountant.get_epsilon(settings.delta))


def train_privately(model: Any, examples: Sequence[Tokens], settings: PrivacySettings) -> float:
    """Train the LoRA patch of `model` that requires a gradient, and return epsilon.

    Raise InvalidInput as `epsilon_of`, or for a model in which more than a patch would train.
    """
    epsilon, target = epsilon_of(settings, len(examples)), Target(model)
    parameters = list(target.trained.values())
    optimizer = torch.optim.AdamW(
        parameters, settings.learning_rate, weight_decay=0.0, foreach=False, fused=False
    )
    generator = torch.Generator().manual_seed(settings.seed)
    rate = settings.batch_size / len(examples)
    for _ in range(settings.num_steps):
        taken = torch.rand(len(examples), generator=generator) < rate
        rows = [each for each, chosen in zip(examples, taken.tolist(), strict=True) if chosen]
        sums = clipped_sum(model, rows, parameters, settings.max_grad_norm)
        scale = settings.noise_multiplier * settings.max_grad_norm
        for parameter, total in zip(parameters, sums, strict=True):
            noise = torch.randn(total.shape, generator=generator).to(total)
            parameter.grad = (total + scale * noise) / settings.batch_size
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return epsilon


def clipped_sum(
    model: Any, examples: Sequence[Tokens], parameters: Sequence[Tensor], limit: float
) -> list[Tensor]:
    """Return the sum of the examples' gradients, each cut to a norm of `limit` over all parameters."""
    sums = [torch.zeros_like(each) for each in parameters]
    for example in examples:
        loss = -model_logprobs_B(model, collate([example]).to(model.device)).sum()
        gradients = torch.autograd.grad(loss, list(parameters))
        norm = torch.linalg.vector_norm(torch.stack([each.norm() for each in gradients]))
        factor = min(1.0, limit / max(float(norm), 1e-30))
        for total, each in zip(sums, gradients, strict=True):
            total += factor * each
    return sums
