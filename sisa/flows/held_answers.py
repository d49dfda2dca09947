"""Measure the probability that shards give to the answers of records that they hold.

Up to `limit` remaining records are asked, the first of each shard by keyed digest, so that the choice
depends on the records alone. Records whose text a patch should forget are left out, and so are records
on which the served checkpoint of their shard was not trained. Only numbers are returned: no text, no id.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sisa.core.domain import Record, RecordRow
from sisa.core.events import Notice
from sisa.flows.ask import live_heads, open_answerer
from sisa.flows.wiring.context import Context, Resources, slices_of, stored_in
from sisa.lm.answer.route import all_of
from sisa.planning.plan import touched

MAX_RECORDS = 32
NUM_REPORTED = 8  # most lines of progress

Asked = tuple[int, list[int], list[int]]  # shard, token ids, positions of the answer's tokens


def asked_records(context: Context, resources: Resources, limit: int = MAX_RECORDS) -> list[Asked]:
    """Return the tokens of the records to ask."""
    return _tokens(context, resources, chosen_rows(context, sorted(live_heads(context)), limit))


def merged_gap(
    context: Context, resources: Resources, limit: int = MAX_RECORDS
) -> tuple[int, float, float]:
    """Return the number of records asked and two means of their answer probability.

    The first mean is under each record's own shard, the second under the mean of all adapters.
    """
    live = sorted(live_heads(context))
    asked = asked_records(context, resources, limit)
    sums = {"routed": 0.0, "merged": 0.0}
    done, whole = 0, len(sums) * len(asked)
    for how in sums:
        answerer = open_answerer(context, resources, how=how)
        for shard, ids, answer in asked:
            route = all_of([shard] if how == "routed" else live)
            sums[how] += answerer.answer_probability(ids[: answer[0]], ids[answer[0] :], route)
            done += 1
            if done * NUM_REPORTED // whole > (done - 1) * NUM_REPORTED // whole:
                what = "comparing the average with the shards' own answers"
                context.report(Notice(f"{what}: {done} of {whole} asked"))
    count = max(1, len(asked))
    return len(asked), sums["routed"] / count, sums["merged"] / count


def chosen_rows(context: Context, shards: Sequence[int], limit: int) -> list[RecordRow]:
    """Return the rows of the records to ask: one of each shard in turn, until there are enough."""
    ledger = context.stores.ledger
    forgotten = {
        id_digest
        for found in ledger.vault()
        if found.role == "forget"
        for id_digest in ledger.vaulted(found.name)
    }
    heads = {each.key: each for each in ledger.checkpoints()}
    live = {shard: heads[key] for shard, key in live_heads(context).items()}
    known = [[row for row in ledger.rows(s) if touched(live[s], row)] for s in shards]
    return _in_turn([_first(rows, forgotten, limit) for rows in known], limit)


def _first(rows: Sequence[RecordRow], without: Collection[str], limit: int) -> list[RecordRow]:
    found = [row for row in rows if row.id_digest not in without]
    return sorted(found, key=lambda row: row.id_digest)[:limit]


def _in_turn(rows: Sequence[Sequence[RecordRow]], limit: int) -> list[RecordRow]:
    ranks = range(max(map(len, rows), default=0))
    return [of[rank] for rank in ranks for of in rows if rank < len(of)][:limit]


def _tokens(context: Context, resources: Resources, rows: Sequence[RecordRow]) -> list[Asked]:
    place = {row.id_digest: row.shard for row in rows}
    stored = stored_in(context, slices_of(context, rows), rows)
    found = []
    for each in sorted(stored, key=lambda each: each.id_digest):
        ids, answer = _answer(each.record, resources)
        if answer:
            found.append((place[each.id_digest], ids, answer))
    return found


def _answer(record: Record, resources: Resources) -> tuple[list[int], list[int]]:
    """Return a record's token ids and the positions of the answer's tokens; none if it has no answer."""
    from sisa.lm.base.tokens import NO_LOSS, tokenize

    config = resources.config
    tokens = tokenize(record, resources.tokenizer, train_on_inputs=config.train_on_inputs)
    ids, labels = tokens.input_ids[: config.sequence_len], tokens.labels[: config.sequence_len]
    return ids, [at for at, label in enumerate(labels) if label != NO_LOSS and at > 0]
