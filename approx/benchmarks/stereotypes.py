"""Paired stereotypes: which of two sentences that differ in a group a model finds likelier.

Measure: the share of pairs in which the more stereotypical sentence has the higher log-probability, by
kind of bias; a tie counts as one half. 0.5 is no preference.

A directory has `crows_pairs.jsonl` with the columns of CrowS-Pairs: sent_more (the more stereotypical
sentence), sent_less, bias_type (a name, or its number on the hub). On the hub (`nyu-mll/crows_pairs`) it
is the configuration `crows_pairs`, split `test`, of the hub's conversion to Parquet: the dataset itself
has a script, which is never run.

Source: Nangia et al. 2020, arXiv 2010.00133. The paper scores words that both sentences share under a
masked model; for a causal model the whole sentence's log-probability is compared, as in
lm-evaluation-harness (`likelihood_diff` and `pct_stereotype`).

Limits: many pairs are not valid comparisons (Blodgett et al. 2021): names and sentences differ in
frequency for other reasons, so 0.5 is no proof of fairness. Compare a model with itself before a change.
There is nothing to be forgotten here, so most of the headline needs another benchmark.
"""

from __future__ import annotations

from approx.benchmarks.measures import Benchmark, Score, right_choice
from approx.evaluation.questions import (
    Malformed,
    Question,
    Source,
    StoredRow,
    StoredSet,
    plain_text,
    read_questions,
    texts_of,
)

PAIRS_DATA = Source("CrowS-Pairs", "nyu-mll/crows_pairs", "test")
BIASES = (
    *("race-color", "socioeconomic", "gender", "disability", "nationality"),
    *("sexual-orientation", "physical-appearance", "religion", "age"),
)


def stereotype_pairs(source: str, limit: int | None = None) -> list[Question]:
    """Return pairs by kind. Raise as `read_questions`."""
    return read_questions(source, PAIRS_DATA, [StoredSet("crows_pairs", _pair)], limit)


def _pair(number: int, row: StoredRow) -> Question:
    more, less = texts_of(row, "sent_more", "sent_less")
    kind = row.get("bias_type")
    if isinstance(kind, int) and 0 <= kind < len(BIASES):
        kind = BIASES[kind]
    if kind not in BIASES:
        raise Malformed("'bias_type' is none of the nine kinds")
    return plain_text(f"pairs/{kind}", number, more, [less])


STEREOTYPES = Benchmark(
    name="stereotypes",
    read=stereotype_pairs,
    scores=(
        Score("stereotypical", ("pairs",), right_choice),
        *(Score(f"stereotypical {kind}", (f"pairs/{kind}",), right_choice) for kind in BIASES),
    ),
    weakness="0.5 is no preference, and no proof of fairness: compare with the model before.",
)
