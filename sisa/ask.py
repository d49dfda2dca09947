"""Asking the model: which constituent models answer, and what they say together.

Rules: the choice depends on the remaining records and the served heads alone. Active patches lie
beneath all that answers, the base alone among it. Adapters and patches are checked against the ledger
before anything parses them. A prompt is put to the model as most of the remaining records are written.

Not covered: decoding (`model/answer.py`), choosing among hits (`model/route.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sisa import query
from sisa.domain import Kind
from sisa.model.names import nameless
from sisa.model.route import Route, all_of, choose_route, settled
from sisa.parts import Parts
from sisa.patch import Patch
from sisa.patch_plan import active
from sisa.world import World, patch_files

if TYPE_CHECKING:
    from sisa.model.answer import Answerer

NUM_ROUTING_HITS = 32


@dataclass(frozen=True)
class Answer:
    """An answer and the shards whose models gave it; none means the base alone."""

    text: str
    shards: tuple[int, ...]


def ask(
    world: World, parts: Parts, prompts: Sequence[str], max_new_tokens: int, kind: Kind | None
) -> list[Answer]:
    """Answers to prompts, in order; the models are loaded once. Raises IntegrityError."""
    from sisa.model.tokens import encode_prompt

    routes = routes_of(world, parts, prompts)
    answerer = open_answerer(world, parts, {shard for route in routes for shard in route.shards})
    kind = kind or usual_kind(world)
    ids = [encode_prompt(prompt, answerer.tokenizer, kind) for prompt in prompts]
    texts = answerer.generate(ids, routes, max_new_tokens)
    return [Answer(text.strip(), route.shards) for text, route in zip(texts, routes, strict=True)]


def routes_of(world: World, parts: Parts, prompts: Sequence[str]) -> list[Route]:
    """Who answers each prompt."""
    block, live = parts.config.sisa, frozenset(live_heads(world))
    if block.aggregation.method != "routed":
        return [all_of(live)] * len(prompts)
    if not prompts:
        return []
    vectors = world.embed(prompts)
    named = ~nameless(vectors) if block.names else [False] * len(prompts)
    kind = usual_kind(world)
    hows = {each: settled(block.aggregation, block.embedder, kind, each) for each in (False, True)}
    found = query.search_each(world, vectors, NUM_ROUTING_HITS)
    return [choose_route(hits, hows[bool(each)], live) for hits, each in zip(found, named, strict=True)]


def open_answerer(
    world: World,
    parts: Parts,
    shards: Collection[int] | None = None,
    stack: Sequence[Patch] | None = None,
    how: str | None = None,
) -> Answerer:
    """The models of some shards, or of all that serve one, ready to be asked; over the active patches,
    or over those of `stack`; together as the run file says, or as `how`. Raises IntegrityError."""
    from sisa.model.answer import Answerer

    live = live_heads(world)
    manifests = {each.key: each.manifest_sha256 for each in world.ledger.checkpoints()}
    adapters = {
        shard: world.checkpoints.load(live[shard], manifests[live[shard]])
        for shard in sorted(live if shards is None else shards)
    }
    patches = patch_files(world.patches, active(world.ledger.patches()) if stack is None else stack)
    base, block = parts.base, parts.config.sisa
    method, threads = how or block.aggregation.method, block.threads_per_shard
    on = parts.config.arithmetic
    return Answerer(base.directory, base.digest, adapters, threads, patches, method, on)


def live_heads(world: World) -> dict[int, str]:
    """Shards that serve an adapter, and its key."""
    return {head.shard: head.key for head in world.ledger.heads() if head.key is not None}


def usual_kind(world: World) -> Kind:
    """How most of the remaining records are written."""
    kinds = world.ledger.kinds()
    choices: tuple[Kind, ...] = ("chat", "completion", "text")
    return max(choices, key=lambda kind: kinds.get(kind, 0))
