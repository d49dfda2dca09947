"""What a patch does to the shards' own answers: they were trained over another stack of patches.

Rules: up to `limit` remaining records are asked, the first of each shard by keyed digest, so that the
choice depends on them alone; none whose text a patch is to forget, nor any that the served checkpoint of
its shard was not trained on. Each record is asked of its own
shard's model and of the base alone, over the patches before and after, given the true tokens. What is
told are numbers: no text, no id.

    answer probability   mean over the answer's tokens, before and after
    agreement            share of the answer's tokens before which both find the same token likeliest
    KL                   KL(before || after) of the next token, mean over the answer's tokens, in nats

Not covered: what the patch was made for (its report); generated answers; records of shards that serve
no model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from sisa.core.domain import Record, RecordRow
from sisa.core.events import Notice
from sisa.core.measured import MIN_RECORDS
from sisa.core.patch import Patch
from sisa.flows.ask import live_heads, open_answerer
from sisa.flows.wiring.parts import Parts
from sisa.flows.wiring.world import World, slices_of, stored_in
from sisa.lm.answer.route import Route, all_of
from sisa.planning.plan import touched

if TYPE_CHECKING:
    from sisa.lm.answer.answerer import Answerer

MAX_RECORDS = 32
NUM_TOLD = 8  # lines of progress, at most


@dataclass(frozen=True)
class AnswerChange:
    """Means over records; each record is the mean over its answer's tokens."""

    num_records: int
    answer_probability_before: float
    answer_probability_after: float
    agreement: float
    kl: float


@dataclass(frozen=True)
class Composition:
    """None where nothing could be asked; `by_shard` holds the shards of which records were asked."""

    num_records: int
    base: AnswerChange | None
    shards: AnswerChange | None
    by_shard: Mapping[int, AnswerChange]

    def to_json(self) -> dict[str, Any]:
        """Numbers alone, none of fewer than MIN_RECORDS records: a report outlives them."""
        by_shard = {str(shard): _kept(each) for shard, each in self.by_shard.items()}
        means = {"base": _kept(self.base), "shards": _kept(self.shards)}
        return {"num_records": self.num_records, **means, "by_shard": by_shard}


def _kept(effect: AnswerChange | None) -> dict[str, Any] | None:
    return asdict(effect) if effect is not None and effect.num_records >= MIN_RECORDS else None


def measure(
    world: World,
    parts: Parts,
    before: Sequence[Patch],
    after: Sequence[Patch],
    limit: int = MAX_RECORDS,
) -> Composition:
    """Ask over both stacks, lowest patch first. Raises IntegrityError."""
    live = sorted(live_heads(world))
    asked = _tokens(world, parts, _chosen(world, live, limit))
    if not asked:
        return Composition(0, None, None, {})
    shards = sorted({shard for shard, _, _ in asked})
    old, new = (open_answerer(world, parts, shards, stack) for stack in (before, after))
    base = [_compared(old, new, ids, answer, Route()) for _, ids, answer in asked]
    own = [_compared(old, new, ids, answer, all_of([shard])) for shard, ids, answer in asked]
    by_shard = {
        shard: _mean([each for (of, _, _), each in zip(asked, own, strict=True) if of == shard])
        for shard in shards
    }
    return Composition(len(asked), _mean(base), _mean(own), by_shard)


def merged_gap(world: World, parts: Parts, limit: int = MAX_RECORDS) -> tuple[int, float, float]:
    """Of how many remaining records the mean answer probability is what: asked of their own shards'
    models, and of the mean of all shards' adapters."""
    live = sorted(live_heads(world))
    asked = _tokens(world, parts, _chosen(world, live, limit))
    sums = {"routed": 0.0, "merged": 0.0}
    done, whole = 0, len(sums) * len(asked)
    for how in sums:
        answerer = open_answerer(world, parts, how=how)
        for shard, ids, answer in asked:
            route = all_of([shard] if how == "routed" else live)
            sums[how] += answerer.answer_probability(ids[: answer[0]], ids[answer[0] :], route)
            done += 1
            if done * NUM_TOLD // whole > (done - 1) * NUM_TOLD // whole:
                told = "comparing the average with the shards' own answers"
                world.report(Notice(f"{told}: {done} of {whole} asked"))
    count = max(1, len(asked))
    return len(asked), sums["routed"] / count, sums["merged"] / count


def _chosen(world: World, shards: Sequence[int], limit: int) -> list[RecordRow]:
    """Rows of the records to ask: one of each shard in turn, until there are enough."""
    forgotten = {
        id_digest
        for found in world.ledger.vault()
        if found.role == "forget"
        for id_digest in world.ledger.vaulted(found.name)
    }
    heads = {each.key: each for each in world.ledger.checkpoints()}
    live = {shard: heads[key] for shard, key in live_heads(world).items()}
    known = [[row for row in world.ledger.rows(s) if touched(live[s], row)] for s in shards]
    return _in_turn([_first(rows, forgotten, limit) for rows in known], limit)


def _first(rows: Sequence[RecordRow], without: Collection[str], limit: int) -> list[RecordRow]:
    found = [row for row in rows if row.id_digest not in without]
    return sorted(found, key=lambda row: row.id_digest)[:limit]


def _in_turn(rows: Sequence[Sequence[RecordRow]], limit: int) -> list[RecordRow]:
    ranks = range(max(map(len, rows), default=0))
    return [of[rank] for rank in ranks for of in rows if rank < len(of)][:limit]


Asked = tuple[int, list[int], list[int]]  # shard, ids, and where in them the answer's tokens are


def _tokens(world: World, parts: Parts, rows: Sequence[RecordRow]) -> list[Asked]:
    place = {row.id_digest: row.shard for row in rows}
    stored = stored_in(world, slices_of(world, rows), rows)
    found = []
    for each in sorted(stored, key=lambda each: each.id_digest):
        ids, answer = _answer(each.record, parts)
        if answer:
            found.append((place[each.id_digest], ids, answer))
    return found


def _answer(record: Record, parts: Parts) -> tuple[list[int], list[int]]:
    """Ids, and the places of those that are the answer's; none where there is nothing to predict."""
    from sisa.lm.base.tokens import NO_LOSS, tokenize

    config = parts.config
    tokens = tokenize(record, parts.tokenizer, train_on_inputs=config.train_on_inputs)
    ids, labels = tokens.input_ids[: config.sequence_len], tokens.labels[: config.sequence_len]
    return ids, [at for at, label in enumerate(labels) if label != NO_LOSS and at > 0]


def _compared(
    old: Answerer, new: Answerer, ids: Sequence[int], answer: Sequence[int], route: Route
) -> AnswerChange:
    import torch

    start = answer[0]
    rows = torch.tensor([at - start for at in answer])
    true = torch.tensor([[ids[at]] for at in answer])
    least = torch.finfo(torch.float32).tiny  # KL stays finite where a probability rounds to 0
    p_KV, q_KV = (
        each.answer_probabilities_KV(ids[:start], ids[start:], route)[rows] for each in (old, new)
    )
    return AnswerChange(
        num_records=1,
        answer_probability_before=float(p_KV.gather(-1, true).mean()),
        answer_probability_after=float(q_KV.gather(-1, true).mean()),
        agreement=float((p_KV.argmax(-1) == q_KV.argmax(-1)).float().mean()),
        kl=float((torch.xlogy(p_KV, p_KV) - torch.xlogy(p_KV, q_KV.clamp_min(least))).sum(-1).mean()),
    )


def _mean(effects: Sequence[AnswerChange]) -> AnswerChange:
    count = len(effects)
    return AnswerChange(
        num_records=count,
        answer_probability_before=sum(each.answer_probability_before for each in effects) / count,
        answer_probability_after=sum(each.answer_probability_after for each in effects) / count,
        agreement=sum(each.agreement for each in effects) / count,
        kl=sum(each.kl for each in effects) / count,
    )
