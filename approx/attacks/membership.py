"""Membership: whether a model's scores distinguish the asked texts from texts that no model has seen.

AUCs, by score: loss, zlib, Min-K%, Min-K%++ and the gradient norm, with a reference model the attack
calibrated by its loss, and with two LiRA. `approx/metrics/membership.py` has their formulas, sources and
limits. Tokens that close an answer do not count.

Limits: the holdout must come from where the asked texts come from, or the AUC is one of style.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from approx.attacks.attack import Attack, AttackSets, SetName
from approx.evaluation.answers import asks_by_prompt, gradient_squares, score_examples
from approx.metrics.auc import Auc, auc
from approx.metrics.membership import calibrated_scores, gradient_norm_score, min_k_score, text_scores
from approx.metrics.privleak import MIN_K, PrivLeak, privleak_or_none
from sisa.lm.base.tokens import NO_LOSS, Tokens, without_closing


@dataclass(frozen=True)
class Membership(Attack):
    """The attacks on membership, with the sets' references as models that never saw the texts."""

    name: ClassVar[str] = "membership"
    needs: ClassVar[tuple[SetName, ...]] = ("asked", "holdout")
    least: ClassVar[int] = 2

    def __call__(self, model: Any, sets: AttackSets, seed: int) -> Mapping[str, Auc]:
        sides = [sets.examples(role) for role in self.needs]
        texts = [without_closing(each, sets.tokenizer) for side in sides for each in side]
        scores = membership_scores(model, sets.tokenizer, texts, sets.references)
        num = len(sides[0])
        return {name: auc(each[:num], each[num:], seed=seed) for name, each in scores.items()}


def membership_scores(
    model: Any, tokenizer: Any, examples: Sequence[Tokens], references: Sequence[Any] = ()
) -> dict[str, list[float]]:
    """Return the scores of examples by name; the attacks that need references, with references only."""
    found = score_examples(model, examples)
    rows = [
        text_scores(each.logprobs, each.means, each.variances, _answer(example, tokenizer))
        for each, example in zip(found, examples, strict=True)
    ]
    scores = {name: [row[name] for row in rows] for name in rows[0]}
    if not asks_by_prompt(model):
        scores["gradient_norm"] = list(map(gradient_norm_score, gradient_squares(model, examples)))
    judges = [[each.loss for each in score_examples(judge, examples)] for judge in references]
    return scores | calibrated_scores([each.loss for each in found], judges)


def privleak_against_reference(model: Any, sets: AttackSets, seed: int) -> PrivLeak | None:
    """Return PrivLeak of a model against the first reference, or None where it is undefined."""
    sides = [
        [without_closing(each, sets.tokenizer) for each in sets.examples(role)]
        for role in Membership.needs
    ]

    def scores(of: Any) -> tuple[list[float], list[float]]:
        asked, holdout = (
            [min_k_score(each.logprobs, MIN_K) for each in score_examples(of, side)] for side in sides
        )
        return asked, holdout

    return privleak_or_none(scores(model), scores(sets.references[0]), seed=seed)


def _answer(example: Tokens, tokenizer: Any) -> str:
    text: str = tokenizer.decode([each for each in example.labels if each != NO_LOSS])
    return text
