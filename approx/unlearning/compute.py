"""What a run cost, counted.

Rules: tokens are positions that were computed, padding among them. With N parameters in the model, P of
them trained, and D positions:

    forward                    2 N D
    backward, activations      2 N D
    backward, trained weights  2 P D       so 6 N D in all for full weights (Kaplan et al. 2020)

A patch saves the weights' part of the backward pass, not that of the activations. The share of a full
fine-tuning is the ratio to 6 N times the positions that one would compute. Peak memory is the process's
own (`getrusage`), so that it counts what else the process did before; on a GPU, what torch allocated.

Not covered: attention's own part, which grows with the square of the length; optimizer steps; what the
caller's measure of utility costs (its seconds count, its operations do not).

>>> Compute(num_parameters=10, num_trained=10, tokens_trained=5, tokens_forward=0).flops
300
>>> Compute(num_parameters=10, num_trained=1, tokens_trained=5, tokens_forward=2).flops
250
"""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Compute:
    """Counts of a run; `tokens_forward` were only looked at (reference, probes), not trained on."""

    num_parameters: int
    num_trained: int
    tokens_trained: int
    tokens_forward: int
    seconds: float = 0.0
    peak_memory_bytes: int = 0

    @property
    def flops(self) -> int:
        """Floating-point operations, estimated."""
        trained = self.tokens_trained * (4 * self.num_parameters + 2 * self.num_trained)
        return trained + self.tokens_forward * 2 * self.num_parameters

    def share_of_full_finetuning(self, full_tokens: int) -> float:
        """Ratio to a fine-tuning of all weights that computes `full_tokens` positions, all epochs."""
        return self.flops / (6 * self.num_parameters * full_tokens)

    def to_json(self, full_tokens: int | None) -> dict[str, Any]:
        """Counts with their units; the share is null when the full fine-tuning's tokens are unknown."""
        return {
            "num_parameters": self.num_parameters,
            "num_trained_parameters": self.num_trained,
            "tokens_trained": self.tokens_trained,
            "tokens_forward_only": self.tokens_forward,
            "flops_estimated": self.flops,
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "share_of_full_finetuning": full_tokens and self.share_of_full_finetuning(full_tokens),
        }


def peak_memory_bytes() -> int:
    """The most memory that this process, or torch on its GPU, has held so far."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
