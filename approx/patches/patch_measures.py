"""The measures of a patch, before and after, on the texts to forget and on the texts to keep.

    forget_extraction_strength    with its floor, the score of no knowledge at all
    forget_exact_memorisation
    forget_probability            mean over texts of exp(-mean NLL of the answer's tokens)
    forget_rougeL_recall          of the greedy continuation; absent for texts without prompts
    forget_min_k_plus_plus        mean over texts
    retain_probability            as forget_probability
    retain_utility                exp(-mean NLL) over all answer tokens together, from 0 to 1;
                                  `max_utility_drop` bounds it

The same texts are measured before and after: the first MAX_MEASURED of a set, and of the retain set
those that were not trained on. The first MAX_CONTINUED answers are continued from their prompts, up to
MAX_CONTINUATION_TOKENS tokens. Measures of tokens leave out the tokens that close an answer (end token,
line break); probabilities include them. No result holds a text.

Robustness is the probability of the answers after the easiest attacks:

    relearning   after 3 and 20 steps of fine-tuning on the first texts. A control that never knew them
                 is measured beside it: the reference on the same texts, or without one the patched model
                 on the same texts with invented names and figures. A patch is robust if what it forgot
                 returns no faster than the control learns. `steps_until_half` is when half of what the
                 patch took is back; null is not within 20 steps
    rounding     with the weights, patch included, rounded to 8 and to 4 bits
    rewording    for the same questions in other words, before and after the patch

Plain texts have no other wording. A text without a name has no control without a reference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any

from approx.attacks.attack import AttackSets, probabilities
from approx.attacks.quantisation import Quantisation
from approx.attacks.relearning import Relearning
from approx.attacks.rewording import Rewording
from approx.evaluation.answer_score import AnswerScore
from approx.evaluation.answers import answered, score_examples
from approx.evaluation.continuations import continue_greedily
from approx.evaluation.probe import MAX_PROBED, Answers, may_know, probe_answers
from approx.metrics.membership import min_k_plus_plus_score
from approx.metrics.memorisation import exact_memorisation, extraction_strength, floor
from approx.metrics.probability import probability
from approx.metrics.word_overlap import rougeL_recall
from approx.unlearning.stopping import Knowledge
from approx.unlearning.written.invented_names import rename_record
from sisa.core.domain import Record
from sisa.lm.base.tokens import NO_LOSS, Tokens, answers, end_tokens, without_closing

MAX_MEASURED, MAX_CONTINUED, MAX_CONTINUATION_TOKENS = 64, 16, 48
MAX_RELEARNT, MAX_ASKED = 4, 16

MEASURE_LIMITS = (
    "extraction strength: the floor of an answer of L tokens is 1/L, not 0, and one odd token late in "
    "the answer hides all before it",
    "exact memorisation: much of a sentence is grammar, so that knowing nothing scores above 0",
    "probability: normalised by length, it favours long answers whose end follows from their beginning",
    "ROUGE-L recall: greedy answers only; a paraphrase scores low, a wrong name in the right phrase "
    "high, and text in other scripts than Latin scores 0",
    "min-k%++: large by a guard where the model is certain; no threshold of membership is fitted",
    "utility: on the part of the retain set that was not trained on",
    "still known: by the probe's criterion, for the very wording; of at most 32 texts",
)


def measure_patch(
    model: Any, tokenizer: Any, forget: Sequence[Tokens], retain: Sequence[Tokens]
) -> dict[str, float]:
    """Return all measures of a model as it is."""
    asked = forget[:MAX_MEASURED]
    known = score_examples(model, asked)
    inner = [_inner(*pair, tokenizer) for pair in zip(known, asked, strict=True)]
    kept = score_examples(model, retain[:MAX_MEASURED])
    found = {
        "forget_extraction_strength": fmean([extraction_strength(each.correct) for each in inner]),
        "forget_extraction_floor": fmean([floor(each.num_tokens) for each in inner]),
        "forget_exact_memorisation": fmean([exact_memorisation(each.correct) for each in inner]),
        "forget_probability": fmean([probability(each.loss) for each in known]),
        "forget_min_k_plus_plus": fmean(
            [min_k_plus_plus_score(each.logprobs, each.means, each.variances) for each in inner]
        ),
    }
    if recalls := _recalls(model, tokenizer, forget):
        found["forget_rougeL_recall"] = fmean(recalls)
    if kept:
        found["retain_probability"] = fmean([probability(each.loss) for each in kept])
        found["retain_utility"] = _utility(kept)
    return found


def _inner(score: AnswerScore, tokens: Tokens, tokenizer: Any) -> AnswerScore:
    """Return a score without the tokens that close the answer."""
    inner = without_closing(tokens, tokenizer).labels[1:]  # the first is never predicted
    counted = zip(inner, tokens.labels[1:], strict=True)
    return score.only([kept != NO_LOSS for kept, label in counted if label != NO_LOSS])


def measure_utility(model: Any, retain: Sequence[Tokens]) -> float:
    """Return exp(-mean NLL per answer token) on the first texts of the retain set."""
    return _utility(score_examples(model, retain[:MAX_MEASURED]))


def measure_knowledge(
    model: Any, tokenizer: Any, texts: Sequence[Answers], *, thorough: bool
) -> Knowledge:
    """Return how many texts a model knows by the probe's criterion, and its answers' mean probability.

    Without `thorough` nothing is continued, and a text counts as known where it may be.
    """
    chosen = [each for each in texts if each][:MAX_PROBED]
    rows = [(at, *pair) for at, each in enumerate(chosen) for pair in each]
    found = score_examples(model, [answered(*pair) for _, *pair in rows])
    known = {at for (at, _, _), score in zip(rows, found, strict=True) if may_know(score)}
    count = len(known)
    if thorough and known:
        probed = probe_answers(model, tokenizer, [chosen[at] for at in sorted(known)])
        count = sum(each.known for each in probed)
    return Knowledge(count, len(chosen), fmean([probability(each.loss) for each in found]))


def _utility(kept: Sequence[AnswerScore]) -> float:
    total = math.fsum(each for score in kept for each in score.logprobs)
    return math.exp(total / sum(each.num_tokens for each in kept))


def _recalls(model: Any, tokenizer: Any, forget: Sequence[Tokens]) -> list[float]:
    most = getattr(model.config, "max_position_embeddings", None) or math.inf
    pairs = [
        pair
        for each in forget
        for pair in answers(each, tokenizer)
        if each.labels[0] == NO_LOSS and len(pair[0]) <= most - MAX_CONTINUATION_TOKENS
    ][:MAX_CONTINUED]
    if not pairs:
        return []
    ends = end_tokens(model, tokenizer)
    generated = continue_greedily(model, [prompt for prompt, _ in pairs], ends, MAX_CONTINUATION_TOKENS)
    words = partial(tokenizer.decode, skip_special_tokens=True)
    return [
        rougeL_recall(words(list(answer[:MAX_CONTINUATION_TOKENS])), words(list(row)))
        for (_, answer), row in zip(pairs, generated, strict=True)
    ]


def measure_robustness(
    model: Any,
    tokenizer: Any,
    records: Sequence[Record],
    sequence_len: int,
    reference: Any = None,
) -> dict[str, Any]:
    """Return measures of the patch that is active in `model`, a PEFT model, on texts to forget."""
    few, first = records[:MAX_ASKED], records[:MAX_RELEARNT]
    asked = AttackSets(tokenizer, few, sequence_len=sequence_len)
    taught = replace(asked, asked=first, taught=first)
    relearning = Relearning()(model, taught, seed=0)
    rewording = Rewording()(model, asked, seed=0)
    with model.disable_adapter():
        known = fmean(probabilities(model, taught.examples("asked")))
        reworded = Rewording()(model, asked, seed=0)
    return {
        "num_texts": len(few),
        "num_relearnt": len(first),
        "relearning": relearning.means,
        "steps_until_half": relearning.steps_until_half(known),
        "control": _control(model, taught, reference),
        "rounding": Quantisation()(model, asked, seed=0).means,
        "rewording": {"before": reworded.mean, "after": rewording.mean} if rewording.values else None,
    }


def _control(model: Any, taught: AttackSets, reference: Any) -> dict[str, Any] | None:
    """Return what a model that never knew the texts learns in as many steps."""
    if reference is not None:
        return {"of": "the reference", **Relearning()(reference, taught, seed=0).means}
    renamed = [other for each in taught.asked if (other := rename_record(each, 0)) is not None]
    sets = replace(taught, asked=renamed, taught=renamed)
    if not sets.tokens(renamed):
        return None
    return {"of": "invented names and figures", **Relearning()(model, sets, seed=0).means}
