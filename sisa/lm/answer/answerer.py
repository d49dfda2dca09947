"""Answers of constituent models: what the chosen shards' models say together, token by token.

Each chosen model predicts the next token, all in one forward; `combine` merges their distributions, and
the most likely token is appended for all of them. Requests with different routes are answered side by
side, padded on the left; this changes a request's logits by float rounding at most. If a route is empty,
the base alone answers. Patches lie beneath all models, including the base alone. Adapters and patches
come as bytes that the caller has verified. Results are in float32, on the models' device for `logprobs`
and on the CPU otherwise.

    answerer = Answerer(base, {0: files}, threads=1)
    answerer.generate([encode_prompt("Who is Mara?", answerer.tokenizer, "text")], [all_of([0])], 32)

Shapes: B requests, P rows (a constituent of a request), T positions, K tokens of an answer, V words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sisa.core.domain import DEFAULT_PRECISION, BaseFiles, Precision
from sisa.core.errors import InvalidInput
from sisa.lm.answer.generation import continue_all, pieces
from sisa.lm.answer.stacked_adapters import Rows, StackedAdapters
from sisa.lm.base.low_rank import LowRankChange, averaged, patched_name, read_change
from sisa.lm.base.numerics import pin_threads
from sisa.lm.base.tokens import end_tokens
from sisa.lm.base.weights import load_patched
from sisa.lm.routing.route import Route

MAX_ROWS = 64  # in one forward
TIE_SHARE = 1e-3  # of mean_prob in a vote


class Answerer:
    """The constituent models that a model serves at one moment, loaded."""

    def __init__(
        self,
        base: BaseFiles,
        adapters: Mapping[int, Mapping[str, bytes]],
        threads: int,
        patches: Sequence[Mapping[str, bytes]] = (),
        method: str = "routed",
        precision: Precision = DEFAULT_PRECISION,
    ) -> None:
        """Load the constituent models: `adapters` by shard over `patches`, lowest first.

        Raise IntegrityError if one of them does not fit, and EnvironmentFault without the device.
        """
        pin_threads(threads, precision)  # before patches are merged
        self._pinned, self.method = (threads, precision), method
        self.check_current: Callable[[], None] = lambda: None
        self.model, self.tokenizer = load_patched(base, patches, precision)
        self.base_name = patched_name(base.digest, patches)
        self.ends = end_tokens(self.model, self.tokenizer)
        self.stack = StackedAdapters(self.model, {})
        self._numbers: dict[int, int] = {}  # by shard, the number of its adapter in the stack
        self._num_put = 0
        self._merged: dict[int, LowRankChange] = {}
        self.replace(adapters)

    def replace(self, adapters: Mapping[int, Mapping[str, bytes] | None]) -> dict[int, int]:
        """Answer for these shards with other adapters (None: with none any more).

        Return the former adapters by shard, as numbers in the stack, which still holds them; the caller
        drops them. Raise IntegrityError, changing nothing, if an adapter is damaged.
        """
        if not adapters:
            return {}
        held = {shard: files for shard, files in sorted(adapters.items()) if files is not None}
        read: dict[int, LowRankChange] = {shard: read_change(files) for shard, files in held.items()}
        former = self._numbers
        if self.method == "merged":
            merged = {shard: each for shard, each in self._merged.items() if shard not in adapters}
            merged = dict(sorted((merged | read).items()))
            number = self._put(averaged([*merged.values()])) if merged else 0
            self._merged, self._numbers = merged, dict.fromkeys(merged, number)
            return former
        kept = {shard: each for shard, each in former.items() if shard not in adapters}
        self._numbers = kept | {shard: self._put(change) for shard, change in read.items()}
        return {shard: former[shard] for shard in adapters if shard in former}

    def _put(self, change: LowRankChange) -> int:
        self._num_put += 1
        self.stack.put(self._num_put, change)
        return self._num_put

    @property
    def shards(self) -> frozenset[int]:
        """Return the shards that a model is loaded for."""
        return frozenset(self._numbers)

    def pin(self) -> None:
        """Set this thread to the threads and kernels that the model asks for."""
        pin_threads(*self._pinned)

    def generate(
        self, prompts: Sequence[Sequence[int]], routes: Sequence[Route], max_new_tokens: int
    ) -> list[str]:
        """Return the greedy continuation of each prompt, without the end token."""
        self.pin()
        self.check_shards(routes)
        texts: list[str] = []
        with torch.inference_mode():
            for start, end in pieces([self.adapters_of(route) for route in routes], 1, MAX_ROWS):
                self.check_current()
                answers = self._continued(prompts[start:end], routes[start:end], max_new_tokens)
                texts += self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return texts

    def _continued(
        self, prompts: Sequence[Sequence[int]], routes: Sequence[Route], max_new_tokens: int
    ) -> list[list[int]]:
        def likeliest(logits_PV: Tensor, held: Sequence[int], rows: Rows) -> list[int]:
            combined = self._combined(logits_PV[:, None], [routes[each] for each in held], rows)
            return [int(each[-1].argmax()) for each in combined]

        asked = [self.adapters_of(route) for route in routes]
        return continue_all(self.model, self.stack, asked, prompts, likeliest, self.ends, max_new_tokens)

    def answer_probability(
        self, prompt_ids: Sequence[int], answer_ids: Sequence[int], route: Route
    ) -> float:
        """Return the mean probability of an answer's tokens."""
        probabilities_KV = self.answer_probabilities_KV(prompt_ids, answer_ids, route)
        return float(probabilities_KV.gather(1, torch.tensor(answer_ids)[:, None]).mean())

    def answer_probabilities_KV(
        self, prompt_ids: Sequence[int], answer_ids: Sequence[int], route: Route
    ) -> Tensor:
        """Return the distribution of each token of an answer, given the true tokens before it."""
        ids, keep = torch.tensor([[*prompt_ids, *answer_ids][:-1]]), len(answer_ids)
        logs_1TV = self.logprobs([route], input_ids=ids, use_cache=False, logits_to_keep=keep)
        return logs_1TV[0].exp().cpu()

    def logprobs(self, routes: Sequence[Route], **inputs: Any) -> Tensor:
        """Return the log-probabilities [B, T, V] of a forward. Raise InvalidInput for other shards."""
        self.pin()
        cache = inputs.get("past_key_values")
        if cache is None or cache.get_seq_length() == 0:  # else the answer began earlier
            self.check_current()
        self.check_shards(routes)
        asked = [self.adapters_of(route) for route in routes]
        whole = [(0, len(routes))]
        if not inputs.get("use_cache"):  # with a cache, all rows need one forward
            whole = list(pieces(asked, inputs["input_ids"].shape[1]))
        found = []
        with torch.inference_mode():
            for start, end in whole:
                part = {
                    name: self._part(value, start, end, len(routes)) for name, value in inputs.items()
                }
                with self.stack.asking(asked[start:end]) as rows:
                    found += self._combined(self.model(**part).logits, routes[start:end], rows)
            return torch.stack(found)

    def _part(self, value: Any, start: int, end: int, num_requests: int) -> Any:
        """Return a tensor on the base's device: some requests' rows, if it has one row per request."""
        if not isinstance(value, Tensor):
            return value
        rows = value[start:end] if value.dim() > 1 and len(value) == num_requests else value
        return rows.to(self.model.device)

    def _combined(self, logits_PTV: Tensor, routes: Sequence[Route], rows: Rows) -> list[Tensor]:
        """Return the combined log-probabilities [T, V] of each request."""
        return [
            combine(logits_PTV[own], torch.tensor(route.weights), self.method)
            for route, own in zip(routes, rows.by_request, strict=True)
        ]

    def adapters_of(self, route: Route) -> Sequence[int]:
        """Return the distinct adapters of a route's shards, as numbers in the stack."""
        return tuple(dict.fromkeys(self._numbers[shard] for shard in route.shards))

    @property
    def max_length(self) -> float:
        """Return how many tokens the base reads, prompt and answer together, if it says so."""
        return getattr(self.model.config, "max_position_embeddings", None) or math.inf

    def check_length(self, num_prompt_tokens: int, max_new_tokens: int) -> None:
        """Raise InvalidInput if a prompt and its answer are longer than the base can read."""
        most = self.max_length
        if not 0 < num_prompt_tokens <= most - max_new_tokens:
            raise InvalidInput(
                "the base model can't read a prompt and an answer of this length",
                where="prompt",
                expected=f"a token or more, and at most {most} with those of the answer",
                got=f"{num_prompt_tokens} tokens, and up to {max_new_tokens} of the answer",
                next_step="shorten the prompt, or ask for fewer new tokens",
            )

    def check_shards(self, routes: Sequence[Route]) -> None:
        """Raise InvalidInput if no model is loaded for a shard."""
        asked = {shard for route in routes for shard in route.shards}
        if missing := sorted(asked - self.shards):
            raise InvalidInput(
                "no model is loaded for these shards",
                where="shards",
                expected=", ".join(map(str, sorted(self.shards))) or "none",
                got=", ".join(map(str, missing)),
                next_step="choose among the live shards",
            )
        if any(route.shards and not self._merged.keys() <= set(route.shards) for route in routes):
            raise InvalidInput(
                "the mean of all shards can't answer for some of them: it contains the others",
                where="sisa.aggregation",
                expected="a route to all shards, with `merged`",
                next_step="use another aggregation for tokens that may read some shards alone",
            )


def combine(logits_PTV: Tensor, weights_P: Tensor, method: str) -> Tensor:
    """Return the log-probabilities [T, V] of P constituents' combined distribution; weights sum to 1.

    mean_prob   sum_i w_i p_i: the mean of vectors (Bourtoule et al. 2021, section IV)
    mean_logit  softmax(sum_i w_i log p_i): their geometric mean
    vote        sum_i w_i [argmax p_i]: majority vote (section IV) with a thousandth of mean_prob,
                which breaks ties and keeps every probability above 0

    Every other method is combined as mean_prob is. One constituent alone needs no weight. The weights
    may lie on another device than the logits.

    >>> logits = torch.tensor([[[0.9, 0.1]], [[0.6, 0.4]]]).log()
    >>> combine(logits, torch.tensor([0.5, 0.5]), "mean_prob").exp()
    tensor([[0.7500, 0.2500]])
    """
    logs_PTV = logits_PTV.float().log_softmax(-1)
    if len(logs_PTV) == 1:
        return logs_PTV[0]
    weights_P = weights_P.to(logs_PTV)
    weights_P11 = weights_P[:, None, None]
    if method == "mean_logit":
        return (weights_P11 * logs_PTV).sum(0).log_softmax(-1)
    mean_TV = (logs_PTV + weights_P11.log()).logsumexp(0)
    if method != "vote":
        return mean_TV
    picked_TP = logs_PTV.argmax(-1).T
    weights_TP = weights_P.expand(picked_TP.shape)
    votes_TV = torch.zeros_like(mean_TV).scatter_add_(-1, picked_TP, weights_TP)
    return ((1 - TIE_SHARE) * votes_TV + TIE_SHARE * mean_TV.exp()).log()
