"""The schedule of a run: learning rate, batches and their order, as a pure function of the pace.

A run takes `num_rounds` rounds of `num_epochs` epochs, each with its own schedule. The order depends
only on the seed and the sizes of the sets. An epoch is one pass over the forget set in its own order.
Each micro-batch of forget rows comes with as many retain rows, or with `retain_batch_size`, from
endless passes over the retain set. The loss of a step is the mean loss of its micro-batches, weighted by
their forget rows.

>>> few = {"num_epochs": 1, "num_rounds": 1, "batch_size": 2, "retain_batch_size": None}
>>> plan_steps(3, 2, Pace(**few, gradient_accumulation_steps=2))
((PlannedBatch(forget=(2, 0), retain=(0, 1)), PlannedBatch(forget=(1,), retain=(1,))),)

Source of the defaults: clipping at 1 and linear decay as in the trainer of transformers. A patch needs
more than ten times the rate of open-unlearning's reproduction of TOFU (1e-5 on full weights), and each
later round is stronger (`descent.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Literal

from approx.unlearning.value_checks import above_zero, at_least_zero, check_values, one_of, whole_numbers

# Larger values are typing errors: their steps would fill the memory before one of them is taken.
LARGEST = {
    "num_epochs": 10_000,
    "num_rounds": 100,
    "batch_size": 1024,
    "gradient_accumulation_steps": 1024,
}


@dataclass(frozen=True)
class Pace:
    """How fast a run goes, whatever its method. `max_steps` cuts each round and its schedule."""

    learning_rate: float = 3e-4
    num_epochs: int = 40
    batch_size: int = 4
    gradient_accumulation_steps: int = 1
    warmup_steps: int = 0
    lr_scheduler: Literal["linear", "constant"] = "linear"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_steps: int | None = 40
    num_rounds: int = 10
    retain_batch_size: int | None = 8
    seed: int = 0

    def __post_init__(self) -> None:
        maybe = {"max_steps": self.max_steps, "retain_batch_size": self.retain_batch_size}
        check_values(
            "a run",
            chain.from_iterable(
                whole_numbers(1, most, **{name: getattr(self, name)}) for name, most in LARGEST.items()
            ),
            whole_numbers(1, **{name: value for name, value in maybe.items() if value is not None}),
            whole_numbers(0, warmup_steps=self.warmup_steps),
            whole_numbers(seed=self.seed),
            above_zero(learning_rate=self.learning_rate, max_grad_norm=self.max_grad_norm),
            at_least_zero(weight_decay=self.weight_decay),
            one_of(("linear", "constant"), lr_scheduler=self.lr_scheduler),
        )


@dataclass(frozen=True)
class PlannedBatch:
    """Positions in the forget set (and its preferred answers) and in the retain set."""

    forget: tuple[int, ...]
    retain: tuple[int, ...]


Step = tuple[PlannedBatch, ...]


def plan_steps(num_forget: int, num_retain: int, pace: Pace) -> tuple[Step, ...]:
    """Return all optimizer steps with their micro-batches, round after round."""
    kept, rounds = _endless(num_retain, pace.seed), range(pace.num_rounds)
    return tuple(step for number in rounds for step in _plan_round(num_forget, kept, number, pace))


def _plan_round(num_forget: int, kept: Iterator[int], number: int, pace: Pace) -> list[Step]:
    micro: list[PlannedBatch] = []
    for epoch in range(number * pace.num_epochs, (number + 1) * pace.num_epochs):
        order = _order(num_forget, pace.seed, "forget", epoch)
        for start in range(0, num_forget, pace.batch_size):
            rows = tuple(order[start : start + pace.batch_size])
            beside = pace.retain_batch_size or len(rows)
            micro.append(PlannedBatch(rows, tuple(islice(kept, beside))))
    size = pace.gradient_accumulation_steps
    return [tuple(micro[at : at + size]) for at in range(0, len(micro), size)][: pace.max_steps]


def learning_rate_at(step: int, num_steps: int, pace: Pace) -> float:
    """Return the rate of one step of a round, counted from 0: after a linear warm-up as scheduled.

    >>> [learning_rate_at(n, 4, Pace(1.0, warmup_steps=1)) for n in range(4)]
    [0.5, 1.0, 0.6666666666666666, 0.3333333333333333]
    """
    warmup = pace.warmup_steps
    if step < warmup:
        return pace.learning_rate * (step + 1) / (warmup + 1)
    if pace.lr_scheduler == "constant":
        return pace.learning_rate
    return pace.learning_rate * (num_steps - step) / (num_steps - warmup)


def _endless(size: int, seed: int) -> Iterator[int]:
    number = 0
    while size:
        yield from _order(size, seed, "retain", number)
        number += 1


def _order(size: int, seed: int, role: str, number: int) -> list[int]:
    def hashed(position: int) -> bytes:
        return hashlib.sha256(f"{seed}|{role}|{number}|{position}".encode()).digest()

    return sorted(range(size), key=hashed)
