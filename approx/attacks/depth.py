"""Unlearning depth: whether a model's hidden states still hold the answers, layer by layer.

Curve: the unlearning depth score of the asked texts ("all"), without those that have no layer at which
the model that never saw them lacks anything. The states of each layer are put into the model before
unlearning, at the positions that predict the answer's tokens; `approx/metrics/depth.py` has formula,
source and limits.

It needs the model `before` unlearning and a `retained` one that never saw the texts, both of the same
base as the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from approx.attacks.attack import AttackSets, Curve, SetName
from approx.evaluation.answers import AnswerBatch, collate, logits_at, mean_logprobs_B
from approx.metrics.depth import depth_score
from approx.unlearning.causal_tracing import decoder_layers, hooked, states_of
from sisa.core.errors import InvalidInput
from sisa.lm.base.tokens import Tokens, without_closing


@dataclass(frozen=True)
class Depth:
    """The unlearning depth score beside the model before unlearning and a retained one."""

    name: ClassVar[str] = "depth"
    needs: ClassVar[tuple[SetName, ...]] = ("asked",)
    on_weights: ClassVar[bool] = True
    before: Any = None
    retained: Any = None

    def __call__(self, model: Any, sets: AttackSets, seed: int) -> Curve:  # noqa: ARG002
        if self.before is None or self.retained is None:
            raise InvalidInput(
                "the depth score lacks a model",
                where="before and retained",
                expected="the model before unlearning, and one that never saw the texts",
                next_step="give both, or leave the attack out",
            )
        asked = [without_closing(each, sets.tokenizer) for each in sets.examples("asked")]
        scores = [
            depth_score(*(patched_gaps(self.before, source, each) for source in (self.retained, model)))
            for each in asked
        ]
        return Curve("unlearning depth score", {"all": [each for each in scores if each is not None]})


def of_one_shape(*models: Any) -> bool:
    """Return whether models have the same number of layers, with states of one width."""
    return len({(len(decoder_layers(each)), each.config.hidden_size) for each in models}) == 1


def patched_gaps(target: Any, source: Any, example: Tokens) -> list[float]:
    """Return how much likelier the answer is to `target` than with each layer's states of `source`.

    In nats per token, from the lowest layer up. Raise InvalidInput for models of different shape.
    """
    whole = collate([example]).to(target.device)
    batch, columns_K = whole.at_answers()
    layers, others = decoder_layers(target), decoder_layers(source)
    if not of_one_shape(target, source):
        raise InvalidInput(
            "the models have layers of different number or width",
            where="before and retained",
            expected="models of one base",
            next_step="give models of one base, or leave the attack out",
        )
    states: list[Tensor] = []
    with hooked([(each, partial(_keep, into=states)) for each in others]):
        _score(source, batch, columns_K)
    clean = _score(target, batch, columns_K)
    gaps = []
    for layer, held_BTD in zip(layers, states, strict=True):
        with hooked([(layer, partial(_put, columns_K=columns_K, held_BTD=held_BTD))]):
            gaps.append(clean - _score(target, batch, columns_K))
    return gaps


def _score(model: Any, batch: AnswerBatch, columns_K: Tensor) -> float:
    with torch.no_grad():
        logits_BKV = logits_at(model, batch.ids_BT1[:, :-1], columns_K)
    return mean_logprobs_B(logits_BKV, batch).item()


def _keep(_: Any, args: Any, given: Any, output: Any, *, into: list[Tensor]) -> None:  # noqa: ARG001
    into.append(states_of(output))


def _put(_: Any, args: Any, given: Any, output: Any, *, columns_K: Tensor, held_BTD: Tensor) -> Any:  # noqa: ARG001
    hidden = states_of(output).clone()
    hidden[:, columns_K] = held_BTD[:, columns_K]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
