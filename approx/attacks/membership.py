"""Membership: whether a model's scores distinguish the asked texts from texts that no model has seen.

AUCs, by score: loss, zlib, Min-K%, Min-K%++ and the gradient norm, with a reference model the attack
calibrated by its loss, and with two LiRA. `approx/metrics/membership.py` has their formulas, sources and
limits. PrivLeak is a figure of the same scores: how far the AUC of Min-K% is from that under the first
reference, with its own k (`approx/metrics/privleak.py`). Tokens that close an answer do not count.

Limits: the holdout must come from where the asked texts come from, or the AUC is one of style.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from approx.attacks.attack import Attack, AttackSets, Aucs, SetName
from approx.evaluation.answer_score import AnswerScore, check_finite
from approx.evaluation.answers import asks_by_prompt, gradient_squares, score_examples
from approx.metrics.auc import auc
from approx.metrics.membership import calibrated_scores, gradient_norm_score, min_k_score, text_scores
from approx.metrics.privleak import MIN_K, privleak_or_none
from sisa.lm.base.tokens import NO_LOSS, Tokens, without_closing


@dataclass(frozen=True)
class Membership(Attack):
    """The attacks on membership, with the sets' references as models that never saw the texts."""

    name: ClassVar[str] = "membership"
    needs: ClassVar[tuple[SetName, ...]] = ("asked", "holdout")
    least: ClassVar[int] = 2

    def __call__(self, model: Any, sets: AttackSets, seed: int) -> Aucs:
        asked, unseen = (sets.examples(role) for role in self.needs)
        texts = [without_closing(each, sets.tokenizer) for each in (*asked, *unseen)]
        own, *judges = (score_examples(each, texts) for each in (model, *sets.references))
        check_finite((each.loss for each in own), "--model")
        check_finite((each.loss for scores in judges for each in scores), "--reference")

        def sides(scores: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
            return scores[: len(asked)], scores[len(asked) :]

        named = membership_scores(model, sets.tokenizer, texts, own, judges)
        aucs = {name: auc(*sides(each), seed=seed) for name, each in named.items()}
        if not judges:
            return Aucs(aucs)
        of_both = ([min_k_score(each.logprobs, MIN_K) for each in of] for of in (own, judges[0]))
        return Aucs(aucs, privleak_or_none(*map(sides, of_both), seed=seed))


def membership_scores(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Tokens],
    own: Sequence[AnswerScore],
    judges: Sequence[Sequence[AnswerScore]],
) -> dict[str, list[float]]:
    """Return each attack's scores of examples, given the model's answer scores and the references'."""
    rows = [
        text_scores(each.logprobs, each.means, each.variances, _answer(example, tokenizer))
        for each, example in zip(own, examples, strict=True)
    ]
    scores = {name: [row[name] for row in rows] for name in rows[0]}
    if not asks_by_prompt(model):
        scores["gradient_norm"] = list(map(gradient_norm_score, gradient_squares(model, examples)))
    losses, *others = ([each.loss for each in scored] for scored in (own, *judges))
    return scores | calibrated_scores(losses, others)


def _answer(example: Tokens, tokenizer: Any) -> str:
    text: str = tokenizer.decode([each for each in example.labels if each != NO_LOSS])
    return text
