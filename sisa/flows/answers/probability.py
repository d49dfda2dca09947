"""Measure how probable the models find the answers of records that they hold.

The first records of each shard by keyed digest are asked, so that the choice depends on the remaining
records alone. Records whose text a patch should forget are left out, and so are records on which their
shard's served checkpoint was not trained. Only numbers are returned: no text, no id.
"""

from __future__ import annotations

from itertools import chain, zip_longest

from sisa.core.domain import Record, RecordRow
from sisa.core.events import Notice
from sisa.flows.answers.serving import open_answerer
from sisa.flows.context.context import Context
from sisa.flows.context.served import served_keys
from sisa.flows.context.slices import slices_of, stored_in
from sisa.lm.routing.route import all_of
from sisa.planning.plan import touched

MAX_RECORDS = 32
NUM_REPORTED = 8  # most lines of progress

Asked = tuple[int, list[int], list[int]]  # shard, token ids, positions of the answer's tokens


def asked_records(context: Context, limit: int = MAX_RECORDS) -> list[Asked]:
    """Return the tokens of the records to ask, at most `limit`, without those that have no answer."""
    rows = chosen_rows(context, limit)
    place = {row.id_digest: row.shard for row in rows}
    stored = stored_in(context, slices_of(context, rows), rows)
    found = [
        (place[each.id_digest], *_tokens_to_ask(context, each.record))
        for each in sorted(stored, key=lambda each: each.id_digest)
    ]
    return [(shard, ids, answer) for shard, ids, answer in found if answer]


def merged_gap(context: Context) -> tuple[int, float, float]:
    """Return the number of records asked, and their mean answer probability by shards and merged."""
    asked = asked_records(context)
    sums = {"routed": 0.0, "merged": 0.0}
    done, whole = 0, len(sums) * len(asked)
    for how in sums:
        answerer = open_answerer(context, how=how)
        for shard, ids, answer in asked:
            route = all_of([shard] if how == "routed" else served_keys(context.stores.ledger))
            sums[how] += answerer.answer_probability(ids[: answer[0]], ids[answer[0] :], route)
            done += 1
            if done * NUM_REPORTED // whole > (done - 1) * NUM_REPORTED // whole:
                what = "comparing the average with the shards' own answers"
                context.report(Notice(f"{what}: {done} of {whole} asked"))
    count = max(1, len(asked))
    return len(asked), sums["routed"] / count, sums["merged"] / count


def chosen_rows(context: Context, limit: int) -> list[RecordRow]:
    """Return the rows of the records to ask: one of each shard in turn, until there are enough."""
    ledger = context.stores.ledger
    forget = [each.name for each in ledger.vault() if each.role == "forget"]
    forgotten = {id_digest for name in forget for id_digest in ledger.vaulted(name)}
    checkpoints = {each.key: each for each in ledger.checkpoints()}
    by_shard = []
    for shard, key in sorted(served_keys(ledger).items()):
        known = [row for row in ledger.rows(shard) if touched(checkpoints[key], row)]
        asked = [row for row in known if row.id_digest not in forgotten]
        by_shard.append(sorted(asked, key=lambda row: row.id_digest)[:limit])
    in_turn = chain.from_iterable(zip_longest(*by_shard))
    return [row for row in in_turn if row is not None][:limit]


def _tokens_to_ask(context: Context, record: Record) -> tuple[list[int], list[int]]:
    """Return a record's token ids and the positions of the answer's tokens; none if it has no answer."""
    from sisa.lm.base.tokens import NO_LOSS, tokenize

    config = context.settings.config
    tokens = tokenize(record, context.compute.tokenizer(), train_on_inputs=config.train_on_inputs)
    ids, labels = tokens.input_ids[: config.sequence_len], tokens.labels[: config.sequence_len]
    return ids, [at for at, label in enumerate(labels) if label != NO_LOSS and at > 0]
