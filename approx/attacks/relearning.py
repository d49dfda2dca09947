"""Relearning: fine-tuning on a few texts brings back what was hidden, not gone.

Curve: the probability of the asked answers, by the number of steps. A fresh LoRA adapter over the model
is trained on all of the taught texts at once (AdamW, LEARNING_RATE). It has the same shape over every
model: with that of a patch of one matrix it could learn next to nothing, and the patch would seem
robust. In domain the texts are of the same subject as the asked ones; out of domain they are about
anything else, so that whatever returns was never gone.

Source: Hu et al. (2024, arXiv 2406.13356), "Jogging the memory of unlearned models"; out of domain:
Lynch et al. (2024, arXiv 2402.16835).

Limits: any model learns the manner of the taught texts, so the curve must be compared with that of a
model that never saw the asked ones. One rate and one batch: a patient attacker finds more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft.tuners.lora import LoraLayer

from approx.attacks.attack import (
    LORA,
    Attack,
    AttackSets,
    Curve,
    SetName,
    Strength,
    as_peft_model,
    probabilities,
    trained_as_before,
)
from approx.evaluation.answers import collate, logits_at
from approx.methods.method import mean_nll
from sisa.lm.base.adapter import lora_config
from sisa.lm.base.tokens import Tokens

RELEARNING_STEPS = (3, 20)
LEARNING_RATE = 1e-3
EXTRA = "relearning"  # the name of the attack's adapter


@dataclass(frozen=True)
class Relearning(Attack):
    """Relearning in domain, measured after 0 steps and after each number of `steps`."""

    name: ClassVar[str] = "relearning"
    needs: ClassVar[tuple[SetName, ...]] = ("asked", "taught")
    on_weights: ClassVar[bool] = True
    steps: tuple[int, ...] = RELEARNING_STEPS

    def __call__(self, model: Any, sets: AttackSets, seed: int) -> Curve:
        asked, taught = (sets.examples(role) for role in self.needs)
        with as_peft_model(model) as patched:
            return Curve("probability", relearnt(patched, taught, asked, self.steps, seed))


@dataclass(frozen=True)
class RelearningOutOfDomain(Relearning):
    """Relearning from texts of another kind than the asked ones."""

    name: ClassVar[str] = "relearning_out_of_domain"
    needs: ClassVar[tuple[SetName, ...]] = ("asked", "others")


def relearnt(
    model: Any, taught: Sequence[Tokens], asked: Sequence[Tokens], after: Sequence[int], seed: int
) -> dict[Strength, list[float]]:
    """Return the probabilities of `asked` after 0 steps on `taught` and after the given numbers.

    `model` is a PEFT model. It is fine-tuned by a fresh adapter over its own, and restored.
    """
    found: dict[Strength, list[float]] = {0: probabilities(model, asked)}
    with trained_as_before(model):
        torch.manual_seed(seed)  # for the fresh adapter's first factors
        model.add_adapter(EXTRA, lora_config(LORA, model))
        model.base_model.set_adapter(["default", EXTRA])
        try:
            for name, each in model.named_parameters():
                each.requires_grad_(f".{EXTRA}." in name)
            trained = [each for each in model.parameters() if each.requires_grad]
            optimizer = torch.optim.AdamW(trained, LEARNING_RATE, weight_decay=0.0, foreach=False)
            batch = collate(taught).to(model.device)
            for step in range(1, max(after) + 1):
                optimizer.zero_grad(set_to_none=True)
                cut, columns_K = batch.at_answers()
                logits_BKV = logits_at(model, cut.ids_BT1, columns_K)
                mean_nll(logits_BKV, cut).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                if step in after:
                    found[step] = probabilities(model, asked)
        finally:
            model.delete_adapter(EXTRA)
            _unwrap(model)
            model.base_model.set_adapter("default")
    return found


def _unwrap(model: Any) -> None:
    """Put back the modules that no adapter is on any more, where PEFT leaves its own around them."""
    for name, each in list(model.named_modules()):
        if isinstance(each, LoraLayer) and not each.lora_A:
            holder, _, place = name.rpartition(".")
            setattr(model.get_submodule(holder), place, each.get_base_layer())
