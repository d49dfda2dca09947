"""Ask the model: choose the constituent models that answer a prompt, and let them answer.

A prompt is a text, or a conversation that ends with a person's turn. The choice depends on the remaining
records and the served heads alone (`lm/routing/lookup.py`, `lm/routing/route.py`). Active patches lie
beneath every answering model, the base alone included. Adapters and patches are checked against the
ledger before they are parsed.

Shards get a text in the form that most records had when the model was first trained, the base alone as a
turn of a chat if it has a chat template. `kind` chooses another form for both. A conversation is always
sent as a chat.

How probable the models find the answers of records that they hold is measured on the first records of
each shard by keyed digest, so that the choice depends on the remaining records alone. Records whose text
a patch should forget are left out, and so are records on which their shard's served checkpoint was not
trained. Only numbers are returned: no text, no id.

A service keeps its constituents loaded (`Serving`). It compares the heads that it has with those that
are served now, and replaces only what has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Any

from sisa.config.config import SisaBlock
from sisa.core.domain import Hit, Kind, Record, RecordRow
from sisa.core.errors import IntegrityError, InvalidInput, Outdated
from sisa.core.events import Notice
from sisa.core.ledger_meta import FORM
from sisa.core.patches import Patch, active
from sisa.core.ports import Ledger, Vectors
from sisa.data.record_rules import conversation_problems, turns_of
from sisa.flows.context.context import Context, patch_files
from sisa.flows.context.resources import Resources
from sisa.flows.context.served import servable, served_keys
from sisa.flows.context.slices import slices_of, stored_in
from sisa.flows.routing import route_of, routing_hits
from sisa.lm.routing.route import Route, all_of
from sisa.planning.plan import touched

if TYPE_CHECKING:
    from sisa.lm.answer.answerer import Answerer
    from sisa.lm.answer.continuous import Key
    from sisa.lm.routing.lookup import Index, Query

MAX_RECORDS = 32
NUM_REPORTED = 8  # most lines of progress
KINDS: tuple[Kind, ...] = ("chat", "completion", "text")

Asked = tuple[int, list[int], list[int]]  # shard, token ids, positions of the answer's tokens
Prompt = str | Sequence[Mapping[str, Any]]  # a text, or turns with `role` and `content`


@dataclass(frozen=True)
class Answer:
    """Hold an answer and the shards whose models gave it; no shards means the base alone."""

    text: str
    shards: tuple[int, ...]

    @property
    def ended_at_once(self) -> bool:
        """Whether the answer is empty: the models ended it before any word."""
        return not self.text


@dataclass(frozen=True)
class Routed:
    """A prompt's token ids and the shards that answer it, as of commit `seq` of the ledger."""

    ids: list[int]
    route: Route
    seq: int


@dataclass(frozen=True)
class ServedHeads:
    """What is served at one moment: the heads by shard, the patches beneath, and the settings."""

    seq: int  # of the ledger's last commit
    heads: Mapping[int, str]  # keys of checkpoints
    manifests: Mapping[str, str]  # of all checkpoints that may be served, by key
    stack: tuple[Patch, ...]
    settings: tuple[str, ...]  # the run file and the base

    @classmethod
    def read(cls, ledger: Ledger) -> ServedHeads:
        """Return what a ledger says is served now."""
        with ledger.snapshot():
            may = servable(ledger)
            return cls(
                ledger.seq(),
                served_keys(ledger),
                {each.key: each.manifest_sha256 for each in ledger.checkpoints() if each.key in may},
                tuple(active(ledger.patches())),
                tuple(ledger.meta().get(name, "") for name in ("config", "base")),
            )


OpenLedger = Callable[[], AbstractContextManager[Ledger]]


def ask(
    context: Context,
    resources: Resources,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    kind: Kind | None,
    open_ledger: OpenLedger,
) -> list[Answer]:
    """Return the answers to prompts, in order. Raise InvalidInput or IntegrityError."""
    _check_answerable(prompts, kind)
    with ThreadPoolExecutor(1) as background:  # hash the embedder and the base while torch is imported
        if resources.config.sisa.aggregation.method == "routed":
            background.submit(lambda: resources.embedder)
        background.submit(lambda: resources.base)
        import sisa.lm.answer.answerer  # noqa: F401

        routes = routes_of(context, resources, prompts)
    asked = {shard for route in routes for shard in route.shards}
    answerer = open_answerer(context, resources, asked, open_ledger=open_ledger)
    ids = _encoded(context, prompts, routes, answerer.tokenizer, kind)
    texts = answerer.generate(ids, routes, max_new_tokens)
    return [Answer(text.strip(), route.shards) for text, route in zip(texts, routes, strict=True)]


def route_and_encode(
    context: Context, resources: Resources, prompts: Sequence[Prompt], kind: Kind | None
) -> list[Routed]:
    """Return what a batch needs to answer each prompt. Raise InvalidInput."""
    _check_answerable(prompts, kind)
    seq = context.stores.ledger.seq()
    routes = routes_of(context, resources, prompts)
    ids = _encoded(context, prompts, routes, resources.tokenizer, kind)
    return [Routed(each, route, seq) for each, route in zip(ids, routes, strict=True)]


def _encoded(
    context: Context,
    prompts: Sequence[Prompt],
    routes: Sequence[Route],
    tokenizer: Any,
    kind: Kind | None,
) -> list[list[int]]:
    """Return the prompts' token ids in the form of `kind`, or in the one that each route expects."""
    from sisa.lm.base.tokens import encode_prompt, form_alone

    own = prompt_form(context)
    alone = form_alone(tokenizer) or own
    return [
        encode_prompt(
            each if isinstance(each, str) else turns_of(each),
            tokenizer,
            kind or (own if route.shards else alone),
        )
        for each, route in zip(prompts, routes, strict=True)
    ]


def _check_answerable(prompts: Sequence[Prompt], kind: Kind | None) -> None:
    for number, prompt in enumerate(prompts, start=1):
        if isinstance(prompt, str):
            continue
        problems = list(conversation_problems(prompt))
        if kind not in (None, "chat"):
            problems.append(f"a conversation can't take the form {kind}")
        if problems:
            raise InvalidInput(
                "the conversation can't be answered",
                where=f"prompt {number} of {len(prompts)}",
                got="; ".join(problems),
                expected="turns as a record's `messages` have them, a user's or a tool's last",
            )


def routes_of(context: Context, resources: Resources, prompts: Sequence[Prompt]) -> list[Route]:
    """Return which shards answer each prompt."""
    block, live_shards = resources.config.sisa, frozenset(served_keys(context.stores.ledger))
    if block.aggregation.method != "routed":
        return [all_of(live_shards)] * len(prompts)
    from sisa.lm.routing.lookup import look_up

    index, temperature = _index(context, block), block.aggregation.temperature
    queries = [_query(prompt) for prompt in prompts]
    found = iter(look_up([each for each in queries if each], index, temperature, live_shards))
    nearest = [next(found) if each else None for each in queries]
    return [
        route_of(context, block, each.hits, live_shards, each.near) if each else Route()
        for each in nearest
    ]


def _query(prompt: Prompt) -> Query | None:
    """Return what a person asks and the turns before it (by the assistant if users name nobody)."""
    from sisa.lm.routing.lookup import Query
    from sisa.lm.routing.names import names_in

    if isinstance(prompt, str):
        return Query(prompt)
    turns = turns_of(prompt)
    texts = [turn.text for turn in turns if turn.role == "user" and turn.text.strip()]
    if not texts:
        return None
    before = texts[-2::-1]
    if not any(map(names_in, before)):
        before += [turn.text for turn in reversed(turns) if turn.role == "assistant"]
    return Query(texts[-1], tuple(before))


def _index(context: Context, block: SisaBlock) -> Index:
    from sisa.lm.routing.lookup import Index

    files = {file.shard: file for file in context.stores.ledger.indexes()}

    def vectors(hits: Sequence[Hit]) -> Vectors:
        import numpy as np

        by_shard: dict[int, list[int]] = {}
        for hit in hits:
            by_shard.setdefault(hit.shard, []).append(hit.vector_id)
        read = context.stores.index.vectors
        return np.concatenate([read(files[s], ids, by="prompts") for s, ids in by_shard.items()])

    return Index(
        embed=context.compute.embed,
        search=lambda queries, top_k: routing_hits(context, queries, top_k),
        vectors=vectors,
        has_names=block.names,
    )


def open_answerer(
    context: Context,
    resources: Resources,
    shards: Collection[int] | None = None,
    stack: Sequence[Patch] | None = None,
    how: str | None = None,
    open_ledger: OpenLedger | None = None,
    now: ServedHeads | None = None,
) -> Answerer:
    """Open the models of some shards, or of all shards that serve one. Raise IntegrityError.

    They lie over the patches of `stack` (default: the active ones), and are combined as `how` says
    (default: as the run file does). With `open_ledger` they refuse to answer once outdated; without, the
    caller keeps writers out. `now` is what is served, if the caller has read it.
    """
    from sisa.lm.answer.answerer import Answerer

    now = now or ServedHeads.read(context.stores.ledger)
    stack = now.stack if stack is None else stack
    asked = sorted(now.heads if shards is None else shards)
    adapters = _load(context, now, asked)
    patches = patch_files(context.stores.patches, stack)
    base, block = resources.base, resources.config.sisa
    method, threads = how or block.aggregation.method, block.threads_per_shard
    precision = resources.config.precision
    answerer = Answerer(base, adapters, threads, patches, method, precision)
    if open_ledger is not None:
        loaded = replace(now, heads={shard: now.heads[shard] for shard in asked}, stack=tuple(stack))
        answerer.check_current = _check_still_served(open_ledger, loaded)
    return answerer


def _load(context: Context, now: ServedHeads, shards: Collection[int]) -> dict[int, dict[str, bytes]]:
    """Return the files of some shards' heads. Raise IntegrityError."""
    if any(now.heads.get(shard) not in now.manifests for shard in shards):
        raise IntegrityError(
            "a shard should answer, but its checkpoint is not held",
            next_step="run `sisa verify`; restore the model directory from a backup",
        )
    keys = {shard: now.heads[shard] for shard in shards}
    load = context.stores.checkpoints.load
    return {shard: load(key, now.manifests[key]) for shard, key in keys.items()}


def _check_still_served(open_ledger: OpenLedger, loaded: ServedHeads) -> Callable[[], None]:
    """Return a check that raises Outdated once an adapter may not be served or the patches change."""
    seq, patches = loaded.seq, [each.key for each in loaded.stack]

    def check() -> None:
        nonlocal seq
        with open_ledger() as ledger:
            if ledger.seq() == seq:
                return
            now = ServedHeads.read(ledger)
        held = set(loaded.heads.values()) <= now.manifests.keys()
        if not held or [each.key for each in now.stack] != patches:
            raise Outdated(
                "the model has changed since its adapters were loaded: they may contain records that "
                "are deleted or restricted by now",
                next_step="load them again by `answerer()` or `as_transformers()`, or run the command "
                "again",
            )
        seq = now.seq

    return check


class Serving:
    """A batch whose constituents are kept at what the model serves."""

    def __init__(self, context: Context, resources: Resources, **limits: int) -> None:
        """Load all constituents; `limits` are those of ContinuousBatching. Raise IntegrityError."""
        from sisa.lm.answer.continuous import ContinuousBatching

        self.served = ServedHeads.read(context.stores.ledger)
        self.batch = ContinuousBatching(open_answerer(context, resources, now=self.served), **limits)
        self._former: list[tuple[int, str]] = []  # heads that requests may still run on
        self._cut: list[Key] = []

    def adopt(self, context: Context, resources: Resources) -> list[Key]:
        """Replace what is no longer served; return the keys of requests cut short.

        Tainted models are dropped first, so that they answer nothing even if this raises IntegrityError;
        the next call then loads what is missing, and returns all keys.
        """
        now = ServedHeads.read(context.stores.ledger)
        tainted = {shard for shard, key in self.served.heads.items() if key not in now.manifests}
        tainted_former = {shard for shard, key in self._former if key not in now.manifests}
        self._cut += self.batch.switch(dict.fromkeys(tainted), tainted | tainted_former)
        heads = {shard: key for shard, key in self.served.heads.items() if shard not in tainted}
        before = self.served = replace(self.served, heads=heads)
        if (before.stack, before.settings) != (now.stack, now.settings):
            self._cut += self.batch.switch(open_answerer(context, resources, now=now))
            self._former = []
        else:
            shards = before.heads.keys() | now.heads.keys()
            changed = {shard for shard in shards if before.heads.get(shard) != now.heads.get(shard)}
            adapters: dict[int, dict[str, bytes] | None] = dict.fromkeys(changed)
            adapters |= _load(context, now, changed & now.heads.keys())
            self._cut += self.batch.switch(adapters)
            self._former += [(shard, key) for shard, key in heads.items() if shard in changed]
        self._former = [(shard, key) for shard, key in self._former if key in now.manifests]
        self.served = now
        cut, self._cut = self._cut, []
        return cut


def prompt_form(context: Context) -> Kind:
    """Return the form of prompts for shards: that of most records of the first training, if noted."""
    noted = context.stores.ledger.meta().get(FORM)
    return next((each for each in KINDS if each == noted), usual_kind(context.stores.ledger.kinds()))


def usual_kind(kinds: Mapping[str, int]) -> Kind:
    """Return the form of most records, given their counts.

    >>> usual_kind({"text": 1, "completion": 2})
    'completion'
    """
    return max(KINDS, key=lambda kind: kinds.get(kind, 0))


def asked_records(context: Context, resources: Resources, limit: int = MAX_RECORDS) -> list[Asked]:
    """Return the tokens of the records to ask, at most `limit`, without those that have no answer."""
    rows = chosen_rows(context, limit)
    place = {row.id_digest: row.shard for row in rows}
    stored = stored_in(context, slices_of(context, rows), rows)
    found = [
        (place[each.id_digest], *_tokens_to_ask(each.record, resources))
        for each in sorted(stored, key=lambda each: each.id_digest)
    ]
    return [(shard, ids, answer) for shard, ids, answer in found if answer]


def merged_gap(context: Context, resources: Resources) -> tuple[int, float, float]:
    """Return the number of records asked, and their mean answer probability by shards and merged."""
    asked = asked_records(context, resources)
    sums = {"routed": 0.0, "merged": 0.0}
    done, whole = 0, len(sums) * len(asked)
    for how in sums:
        answerer = open_answerer(context, resources, how=how)
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


def _tokens_to_ask(record: Record, resources: Resources) -> tuple[list[int], list[int]]:
    """Return a record's token ids and the positions of the answer's tokens; none if it has no answer."""
    from sisa.lm.base.tokens import NO_LOSS, tokenize

    config = resources.config
    tokens = tokenize(record, resources.tokenizer, train_on_inputs=config.train_on_inputs)
    ids, labels = tokens.input_ids[: config.sequence_len], tokens.labels[: config.sequence_len]
    return ids, [at for at, label in enumerate(labels) if label != NO_LOSS and at > 0]
