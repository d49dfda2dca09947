"""What a run costs: counted positions, estimated operations, seconds and memory.

Operations are estimated from counted positions, padding included. For N parameters in the model, P of
them trained, and D positions:

    forward                    2 N D
    backward, activations      2 N D
    backward, trained weights  2 P D       so 6 N D for full weights (Kaplan et al. 2020)

A patch saves the backward pass of the weights, not that of the activations. The estimate leaves out the
part of attention that grows with the square of the length, optimizer steps, and the caller's measures
of utility and knowledge (whose seconds are counted).

>>> Compute(num_parameters=10, num_trained=10, tokens_trained=5, tokens_forward=0).flops
300
>>> Compute(num_parameters=10, num_trained=1, tokens_trained=5, tokens_forward=2).flops
250
"""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Compute:
    """The counts of a run; `tokens_forward` were evaluated (reference, measurements), not trained on."""

    num_parameters: int
    num_trained: int
    tokens_trained: int
    tokens_forward: int
    seconds: float = 0.0
    peak_memory_bytes: int = 0

    @property
    def flops(self) -> int:
        """Return the estimated number of floating-point operations."""
        trained = self.tokens_trained * (4 * self.num_parameters + 2 * self.num_trained)
        return trained + self.tokens_forward * 2 * self.num_parameters

    def with_cost_of(self, other: Compute) -> Compute:
        """Return the counts with those of preparations for the same patch."""
        return replace(
            self,
            tokens_trained=self.tokens_trained + other.tokens_trained,
            tokens_forward=self.tokens_forward + other.tokens_forward,
            seconds=self.seconds + other.seconds,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the counts as JSON values."""
        return {
            "num_parameters": self.num_parameters,
            "num_trained_parameters": self.num_trained,
            "tokens_trained": self.tokens_trained,
            "tokens_forward_only": self.tokens_forward,
            "flops_estimated": self.flops,
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
        }


def peak_memory_bytes() -> int:
    """Return the peak memory of this process, with what it used before the run."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
