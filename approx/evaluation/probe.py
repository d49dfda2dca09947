"""The probe of a model: whether it produces a text by itself, as numbers and a count of known records.

    extraction strength   of the answer's tokens, given the true ones before them
    exact memorisation    of the same tokens
    continuation          ROUGE-L recall of the greedy continuation of the prompt, which is followed
                          beyond the first token that is not the answer's only where the verdict depends
                          on it: elsewhere a lower bound
    membership margin     Min-K%++ of the answer above that of its neighbour: at each position the
                          model's own choice, given the true tokens before it (Mattern et al. 2023 take
                          their neighbours from a masked model). About 0 for what the model says anyway,
                          negative for what it would not say; no threshold is fitted

An answer counts as known when its extraction strength is at least KNOWN_STRENGTH and its last token is
right, or when the greedy continuation recalls KNOWN_RECALL of it and the same share of its tokens is
memorised. Recall alone is not enough: a base that knows how such answers are phrased recalls everything
but the names. So one forward decides nearly always, and nothing is decoded token by token.

The tokens of an answer are those of `sisa.lm.base.tokens.answers`. A record with several answers has
the numbers of the one that is known best. The second half of a plain text is its answer. The result is
approximate, holds no text, and does not cover knowledge under another wording.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from approx.evaluation.answer_score import AnswerScore
from approx.evaluation.answers import answered, score_examples
from approx.evaluation.continuations import continue_greedily
from approx.metrics.membership import min_k_plus_plus_score
from approx.metrics.memorisation import exact_memorisation, extraction_strength
from approx.metrics.word_overlap import rougeL_recall
from sisa.config.config import RunConfig
from sisa.core.domain import BaseFiles, Kind, Record
from sisa.core.requests import Probed
from sisa.lm.base.numerics import pin_threads
from sisa.lm.base.tokens import NO_LOSS, Tokens, Untokenizable, answers, end_tokens, tokenize
from sisa.lm.base.weights import load_patched

MAX_PROBED, MAX_SECONDS = 32, 60.0  # of a deletion, whose erasure waits meanwhile
RECORDS_AT_ONCE = 8
MAX_ANSWER_TOKENS, MAX_ANSWERS = 64, 4  # per record
KNOWN_RECALL, KNOWN_STRENGTH = 0.9, 0.5


def open_probe(base: BaseFiles, config: RunConfig, patches: Sequence[Mapping[str, bytes]]) -> BaseProbe:
    """Open the probe of a model's base under patches, the lowest patch first."""
    threads = config.sisa.threads_per_shard
    return BaseProbe(base, threads, config.sequence_len, patches)


@dataclass(frozen=True)
class BaseProbe:
    """A `sisa.core.ports.Probe` of one base, with or without patches."""

    base: BaseFiles
    threads: int
    sequence_len: int
    patches: Sequence[Mapping[str, bytes]] = ()

    def __call__(self, records: Sequence[Record]) -> Probed:
        """Probe records; those that cannot be tokenized are left out.

        Raise IntegrityError for another base, or for a patch that does not fit.
        """
        pin_threads(self.threads)
        model, tokenizer = load_patched(self.base, self.patches)
        chosen = [_answers(each, tokenizer, self.sequence_len) for each in records[:MAX_PROBED]]
        found = probe_answers(model, tokenizer, chosen, MAX_SECONDS)
        if not found:
            return Probed(len(records))
        return Probed(
            num_records=len(records),
            num_probed=len(found),
            num_known=sum(each.known for each in found),
            extraction_strength=_mean([each.strength for each in found]),
            exact_memorisation=_mean([each.memorised for each in found]),
            membership_margin=_mean([each.margin for each in found]),
            continuation=_mean([each.recall for each in found]),
        )


Answers = Sequence[tuple[Sequence[int], Sequence[int]]]  # of one record: (prompt ids, answer ids)


@dataclass(frozen=True)
class ProbedAnswer:
    """The numbers of one answer, or of a record's best-known answer."""

    strength: float
    memorised: float
    recall: float
    margin: float
    ends_right: bool  # whether the likeliest last token is the true one

    @property
    def known(self) -> bool:
        recalled = min(self.recall, self.memorised) >= KNOWN_RECALL
        return recalled or (self.ends_right and self.strength >= KNOWN_STRENGTH)


def probe_answers(
    model: Any, tokenizer: Any, records: Sequence[Answers], max_seconds: float = math.inf
) -> list[ProbedAnswer]:
    """Return the numbers of records that have an answer, as many as the time allows."""
    found: list[ProbedAnswer] = []
    started = time.monotonic()
    left = [each[:MAX_ANSWERS] for each in records if each]
    for start in range(0, len(left), RECORDS_AT_ONCE):
        if found and time.monotonic() - started > max_seconds:
            break
        rows = left[start : start + RECORDS_AT_ONCE]
        numbers = iter(_numbers(model, tokenizer, [pair for each in rows for pair in each]))
        found += [
            max(islice(numbers, len(each)), key=lambda one: (one.known, one.strength, one.recall))
            for each in rows
        ]
    return found


def may_know(score: AnswerScore) -> bool:
    """Return whether an answer with this score, without its closing tokens, may count as known.

    As in the probe, its first MAX_ANSWER_TOKENS decide.

    >>> zeros = (0.0,) * 4
    >>> may_know(AnswerScore(zeros, (True, False, False, False), zeros, zeros, likeliest=zeros))
    False
    """
    first = score.only([at < MAX_ANSWER_TOKENS for at in range(score.num_tokens)])
    return _rated(first, recall=1.0).known


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4)


def _answers(record: Record, tokenizer: Any, sequence_len: int) -> Answers:
    """Return a record's answers, or none when the record cannot be tokenized."""
    try:
        tokens = tokenize(record, tokenizer, train_on_inputs=False)
    except Untokenizable:
        return []
    return answers_to_probe(record.kind, tokens, tokenizer, sequence_len)


def answers_to_probe(
    kind: Kind, tokens: Tokens, tokenizer: Any, sequence_len: int | None = None
) -> Answers:
    """Return the answers that a record is probed for: of a plain text the second half."""
    ids, labels = tokens.input_ids[:sequence_len], list(tokens.labels[:sequence_len])
    if kind == "text":
        half = len(ids) // 2
        labels[:half] = [NO_LOSS] * half
    return answers(Tokens(ids, labels), tokenizer)


def _numbers(model: Any, tokenizer: Any, pairs: Answers) -> list[ProbedAnswer]:
    asked = [(list(prompt), list(answer[:MAX_ANSWER_TOKENS])) for prompt, answer in pairs]
    scores = score_examples(model, [answered(*pair) for pair in asked])
    said = [  # greedily, as far as it is the answer
        answer[: [*score.correct, False].index(False)]
        for (_, answer), score in zip(asked, scores, strict=True)
    ]
    words = partial(tokenizer.decode, skip_special_tokens=True)

    def numbers_of(at: int) -> ProbedAnswer:
        return _rated(scores[at], rougeL_recall(words(asked[at][1]), words(said[at])))

    found = [numbers_of(at) for at in range(len(asked))]
    if undecided := [at for at, one in enumerate(found) if may_know(scores[at]) and not one.known]:
        prompts = [asked[at][0] + said[at] for at in undecided]
        most = max(len(asked[at][1]) - len(said[at]) for at in undecided)
        ends = end_tokens(model, tokenizer)
        continued = continue_greedily(model, prompts, ends, most, min_new_tokens=most)
        for at, more in zip(undecided, continued, strict=True):
            said[at] = (said[at] + more)[: len(asked[at][1])]
            found[at] = numbers_of(at)
    return found


def _rated(score: AnswerScore, recall: float) -> ProbedAnswer:
    own, chosen = (
        min_k_plus_plus_score(each, score.means, score.variances)
        for each in (score.logprobs, score.likeliest)
    )
    return ProbedAnswer(
        strength=extraction_strength(score.correct),
        memorised=exact_memorisation(score.correct),
        recall=recall,
        margin=own - chosen,
        ends_right=score.correct[-1],
    )
