"""Relearning: fine-tuning on a few texts, by a fresh LoRA adapter over the model.

The model is restored afterwards. Source: Hu et al. 2024, "Jogging the memory of unlearned models".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from approx.attacks.attack import probabilities
from approx.evaluation.answers import collate, logits_at
from approx.methods.method import mean_nll
from sisa.lm.base.tokens import Tokens

RELEARNING_STEPS = (3, 20)
LEARNING_RATE = 1e-3
EXTRA = "relearning"  # the name of the attack's adapter


def relearnt(
    model: Any,
    taught: Sequence[Tokens],
    asked: Sequence[Tokens],
    after: Sequence[int] = RELEARNING_STEPS,
) -> dict[int, list[float]]:
    """Return the probabilities of `asked` after 0 steps on `taught` and after the given numbers.

    `model` is a PEFT model. It is fine-tuned by a fresh adapter over its own, and restored.
    """
    found = {0: probabilities(model, asked)}
    wanted = {name: each.requires_grad for name, each in model.named_parameters()}
    torch.manual_seed(0)  # for the fresh adapter's first factors
    model.add_adapter(EXTRA, model.peft_config["default"])
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
        model.base_model.set_adapter("default")
        for name, each in model.named_parameters():
            each.requires_grad_(wanted[name])
    return found
