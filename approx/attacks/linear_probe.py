"""Linear probe: whether hidden states distinguish a question's own answer from another question's.

AUC by layer: a linear classifier reads the mean hidden state over an answer's tokens. Each question is
shown with its own answer and with that of another question; the classifier is judged on questions that
it was not fitted on. 0.5 means that it finds nothing of the answer in the states of this layer.

Formula: ridge regression of +1 and -1 on features that are standardised by the fitted texts, w = X'
(X X' + D I)^-1 y with D features; questions are cut into FOLDS folds, and answers are exchanged within
a fold, so that no answer is both fitted on and judged. AUC over all held-out scores, with a paired
interval.

Source: Lynch et al. 2024, "Eight methods to evaluate robust unlearning in LLMs" (arXiv 2402.16835),
section on latent knowledge, by supervised probes; Alain and Bengio 2016 (arXiv 1610.01644).

Limits: a probe also finds what fits grammatically ("in 1990" as an answer to "Where?"), so compare with
a model that never saw the texts; exchanged answers of one kind (all birthplaces) are fairer. With few
texts the AUC is noise. Another reader may find what no line finds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from approx.attacks.attack import Attack, AttackSets, Aucs
from approx.evaluation.answers import answered, collate, logits_at
from approx.metrics.auc import auc
from approx.metrics.membership import Array
from approx.unlearning.hidden_states import Seen, decoder_layers, hooked
from sisa.lm.base.tokens import Tokens, answers

FOLDS = 5


@dataclass(frozen=True)
class LinearProbe(Attack):
    """A probe of each layer."""

    name: ClassVar[str] = "linear_probe"
    least: ClassVar[int] = 4  # two folds of two
    on_weights: ClassVar[bool] = True

    def __call__(self, model: Any, sets: AttackSets, seed: int) -> Aucs:
        self.check(model, sets)
        pairs = [answers(each, sets.tokenizer)[0] for each in sets.examples("asked")]
        folds = folds_of(len(pairs))
        swapped = {at: fold[(place + 1) % len(fold)] for fold in folds for place, at in enumerate(fold)}
        own = states_LND(model, [answered(*pair) for pair in pairs])
        other = states_LND(
            model, [answered(pairs[at][0], pairs[swapped[at]][1]) for at in range(len(pairs))]
        )
        found = {}
        for layer, (own_ND, other_ND) in enumerate(zip(own, other, strict=True)):
            scores = held_out_scores(own_ND, other_ND, folds)
            found[f"layer {layer}"] = auc(*scores, paired=True, seed=seed)
        return Aucs(found)


def folds_of(num: int) -> list[list[int]]:
    """Return the numbers below `num` in runs of two or more.

    >>> folds_of(5)
    [[0, 1], [2, 3, 4]]
    """
    count = min(FOLDS, num // 2)
    ends = [num * fold // count for fold in range(count + 1)]
    return [list(range(*ends[fold : fold + 2])) for fold in range(count)]


def held_out_scores(
    own_ND: Array, other_ND: Array, folds: Sequence[Sequence[int]]
) -> tuple[list[float], list[float]]:
    """Return the probe's scores of own and of exchanged answers, each by a probe not fitted on them."""
    own, other = np.zeros(len(own_ND)), np.zeros(len(other_ND))
    for fold in folds:
        kept = [at for at in range(len(own_ND)) if at not in fold]
        fitted = np.concatenate([own_ND[kept], other_ND[kept]])
        middle, spread = fitted.mean(axis=0), fitted.std(axis=0) + 1e-8
        weights = ridge((fitted - middle) / spread, np.repeat([1.0, -1.0], len(kept)))
        for scores, states in ((own, own_ND), (other, other_ND)):
            scores[fold] = (states[fold] - middle) / spread @ weights
    return own.tolist(), other.tolist()


def ridge(features_ND: Array, targets_N: Array) -> Array:
    """Return the weights of ridge regression with penalty D, by the dual form."""
    num, width = features_ND.shape
    kernel = features_ND @ features_ND.T + width * np.eye(num)
    found: Array = features_ND.T @ np.linalg.solve(kernel, targets_N)
    return found


def states_LND(model: Any, examples: Sequence[Tokens]) -> list[Array]:
    """Return each layer's hidden states, means over an answer's tokens, of examples in order."""
    layers = decoder_layers(model)
    found: list[list[Array]] = [[] for _ in layers]
    for example in examples:
        batch, seen = collate([example]).to(model.device), list[Seen]()
        with hooked([(layer, seen.append) for layer in layers]), torch.no_grad():
            logits_at(model, batch.ids_BT1, torch.tensor([0], device=model.device))
        for of_layer, (_, left_BTD) in zip(found, seen, strict=True):
            answer_TD = left_BTD[0, 1:][batch.mask_BT[0]]
            of_layer.append(answer_TD.double().mean(dim=0).cpu().numpy())
    return [np.stack(each) for each in found]
