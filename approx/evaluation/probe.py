"""The probe of a model: whether it produces a text by itself, as numbers and a count of known records.

    extraction strength   of the answer's tokens, given the true ones before them
    exact memorisation    of the same tokens
    continuation          ROUGE-L recall of the greedy continuation of the prompt
    membership margin     Min-K%++ of the answer above the mean of its neighbours: the answer cut after
                          some share and continued by the model itself (Mattern et al. 2023 take their
                          neighbours from a masked model). About 0 for what the model says anyway,
                          negative for what it would not say; no threshold is fitted

An answer counts as known when its extraction strength is at least KNOWN_STRENGTH and its last token is
right, or when the greedy continuation recalls KNOWN_RECALL of it and the same share of its tokens is
memorised. Recall alone is not enough: a base that knows how such answers are phrased recalls everything
but the names.

The tokens of an answer are those of `sisa.lm.base.tokens.answers`. A record with several answers has
the numbers of the one that is known best. The second half of a plain text is its answer. The result is
approximate, holds no text, and does not cover knowledge under another wording.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from approx.evaluation.answer_tree import can_branch
from approx.evaluation.answers import MAX_POSITIONS
from approx.evaluation.cut_answers import continue_apart, continue_together
from approx.evaluation.evaluated import AnswerScore
from approx.metrics.membership import min_k_plus_plus_score
from approx.metrics.memorisation import exact_memorisation, extraction_strength, rougeL_recall
from sisa.config.config import RunConfig
from sisa.core.domain import Kind, Probed, Record
from sisa.lm.base.low_rank import patched_name
from sisa.lm.base.numerics import fingerprint, pin_threads
from sisa.lm.base.tokens import NO_LOSS, Tokens, Untokenizable, answers, end_tokens, tokenize
from sisa.lm.base.weights import load_patched

MAX_PROBED, MAX_SECONDS = 32, 60.0  # erasure of the text waits meanwhile
RECORDS_AT_ONCE = 8
MAX_ANSWER_TOKENS, MAX_ANSWERS = 64, 4  # per record
SHARES = 3  # neighbours continue the prompt, a third and two thirds of the answer
KNOWN_RECALL, KNOWN_STRENGTH = 0.9, 0.5


def open_probe(
    base_dir: Path, base_digest: str, config: RunConfig, patches: Sequence[Mapping[str, bytes]]
) -> BaseProbe:
    """Open the probe of a model's base under patches, the lowest patch first."""
    threads = config.sisa.threads_per_shard
    return BaseProbe(base_dir, base_digest, threads, config.sequence_len, patches)


@dataclass(frozen=True)
class BaseProbe:
    """A `sisa.core.ports.Probe` of one base, with or without patches."""

    base_dir: Path
    base_digest: str
    threads: int
    sequence_len: int
    patches: Sequence[Mapping[str, bytes]] = ()

    def __call__(self, records: Sequence[Record]) -> Probed:
        """Probe records; those that cannot be tokenized are left out.

        Raise IntegrityError for another base, or for a patch that does not fit.
        """
        pin_threads(self.threads)
        model, tokenizer = load_patched(self.base_dir, self.base_digest, self.patches)
        chosen = [_answers(each, tokenizer, self.sequence_len) for each in records[:MAX_PROBED]]
        known = (patched_name(self.base_digest, self.patches), fingerprint(self.threads))
        found = probe_answers(model, tokenizer, chosen, known)
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
    model: Any, tokenizer: Any, records: Sequence[Answers], known: Sequence[str] = ()
) -> list[ProbedAnswer]:
    """Return the numbers of records that have an answer, as many as MAX_SECONDS allow.

    `known` is that of `can_branch`.
    """
    found: list[ProbedAnswer] = []
    started = time.monotonic()
    left = [each[:MAX_ANSWERS] for each in records if each]
    branches = bool(left) and can_branch(
        model, max(len(each[-1][0]) for each in left) + MAX_ANSWER_TOKENS, known
    )
    for rows in _batches(left):
        if found and time.monotonic() - started > MAX_SECONDS:
            break
        pairs = [pair for each in rows for pair in each]
        numbers = iter(_numbers(model, tokenizer, pairs, branches=branches))
        found += [
            max(islice(numbers, len(each)), key=lambda one: (one.known, one.strength, one.recall))
            for each in rows
        ]
    return found


def _batches(records: Sequence[Answers]) -> Iterator[list[Answers]]:
    """Yield the records that are probed at once."""
    rows: list[Answers] = []
    for each in records:
        size = sum(len(one[-1][0]) + MAX_ANSWER_TOKENS for one in (*rows, each))
        if rows and (len(rows) == RECORDS_AT_ONCE or size > MAX_POSITIONS):
            yield rows
            rows = []
        rows.append(each)
    if rows:
        yield rows


def may_know(score: AnswerScore) -> bool:
    """Return whether an answer with this score, without its closing tokens, may count as known.

    >>> may_know(AnswerScore((0.0,) * 4, (True, False, False, False), (), ()))
    False
    """
    strength = extraction_strength(score.correct)
    memorised = exact_memorisation(score.correct)
    return ProbedAnswer(strength, memorised, 1.0, 0.0, score.correct[-1]).known


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


def _numbers(model: Any, tokenizer: Any, pairs: Answers, *, branches: bool) -> list[ProbedAnswer]:
    asked = [(list(prompt), list(answer[:MAX_ANSWER_TOKENS])) for prompt, answer in pairs]
    cuts = [[len(answer) * share // SHARES for share in range(SHARES)] for _, answer in asked]
    continued = continue_together if branches else continue_apart
    found = []
    said = continued(model, asked, cuts, end_tokens(model, tokenizer))
    for (_, answer), each in zip(asked, said, strict=True):
        words = [tokenizer.decode(ids, skip_special_tokens=True) for ids in (answer, each.continued[0])]
        found.append(
            ProbedAnswer(
                strength=extraction_strength(each.score.correct),
                memorised=exact_memorisation(each.score.correct),
                recall=rougeL_recall(*words),
                margin=_min_k(each.score) - sum(map(_min_k, each.scores)) / SHARES,
                ends_right=each.score.correct[-1],
            )
        )
    return found


def _min_k(score: AnswerScore) -> float:
    return min_k_plus_plus_score(score.logprobs, score.means, score.variances)
