"""Asking the model: which constituent models answer, and what they say together.

Rules: the choice depends on the remaining records and the served heads alone. Adapters are checked
against the ledger before anything parses them. A prompt is put to the model as most of the remaining
records are written.

Not covered: decoding (`model/answer.py`), choosing among hits (`model/route.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sisa import query
from sisa.domain import Kind
from sisa.opening import Parts
from sisa.world import World

NUM_ROUTING_HITS = 8


@dataclass(frozen=True)
class Answer:
    """An answer and the shards whose models gave it; none means the base alone."""

    text: str
    shards: tuple[int, ...]


def ask(
    world: World, parts: Parts, prompts: Sequence[str], max_new_tokens: int, kind: Kind | None
) -> list[Answer]:
    """Answers to prompts, in order; the models are loaded once. Raises IntegrityError."""
    from sisa.model.answer import Answerer
    from sisa.model.tokens import encode_prompt

    live = {head.shard: head.key for head in world.ledger.heads() if head.key is not None}
    routes = [_route(world, parts, prompt, frozenset(live)) for prompt in prompts]
    manifests = {each.key: each.manifest_sha256 for each in world.ledger.checkpoints()}
    adapters = {
        shard: world.checkpoints.load(live[shard], manifests[live[shard]])
        for shard in sorted({shard for route in routes for shard in route})
    }
    kind = kind or _usual_kind(world)
    base = parts.base
    threads = parts.config.sisa.threads_per_shard
    answerer = Answerer(base.directory, base.digest, adapters, threads)
    answers = []
    for prompt, route in zip(prompts, routes, strict=True):
        ids = encode_prompt(prompt, answerer.tokenizer, kind)
        answers.append(Answer(answerer.generate(ids, route, max_new_tokens).strip(), route))
    return answers


def _route(world: World, parts: Parts, prompt: str, live: frozenset[int]) -> tuple[int, ...]:
    from sisa.model.route import choose_shards

    how = parts.config.sisa.aggregation
    hits = []
    if how.method == "routed":
        hits = query.search(world, world.embed([prompt]), NUM_ROUTING_HITS)
    return choose_shards(hits, how.method, how.top_k, live)


def _usual_kind(world: World) -> Kind:
    kinds = world.ledger.kinds()
    choices: tuple[Kind, ...] = ("chat", "completion", "text")
    return max(choices, key=lambda kind: kinds.get(kind, 0))
