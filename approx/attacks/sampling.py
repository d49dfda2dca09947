"""Sampling: the best of k sampled answers, because a greedy answer hides what lies beside it.

Curve: leak@k, the expected ROUGE-L recall of the best of k answers sampled at temperature 1, by k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, fsum, inf
from typing import Any, ClassVar

from approx.attacks.attack import Attack, AttackSets, Curve
from approx.evaluation.continuations import continue_sampled
from approx.metrics.word_overlap import rougeL_recall
from sisa.core.domain import Record
from sisa.lm.base.tokens import encode_prompt, end_tokens

SAMPLES, MAX_SAMPLE_TOKENS = 8, 64
SAMPLED_AT_ONCE = 64  # decoding reads all weights for each step of a batch


@dataclass(frozen=True)
class LeakAtK(Attack):
    """leak@1 and leak@`samples`, without plain texts and prompts that leave no room for an answer."""

    name: ClassVar[str] = "leak_at_k"
    samples: int = SAMPLES
    max_new_tokens: int = MAX_SAMPLE_TOKENS

    def __call__(self, model: Any, sets: AttackSets, seed: int) -> Curve:
        asked = [each for each in sets.asked if _answer_at(each)]
        prompts = [_prompt_ids(each, sets.tokenizer) for each in asked]
        longest = inf if sets.sequence_len is None else sets.sequence_len - self.max_new_tokens
        fits = [pair for pair in zip(asked, prompts, strict=True) if len(pair[1]) <= longest]
        ids = [prompt for _, prompt in fits for _ in range(self.samples)]
        ends = end_tokens(model, sets.tokenizer) if sets.ends is None else sets.ends
        drawn = continue_sampled(
            model, ids, ends, self.max_new_tokens, 1.0, seed, SAMPLED_AT_ONCE, min_new_tokens=0
        )
        answers = [sets.tokenizer.decode(each, skip_special_tokens=True) for each in drawn]
        truths = [each.parts[_answer_at(each)].text for each, _ in fits for _ in range(self.samples)]
        recalls = [rougeL_recall(truth, text) for truth, text in zip(truths, answers, strict=True)]
        starts = range(0, len(recalls), self.samples)
        scores = [recalls[at : at + self.samples] for at in starts]
        strengths = (1, self.samples) if scores else ()
        return Curve("ROUGE-L recall", {k: [leak_at_k(each, k) for each in scores] for k in strengths})


def _answer_at(record: Record) -> int:
    """Return the position of a record's first answer, 0 if it has none after a prompt."""
    roles = [part.role in ("completion", "assistant") for part in record.parts]
    return roles.index(True) if True in roles else 0


def _prompt_ids(record: Record, tokenizer: Any) -> list[int]:
    before = record.parts[: _answer_at(record)]
    if record.kind == "chat":
        return encode_prompt(before, tokenizer, "chat")
    return encode_prompt("".join(part.text for part in before), tokenizer, record.kind)


def leak_at_k(scores: Sequence[float], k: int) -> float:
    """Return how much of an answer the best of k sampled ones gives away, in expectation.

    Formula: of n >= k samples with scores s_(1) <= ... <= s_(n), the expected best of k drawn without
    replacement, sum_i s_(i) C(i-1, k-1) / C(n, k), which is unbiased for the best of k new samples.

    Source: Reisizadeh et al. (2025, arXiv 2511.04934); the estimator as that of pass@k (Chen et al.
    2021).

    Limits: it depends on the temperature, and rises with k for any model that says anything, so it must
    be compared with a model that never saw the text.
    """
    ordered, ways = sorted(scores), comb(len(scores), k)
    return fsum(score * comb(at, k - 1) for at, score in enumerate(ordered)) / ways
