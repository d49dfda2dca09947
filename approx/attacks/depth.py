"""Unlearning depth: whether a model's hidden states still hold the answers, layer by layer.

Curve: the unlearning depth score of the asked texts ("all"), without those that have no layer at which
the model that never saw them lacks anything. The states of each layer are put into the model before
unlearning, at the positions that predict the answer's tokens; `approx/metrics/depth.py` has formula,
source and limits.

It needs the model before unlearning, and as the first reference one that never saw the texts, both of
the same base as the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from approx.attacks.attack import Attack, AttackSets, Curve
from approx.evaluation.answers import AnswerBatch, asks_by_prompt, collate, model_logprobs_B
from approx.metrics.depth import depth_score
from approx.unlearning.hidden_states import Seen, decoder_layers, hooked
from sisa.lm.base.tokens import Tokens, without_closing


@dataclass(frozen=True)
class Depth(Attack):
    """The unlearning depth score beside the model before unlearning and a retained one."""

    name: ClassVar[str] = "depth"
    on_weights: ClassVar[bool] = True

    def why_not(self, model: Any, sets: AttackSets) -> str | None:
        """Return why the attack can't be made, or None: it needs models of one base."""
        if why := super().why_not(model, sets):
            return why
        if sets.before is None or not sets.references:
            return "needs two models: --before and --reference"
        models = (model, sets.before, sets.references[0])
        if any(map(asks_by_prompt, models)) or not of_one_shape(*models):
            return "needs models of one base, each of one set of weights: --before and --reference"
        return None

    def __call__(self, model: Any, sets: AttackSets, seed: int) -> Curve:  # noqa: ARG002
        self.check(model, sets)
        asked = [without_closing(each, sets.tokenizer) for each in sets.examples("asked")]
        sources = (sets.references[0], model)
        scores = [
            depth_score(*(patched_gaps(sets.before, source, each) for source in sources))
            for each in asked
        ]
        return Curve("unlearning depth score", {"all": [each for each in scores if each is not None]})


def of_one_shape(*models: Any) -> bool:
    """Return whether models have the same number of layers, with states of one width."""
    return len({(len(decoder_layers(each)), each.config.hidden_size) for each in models}) == 1


def patched_gaps(target: Any, source: Any, example: Tokens) -> list[float]:
    """Return how much likelier the answer is to `target` than with each layer's states of `source`.

    In nats per token, from the lowest layer up, for models of one shape.
    """
    batch = collate([example]).to(target.device)
    columns_K = batch.at_answers()[1]
    seen: list[Seen] = []
    with hooked([(layer, seen.append) for layer in decoder_layers(source)]):
        _score(source, batch)
    clean = _score(target, batch)
    gaps = []
    for layer, (_, left_BTD) in zip(decoder_layers(target), seen, strict=True):
        with hooked([(layer, partial(_put, columns_K=columns_K, left_BTD=left_BTD))]):
            gaps.append(clean - _score(target, batch))
    return gaps


def _score(model: Any, batch: AnswerBatch) -> float:
    with torch.no_grad():
        return model_logprobs_B(model, batch).item()


def _put(now: Seen, *, columns_K: Tensor, left_BTD: Tensor) -> Tensor:
    states_BTD = now.left.clone()
    states_BTD[:, columns_K] = left_BTD[:, columns_K]
    return states_BTD
