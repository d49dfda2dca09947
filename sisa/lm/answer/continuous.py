"""Continuous batching: requests that route to different shards join and leave one stacked forward.

Each step reads the prompts of requests that wait, as far as there is room, and appends one token to
every running request. A request's tokens don't depend on the others beside it, up to float rounding of
its logits: each draws from a generator of its own.

    batch = ContinuousBatching(answerer)
    ids = encode_prompt("Who is Mara?", answerer.tokenizer, "text")
    batch.admit(ids, all_of([0]), Sampling(max_new_tokens=32), key="a")
    while batch.running or batch.waiting:
        for event in batch.step():
            print(event)            # Piece(key="a", text=...), ..., Ended(key="a", reason="stop", ...)

`switch` puts other adapters in place, between two steps. What runs on a tainted constituent is cut: its
keys and values are overwritten, and its request is the caller's to admit again or to give up. There is
no prefix cache. A `ContinuousBatching` belongs to one thread.

Shapes: Q requests, P rows (a constituent of a request), V words.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from sisa.core.errors import Busy
from sisa.lm.answer.answer_text import Text, Token
from sisa.lm.answer.answerer import MAX_ROWS, Answerer, combine
from sisa.lm.answer.sampling import Sampling, sampled
from sisa.lm.answer.slots import Slots
from sisa.lm.routing.route import Route

MAX_WAITING = 256
MAX_POSITIONS = 32_768  # rows times their longest request: what keys and values may take
JOINED_POSITIONS = 256  # of prompts, in one step: running requests wait for them

Key = Hashable
EndReason = Literal["stop", "length"]
AdapterFiles = Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class Piece:
    """More of an answer: text that no stop text can take back, and the tokens that begin in it."""

    key: Key
    text: str
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of an answer: by an end token or a stop text, or at `max_new_tokens`."""

    key: Key
    reason: EndReason
    num_prompt_tokens: int
    num_tokens: int  # chosen, without the end token


AnswerEvent = Piece | Ended


@dataclass
class _Request:
    """A request that waits or runs."""

    key: Key
    prompt: Sequence[int]
    route: Route
    sampling: Sampling
    text: Text
    uniform: random.Random
    num_rows: int
    adapters: Sequence[int] = ()  # that it runs on, as numbers in the stack

    @property
    def num_positions(self) -> int:
        """Return the positions of one row, at most."""
        return len(self.prompt) + self.sampling.max_new_tokens

    def take(self, token: Token, ends: Collection[int]) -> list[AnswerEvent]:
        """Return what follows from one more token."""
        is_end = token.id in ends
        if not is_end:
            self.text.add(token)
        num_tokens = len(self.text.tokens)
        is_full = num_tokens == self.sampling.max_new_tokens
        text, tokens, stopped = self.text.put_out(final=is_end or is_full)
        events: list[AnswerEvent] = [Piece(self.key, text, tokens)] if text or tokens else []
        if is_end or stopped or is_full:
            reason: EndReason = "stop" if is_end or stopped else "length"
            events.append(Ended(self.key, reason, len(self.prompt), num_tokens))
        return events


class ContinuousBatching:
    """Requests that are answered together by the constituents of one answerer."""

    def __init__(
        self,
        answerer: Answerer,
        max_rows: int = MAX_ROWS,
        max_waiting: int = MAX_WAITING,
        max_positions: int = MAX_POSITIONS,
    ) -> None:
        """Answer with an answerer, whose adapters nobody else changes from now on."""
        self.max_rows, self.max_waiting, self.max_positions = max_rows, max_waiting, max_positions
        self.answerer = answerer
        self._slots = Slots(answerer.model, answerer.stack)
        self._waiting: list[_Request] = []
        self._running: list[_Request] = []  # in the order of the slots
        self._former: dict[int, set[int]] = {}  # adapters of no new request, and their shards

    @property
    def running(self) -> list[Key]:
        """Return the keys of running requests."""
        return [each.key for each in self._running]

    @property
    def waiting(self) -> list[Key]:
        """Return the keys of waiting requests, the next one first."""
        return [each.key for each in self._waiting]

    def admit(self, prompt_ids: Sequence[int], route: Route, sampling: Sampling, key: Key) -> None:
        """Let a request wait for its turn. `key` names it, and no other one that waits or runs.

        Raise Busy if too many wait, InvalidInput for a prompt that is too long, or for shards that serve
        no model.
        """
        self.answerer.check_shards([route])
        self.answerer.check_length(len(prompt_ids), sampling.max_new_tokens)
        if len(self._waiting) >= self.max_waiting:
            raise Busy("too many requests wait to be answered", next_step="ask again later")
        decode = partial(self.answerer.tokenizer.decode, skip_special_tokens=True)
        uniform = random.Random(sampling.seed)  # noqa: S311 - it draws words and hides nothing
        num_rows = max(1, len(self.answerer.adapters_of(route)))
        text = Text(decode, sampling.stop)
        self._waiting.append(_Request(key, prompt_ids, route, sampling, text, uniform, num_rows))

    def cancel(self, key: Key) -> None:
        """Forget a request that waits or runs; another key is ignored."""
        self._waiting = [each for each in self._waiting if each.key != key]
        self._leave([place for place, each in enumerate(self._running) if each.key == key])

    def step(self) -> list[AnswerEvent]:
        """Let waiting requests join, and append a token to every running one; return what happened."""
        self.answerer.pin()
        events: list[AnswerEvent] = []
        with torch.inference_mode():
            if new := self._next():
                for each in new:
                    each.adapters = self.answerer.adapters_of(each.route)
                logits_PV = self._slots.join(
                    [each.adapters for each in new], [each.prompt for each in new]
                )
                self._running += new
                events += self._take(logits_PV, new)
            if self._running:
                logits_PV = self._slots.decode([each.text.tokens[-1].id for each in self._running])
                events += self._take(logits_PV, self._running)
        return events

    def switch(
        self, to: Answerer | Mapping[int, AdapterFiles | None], tainted: Collection[int] = ()
    ) -> list[Key]:
        """Answer with other adapters from the next step on; return the keys of requests that are cut.

        `to` is another answerer, which cuts all requests, or the adapters of shards whose head has
        changed (None: the shard serves no model now). A request that runs finishes on the constituents
        that it began with, unless they are the former ones of a `tainted` shard: then it is cut, and
        they are dropped. A request that waits is cut if it was routed by a tainted head, or to a shard
        that serves no model. Raise IntegrityError if an adapter is damaged; nothing is changed then.
        """
        if not isinstance(to, Mapping):
            cut = [*self.running, *self.waiting]
            self.answerer, self._slots = to, Slots(to.model, to.stack)
            self._waiting, self._running, self._former = [], [], {}
            return cut
        shared = self.answerer.stack.num_shared
        for shard, adapter in self.answerer.replace(to).items():
            self._former.setdefault(adapter, set()).add(shard)
        dropped = {each for each, shards in self._former.items() if not shards.isdisjoint(tainted)}
        if self.answerer.stack.num_shared != shared:  # keys and values are laid out anew
            dropped = {adapter for each in self._running for adapter in each.adapters}
        cut = self._cut(lambda each: not dropped.isdisjoint(each.adapters))
        lost = {shard for shard, files in to.items() if files is None or shard in tainted}
        cut += [each.key for each in self._waiting if not lost.isdisjoint(each.route.shards)]
        self._waiting = [each for each in self._waiting if lost.isdisjoint(each.route.shards)]
        return cut

    def _cut(self, is_cut: Callable[[_Request], bool]) -> list[Key]:
        """Remove running requests; return their keys."""
        places = [place for place, each in enumerate(self._running) if is_cut(each)]
        keys = [self._running[place].key for place in places]
        self._leave(places)
        return keys

    def _next(self) -> list[_Request]:
        """Take the waiting requests that join now, in their order."""
        new: list[_Request] = []
        beside = [*self._running]
        for each in self._waiting:
            beside.append(each)
            num_rows = sum(one.num_rows for one in beside)
            num_positions = num_rows * max(one.num_positions for one in beside)
            num_read = (len(new) + 1) * max(len(one.prompt) for one in (*new, each))
            fits = num_rows <= self.max_rows and num_positions <= self.max_positions
            if not (fits or len(beside) == 1) or (new and num_read > JOINED_POSITIONS):
                break
            new.append(each)
        self._waiting = self._waiting[len(new) :]
        return new

    def _take(self, logits_PV: Tensor, requests: Sequence[_Request]) -> list[AnswerEvent]:
        """Choose a token for each of the last requests; return what follows, and let ended ones go."""
        first = len(self._running) - len(requests)
        events: list[AnswerEvent] = []
        over = []
        for place, (request, token) in enumerate(self._chosen(logits_PV, requests), start=first):
            found = request.take(token, self.answerer.ends)
            events += found
            if any(isinstance(each, Ended) for each in found):
                over.append(place)
        self._leave(over)
        return events

    def _chosen(self, logits_PV: Tensor, requests: Sequence[_Request]) -> list[tuple[_Request, Token]]:
        logs_QV = self._combined(logits_PV, requests).cpu()
        ids = logs_QV.argmax(-1).tolist()
        for number, request in enumerate(requests):
            if request.sampling.temperature > 0:
                ids[number] = sampled(logs_QV[number], request.sampling, request.uniform.random())
        found = logs_QV.gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()
        tokens = []
        for logs_V, request, id_, logprob in zip(logs_QV, requests, ids, found, strict=True):
            likeliest = logs_V.topk(min(request.sampling.logprobs, len(logs_V)))
            top = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
            tokens.append((request, Token(id_, logprob, tuple(top))))
        return tokens

    def _combined(self, logits_PV: Tensor, requests: Sequence[_Request]) -> Tensor:
        """Return the log-probabilities [Q, V] that the constituents of each request agree on."""
        if len(logits_PV) == len(requests):
            return logits_PV.float().log_softmax(-1)
        parts = torch.split(logits_PV[:, None], [max(1, len(each.adapters)) for each in requests])
        found = [
            combine(part, torch.tensor(each.route.weights), self.answerer.method)
            for part, each in zip(parts, requests, strict=True)
        ]
        return torch.cat(found)

    def _leave(self, places: Collection[int]) -> None:
        """Remove running requests, and former adapters that no request runs on any more."""
        if places:
            with torch.inference_mode():
                kept = self._slots.leave(places)
            self._running = [self._running[each] for each in kept]
        used = {adapter for each in self._running for adapter in each.adapters}
        for adapter in self._former.keys() - used:
            self.answerer.stack.drop(adapter)
            del self._former[adapter]
