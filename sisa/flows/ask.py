"""Ask the model: choose the constituent models that answer a prompt, and let them answer.

A prompt is a text, or a conversation that ends with a person's turn. The index is searched for what the
person asks there, with who is named there or before (`lm/answer/lookup.py`). The choice depends on the
remaining records and the served heads alone. Active patches lie beneath every answering model, and on
the base if it answers alone. Adapters and patches are checked against the ledger before they are parsed.

Shards get a text in the form that most records had when the model was first trained. The base alone gets
it as one turn of a chat if it has a chat template. `kind` chooses another form for both. A conversation
is always sent as a chat.

`lm/answer/answerer.py` decodes, `lm/answer/route.py` chooses among hits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from sisa.config.config import RunConfig, SisaBlock
from sisa.core.digest import digest_of
from sisa.core.domain import Hit, Kind, Patch, active
from sisa.core.errors import IntegrityError, InvalidInput, Outdated
from sisa.core.ports import Change, Ledger, Vectors
from sisa.data.record_rules import conversation_problems, turns_of
from sisa.flows import query
from sisa.flows.wiring.context import Context, Resources, commit, patch_files
from sisa.lm.answer.route import NUM_ROUTING_HITS, Route, all_of, choose_route, resolve_aggregation
from sisa.store.index import EXACT_UP_TO

if TYPE_CHECKING:
    from sisa.lm.answer.answerer import Answerer
    from sisa.lm.answer.lookup import Index, Said

MAX_LOOKED_UP = 200  # records whose prompts `held_prompts` looks up
FORM = "form"  # key in the ledger's meta: the form in which shards get prompts
HELD_PROMPTS = "held_prompts"  # in the ledger's meta: what becomes of held prompts, and in which state
KINDS: tuple[Kind, ...] = ("chat", "completion", "text")

Prompt = str | Sequence[Mapping[str, Any]]  # a text, or turns with `role` and `content`


@dataclass(frozen=True)
class Answer:
    """Hold an answer and the shards whose models gave it; no shards means the base alone."""

    text: str
    shards: tuple[int, ...]

    @property
    def ended_at_once(self) -> bool:
        """Whether nothing was said: the models ended the answer before any word."""
        return not self.text


@dataclass(frozen=True)
class HeldPrompts:
    """Count what happens to prompts of held records when they are asked word for word."""

    looked_up: int
    turned_away: int  # near no record, or the shard serves nothing: `below` decides who answers
    elsewhere: int  # answered first by another shard than the record's own


OpenLedger = Callable[[], AbstractContextManager[Ledger]]


@dataclass
class LoadedModels:
    """Hold the models that an answerer loaded, and the ledger's number when they were last current."""

    open_ledger: OpenLedger
    seq: int
    keys: frozenset[str]
    patches: tuple[str, ...]

    def check_current(self) -> None:
        """Raise Outdated if the ledger has dropped one of the adapters or serves other patches."""
        with self.open_ledger() as ledger, ledger.snapshot():
            seq = ledger.seq()
            if seq == self.seq:
                return
            held = {each.key for each in ledger.checkpoints()}
            patches = tuple(each.key for each in active(ledger.patches()))
        if not self.keys <= held or self.patches != patches:
            raise Outdated(
                "the model has changed since its adapters were loaded: they may contain deleted records",
                next_step="load them again by `answerer()` or `as_transformers()`, or run the command "
                "again",
            )
        self.seq = seq


def ask(
    context: Context,
    resources: Resources,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    kind: Kind | None,
    open_ledger: OpenLedger,
) -> list[Answer]:
    """Return the answers to prompts, in order; the models are loaded once.

    Raise InvalidInput for a conversation that can't be answered, IntegrityError for damaged files.
    """
    from sisa.lm.base.tokens import encode_prompt

    _check_answerable(prompts, kind)
    routes = routes_of(context, resources, prompts)
    asked = {shard for route in routes for shard in route.shards}
    answerer = open_answerer(context, resources, asked, open_ledger=open_ledger)
    own = prompt_form(context)
    alone: Kind = "chat" if answerer.tokenizer.chat_template else own
    forms = [kind or (own if route.shards else alone) for route in routes]
    ids = [
        encode_prompt(each if isinstance(each, str) else turns_of(each), answerer.tokenizer, form)
        for each, form in zip(prompts, forms, strict=True)
    ]
    texts = answerer.generate(ids, routes, max_new_tokens)
    return [Answer(text.strip(), route.shards) for text, route in zip(texts, routes, strict=True)]


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
    block, live = resources.config.sisa, frozenset(live_heads(context))
    if block.aggregation.method != "routed":
        return [all_of(live)] * len(prompts)
    from sisa.lm.answer.lookup import look_up

    index, warm = _index(context, block), block.aggregation.temperature
    said = [_said(prompt) for prompt in prompts]
    found = iter(look_up([each for each in said if each], index, warm, live))
    nearest = [next(found) if each else None for each in said]
    return [_route(context, block, each.hits, live, each.near) if each else Route() for each in nearest]


def _said(prompt: Prompt) -> Said | None:
    """Return what a person asks in a prompt, and what was said before; None if nobody asks anything.

    What was said before is the user's turns, and the assistant's if those name nobody.
    """
    from sisa.lm.answer.lookup import Said
    from sisa.lm.answer.names import names_in

    if isinstance(prompt, str):
        return Said(prompt)
    turns = turns_of(prompt)
    texts = [turn.text for turn in turns if turn.role == "user" and turn.text.strip()]
    if not texts:
        return None
    before = texts[-2::-1]
    if not any(map(names_in, before)):
        before += [turn.text for turn in reversed(turns) if turn.role == "assistant"]
    return Said(texts[-1], tuple(before))


def _index(context: Context, block: SisaBlock) -> Index:
    from sisa.lm.answer.lookup import Index

    files = {file.shard: file for file in context.stores.ledger.indexes()}

    def vectors(hits: Sequence[Hit]) -> Vectors:
        import numpy as np

        by_shard: dict[int, list[int]] = {}
        for hit in hits:
            by_shard.setdefault(hit.shard, []).append(hit.vector_id)
        index = context.stores.index
        return np.concatenate([index.vectors(files[s], ids, by="asked") for s, ids in by_shard.items()])

    return Index(
        embed=context.compute.embed,
        search=lambda queries, top_k: query.search_each(context, queries, top_k, by="asked"),
        vectors=vectors,
        has_names=block.names,
    )


def _route(
    context: Context,
    block: SisaBlock,
    hits: Sequence[Hit],
    live: Collection[int],
    near: float | None = None,
) -> Route:
    kind: Kind = "completion"
    if hits:
        rows = context.stores.ledger.by_vector(hits[0].shard, [hits[0].vector_id])
        kind = rows[hits[0].vector_id].kind if rows else kind
    return choose_route(hits, resolve_aggregation(block.aggregation, block.embedder, kind), live, near)


def held_prompts(context: Context, config: RunConfig) -> HeldPrompts | None:
    """Return what `remember_prompts` noted if nothing that it depends on has changed, or look it up."""
    noted = json.loads(context.stores.ledger.meta().get(HELD_PROMPTS, "null"))
    if noted and noted["of"] == _looked_up_in(context, config):
        return HeldPrompts(**noted["found"])
    return _look_up_prompts(context, config)


def remember_prompts(context: Context, config: RunConfig) -> HeldPrompts | None:
    """Note in the ledger what becomes of held prompts, so that `sisa status` need not search for it."""
    found = held_prompts(context, config)
    note = json.dumps({"of": _looked_up_in(context, config), "found": found and asdict(found)})
    if found and context.stores.ledger.meta().get(HELD_PROMPTS) != note:
        commit(context, Change(meta={HELD_PROMPTS: note}))
    return found


def _looked_up_in(context: Context, config: RunConfig) -> str:
    """Return the digest of what a search for held prompts depends on."""
    indexes = sorted([each.shard, each.sha256] for each in context.stores.ledger.indexes())
    how = config.sisa.model_dump(mode="json", include={"aggregation", "embedder"})
    return digest_of([indexes, sorted(live_heads(context)), how])


def _look_up_prompts(context: Context, config: RunConfig) -> HeldPrompts | None:
    """Look up the prompts of held records: of all, or of the first ones of each shard by keyed id.

    Return None if the model does not route, if no record has a prompt, or if the index is damaged or so
    large that the search would take long.
    """
    files = [each for each in context.stores.ledger.indexes() if each.num_vectors]
    how = config.sisa.aggregation
    if how.method != "routed" or sum(each.num_vectors for each in files) > EXACT_UP_TO:
        return None
    block = config.sisa.model_copy(update={"aggregation": how.model_copy(update={"below": "base"})})
    live, counted = frozenset(live_heads(context)), [0, 0, 0]
    for file in files:
        rows = context.stores.ledger.rows(file.shard)[: -(-MAX_LOOKED_UP // len(files))]
        asking = sorted(row.vector_id for row in rows if row.kind != "text")
        try:
            vectors = context.stores.index.vectors(file, asking, by="asked")
            found = query.search_each(context, vectors, NUM_ROUTING_HITS, by="asked")
        except IntegrityError:
            return None  # `sisa doctor` says what is damaged
        routes = [_route(context, block, hits, live) for hits in found]
        counted[0] += len(routes)
        counted[1] += sum(not route.shards for route in routes)
        counted[2] += sum(bool(route.shards) and route.shards[0] != file.shard for route in routes)
    return HeldPrompts(*counted) if counted[0] else None


def open_answerer(
    context: Context,
    resources: Resources,
    shards: Collection[int] | None = None,
    stack: Sequence[Patch] | None = None,
    how: str | None = None,
    open_ledger: OpenLedger | None = None,
) -> Answerer:
    """Open the models of some shards, or of all shards that serve one.

    They lie over the active patches, or over those of `stack`, and are combined as the run file says, or
    as `how` says. With `open_ledger`, they refuse to answer once the ledger has dropped them; without
    it, the caller keeps writers out. Raise IntegrityError.
    """
    ledger = context.stores.ledger
    from sisa.lm.answer.answerer import Answerer

    with ledger.snapshot():
        seq = ledger.seq()
        live = live_heads(context)
        manifests = {each.key: each.manifest_sha256 for each in ledger.checkpoints()}
        stack = active(ledger.patches()) if stack is None else stack
    asked = sorted(live if shards is None else shards)
    if any(live.get(shard) not in manifests for shard in asked):
        raise IntegrityError(
            "a shard should answer, but its checkpoint is not held",
            next_step="run `sisa verify`; restore the model directory from a backup",
        )
    adapters = {
        each: context.stores.checkpoints.load(live[each], manifests[live[each]]) for each in asked
    }
    patches = patch_files(context.stores.patches, stack)
    base, block = resources.base, resources.config.sisa
    method, threads = how or block.aggregation.method, block.threads_per_shard
    on = resources.config.precision
    answerer = Answerer(base.directory, base.digest, adapters, threads, patches, method, on)
    if open_ledger is not None:
        loaded = frozenset(live[each] for each in asked), tuple(each.key for each in stack)
        answerer.check_current = LoadedModels(open_ledger, seq, *loaded).check_current
    return answerer


def live_heads(context: Context) -> dict[int, str]:
    """Return the key of the served adapter of each shard that serves one."""
    return {head.shard: head.key for head in context.stores.ledger.heads() if head.key is not None}


def prompt_form(context: Context) -> Kind:
    """Return the form in which shards get prompts: that of most records of the first training.

    A model that predates this note uses the form of most remaining records.
    """
    noted, kinds = context.stores.ledger.meta().get(FORM), context.stores.ledger.kinds()
    return next((each for each in KINDS if each == noted), usual_kind(kinds))


def usual_kind(kinds: Mapping[str, int]) -> Kind:
    """Return the form of most records, given their counts.

    >>> usual_kind({"text": 1, "completion": 2})
    'completion'
    """
    return max(KINDS, key=lambda kind: kinds.get(kind, 0))
