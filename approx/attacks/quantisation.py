"""Quantisation: rounding the weights undoes small changes to them.

Curve: the probability of the asked answers with the weights, patch included, rounded to 8 and to 4 bits
(symmetric, to the nearest of 2^bits - 1 levels, in groups of 64 weights). Every linear module but the
head is rounded.

Source: Zhang et al. (2024, arXiv 2410.16454), "Catastrophic failure of LLM unlearning via quantization".

Limits: rounding harms everything that a model knows, so the curve must be compared with that of other
texts. Calibrated schemes (GPTQ, AWQ) keep more of a model, and are not tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from approx.attacks.attack import Attack, AttackSets, Curve, as_peft_model, probabilities
from sisa.lm.base.tokens import Tokens

BITS, GROUP = (8, 4), 64


@dataclass(frozen=True)
class Quantisation(Attack):
    """Rounding to each number of `bits`."""

    name: ClassVar[str] = "quantisation"
    on_weights: ClassVar[bool] = True
    bits: tuple[int, ...] = BITS

    def __call__(self, model: Any, sets: AttackSets, seed: int) -> Curve:  # noqa: ARG002
        asked = sets.examples("asked")
        with as_peft_model(model) as patched:
            return Curve(
                "probability", {bits: probabilities_rounded(patched, asked, bits) for bits in self.bits}
            )


def probabilities_rounded(model: Any, examples: Sequence[Tokens], bits: int) -> list[float]:
    """Return the probabilities of examples with the weights, patch included, rounded to `bits`.

    The patched modules and every other linear module but the head are rounded, then restored. The
    original weights are never written to.
    """
    head, held = model.get_output_embeddings(), []
    with torch.no_grad():
        changes: dict[str, Tensor] = {
            f"{name}.base_layer": module.get_delta_weight("default").detach()
            for name, module in model.named_modules()
            if hasattr(module, "get_delta_weight") and "default" in getattr(module, "lora_A", ())
        }
    try:
        for name, module in model.named_modules():
            linear = isinstance(module, torch.nn.Linear) and "lora_" not in name
            if name in changes or (linear and module is not head):
                weight = module.weight
                held.append((module, weight))
                laid_on = weight.detach().float() + changes.get(name, torch.zeros(()))
                rounded = round_weights(laid_on, bits).to(weight.dtype)
                module.weight = torch.nn.Parameter(rounded, requires_grad=False)
        with model.disable_adapter():
            return probabilities(model, examples)
    finally:
        for module, weight in held:
            module.weight = weight


def round_weights(weights: Tensor, bits: int) -> Tensor:
    """Return weights rounded to the nearest of 2^bits - 1 levels around 0.

    Each group of GROUP weights in a row has its own scale; a row that cannot be divided so is one
    group.

    >>> round_weights(torch.tensor([[-7.0, 0.4, 3.6, 7.0]]), 4).tolist()
    [[-7.0, 0.0, 4.0, 7.0]]
    """
    most = 2 ** (bits - 1) - 1
    size = GROUP if weights.shape[-1] % GROUP == 0 else weights.shape[-1]
    groups = weights.reshape(-1, size)
    scale = groups.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / most
    return torch.mul((groups / scale).round(), scale).reshape(weights.shape)
