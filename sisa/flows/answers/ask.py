"""Ask the model: choose the constituent models that answer a prompt, and let them answer.

A prompt is a text, or a conversation that ends with a person's turn. The choice depends on the remaining
records and the served heads alone (`lm/routing/lookup.py`, `lm/routing/route.py`).

Shards get a text in the form that most records had when the model was first trained, the base alone as a
turn of a chat if it has a chat template. `kind` chooses another form for both. A conversation is always
sent as a chat.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sisa.config.config import SisaBlock
from sisa.core.domain import Hit, Kind
from sisa.core.errors import InvalidInput
from sisa.core.ledger_meta import FORM
from sisa.core.ports import Vectors
from sisa.data.record_rules import conversation_problems, turns_of
from sisa.flows.answers.routing import route_of, routing_hits
from sisa.flows.answers.serving import OpenLedger, open_answerer
from sisa.flows.context.context import Context
from sisa.flows.context.served import served_keys
from sisa.lm.routing.route import Route, all_of

if TYPE_CHECKING:
    from sisa.lm.routing.lookup import Index, Query

KINDS: tuple[Kind, ...] = ("chat", "completion", "text")

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


def ask(
    context: Context,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    kind: Kind | None,
    open_ledger: OpenLedger,
) -> list[Answer]:
    """Return the answers to prompts, in order. Raise InvalidInput or IntegrityError."""
    _check_answerable(prompts, kind)
    with ThreadPoolExecutor(1) as background:  # hash the embedder and the base while torch is imported
        if context.settings.config.sisa.aggregation.method == "routed":
            background.submit(context.compute.embedder)
        background.submit(context.compute.base)
        import sisa.lm.answer.answerer  # noqa: F401

        routes = routes_of(context, prompts)
    asked = {shard for route in routes for shard in route.shards}
    answerer = open_answerer(context, asked, open_ledger=open_ledger)
    ids = _encoded(context, prompts, routes, answerer.tokenizer, kind)
    texts = answerer.generate(ids, routes, max_new_tokens)
    return [Answer(text.strip(), route.shards) for text, route in zip(texts, routes, strict=True)]


def route_and_encode(context: Context, prompts: Sequence[Prompt], kind: Kind | None) -> list[Routed]:
    """Return what a batch needs to answer each prompt. Raise InvalidInput."""
    _check_answerable(prompts, kind)
    seq = context.stores.ledger.seq()
    routes = routes_of(context, prompts)
    ids = _encoded(context, prompts, routes, context.compute.tokenizer(), kind)
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


def routes_of(context: Context, prompts: Sequence[Prompt]) -> list[Route]:
    """Return which shards answer each prompt."""
    block, live_shards = context.settings.config.sisa, frozenset(served_keys(context.stores.ledger))
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
        embed=context.compute.embedder().embed,
        search=lambda queries, top_k: routing_hits(context, queries, top_k),
        vectors=vectors,
        has_names=block.names,
    )


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
