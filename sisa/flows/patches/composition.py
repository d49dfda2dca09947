"""Measure the effect of a patch on the shards' own answers: they were trained over other patches.

Each of the chosen records (`flows/answers/probability.py`) is asked of its own shard's model and of the
base alone, over the patches before and after, given the true tokens. Only numbers are returned: no text,
no id.

    answer probability   mean over the answer's tokens, before and after
    agreement            share of the answer's tokens with the same likeliest token before and after
    KL                   KL(before || after) of the next token, mean over the answer's tokens, in nats
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import TYPE_CHECKING, Any

from sisa.core.patches import Patch
from sisa.flows.answers.probability import MAX_RECORDS, asked_records
from sisa.flows.answers.serving import open_answerer
from sisa.flows.context.context import Context
from sisa.lm.routing.route import Route, all_of
from sisa.store.metrics import MIN_RECORDS

if TYPE_CHECKING:
    from sisa.lm.answer.answerer import Answerer

LEAST = 2.0**-126  # the least normal float32: KL stays finite where a probability rounds to 0


@dataclass(frozen=True)
class AnswerChange:
    """Hold means over records; the value of a record is the mean over its answer's tokens."""

    num_records: int
    answer_probability_before: float
    answer_probability_after: float
    agreement: float
    kl: float


@dataclass(frozen=True)
class Composition:
    """Hold the effect on the base and on the shards; None if no record was asked.

    `by_shard` holds the shards of the records that were asked.
    """

    num_records: int
    base: AnswerChange | None
    shards: AnswerChange | None
    by_shard: Mapping[int, AnswerChange]

    @property
    def drift(self) -> float | None:
        """Return the share of the shards' answer tokens that changed; None if no record was asked."""
        return None if self.shards is None else 1 - self.shards.agreement

    def to_json(self) -> dict[str, Any]:
        """Return numbers alone; none over fewer than MIN_RECORDS: a report outlives the records."""

        def kept(effect: AnswerChange | None) -> dict[str, Any] | None:
            return asdict(effect) if effect and effect.num_records >= MIN_RECORDS else None

        by_shard = {str(shard): kept(each) for shard, each in self.by_shard.items()}
        means = {"base": kept(self.base), "shards": kept(self.shards)}
        return {"num_records": self.num_records, **means, "by_shard": by_shard}


def measure(
    context: Context,
    before: Sequence[Patch],
    after: Sequence[Patch],
    limit: int = MAX_RECORDS,
) -> Composition:
    """Compare the answers over both stacks, lowest patch first. Raise IntegrityError."""
    asked = asked_records(context, limit)
    if not asked:
        return Composition(0, None, None, {})
    shards = sorted({shard for shard, _, _ in asked})
    old, new = (open_answerer(context, shards, stack) for stack in (before, after))
    base = [_compared(old, new, ids, answer, Route()) for _, ids, answer in asked]
    own = [_compared(old, new, ids, answer, all_of([shard])) for shard, ids, answer in asked]
    by_shard = {
        shard: _mean([each for (of, _, _), each in zip(asked, own, strict=True) if of == shard])
        for shard in shards
    }
    return Composition(len(asked), _mean(base), _mean(own), by_shard)


def _compared(
    old: Answerer, new: Answerer, ids: Sequence[int], answer: Sequence[int], route: Route
) -> AnswerChange:
    start = answer[0]
    rows = [at - start for at in answer]
    true = list(range(len(answer))), [ids[at] for at in answer]
    p_KV, q_KV = (
        each.answer_probabilities_KV(ids[:start], ids[start:], route)[rows] for each in (old, new)
    )
    return AnswerChange(
        num_records=1,
        answer_probability_before=float(p_KV[true].mean()),
        answer_probability_after=float(q_KV[true].mean()),
        agreement=float((p_KV.argmax(-1) == q_KV.argmax(-1)).float().mean()),
        kl=float((p_KV.xlogy(p_KV) - p_KV.xlogy(q_KV.clamp_min(LEAST))).sum(-1).mean()),
    )


def _mean(effects: Sequence[AnswerChange]) -> AnswerChange:
    sums = [sum(values) for values in zip(*map(astuple, effects), strict=True)]
    return AnswerChange(len(effects), *(each / len(effects) for each in sums[1:]))
