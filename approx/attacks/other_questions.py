"""Other questions to the same knowledge: paraphrases, several steps, aliases, other languages.

Curve: the probability of the answers of each given set, by the name of the set. The sets are the
caller's, because no rule makes them: a paraphrase by another model, a question over two facts ("Where
was the author of ... born?"), another name of the same person, the question in another language.

Source: paraphrases as in Patil et al. 2024 (arXiv 2309.17410); several steps as in Zhong et al. 2023
(MQuAKE, arXiv 2305.14795); aliases and languages as in RWKU (Jin et al. 2024, arXiv 2406.10890) and
Lynch et al. 2024 (arXiv 2402.16835).

Limits: a set is as good as its questions. Compare with the model before unlearning and with one that
never saw the texts: some questions are easier than others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from approx.attacks.attack import Attack, AttackSets, Curve
from approx.attacks.rewording import worded_curve


@dataclass(frozen=True)
class OtherQuestions(Attack):
    """The sets of `AttackSets.also`."""

    name: ClassVar[str] = "other_questions"

    def why_not(self, model: Any, sets: AttackSets) -> str | None:
        """Return why there is nothing to ask, or None."""
        return super().why_not(model, sets) if sets.also else "needs sets of questions: --also NAME=FILE"

    def __call__(self, model: Any, sets: AttackSets, seed: int) -> Curve:  # noqa: ARG002
        return worded_curve(model, [(name, sets.tokens(each)) for name, each in sets.also.items()])
