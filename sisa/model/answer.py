"""Answering with constituent models: the mean of their next-token probabilities.

Rules: the chosen shards' models each predict the next token, their probability vectors are averaged
(Bourtoule et al. 2021, section IV), the likeliest token is taken and given to all of them. Each
constituent keeps its own key-value cache. With no shard chosen the base alone answers. Patches lie
beneath all of them, the base alone among them. Adapters and patches come as bytes that the caller has
verified, and live in modules of this object's own around the shared base; an `Answerer` is thrown away
when a head or a patch moves.

Not covered: sampling; which shards to ask (`route.py`).

    answerer = Answerer(directory, digest, {0: files}, threads=1)
    answerer.generate(encode_prompt("Who is Mara?", answerer.tokenizer, "text"), (0,), 32)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sisa.errors import InvalidInput
from sisa.model.adapter import ADAPTER_FILE, add_adapter, attach, read_config, read_tensors
from sisa.model.numerics import pin_threads
from sisa.model.patched import load_patched, patched_name

BASE = None  # stands for the base alone where a shard is expected


class Answerer:
    """Constituent models of one moment, ready to be asked."""

    def __init__(
        self,
        base_dir: Path,
        base_digest: str,
        adapters: Mapping[int, Mapping[str, bytes]],
        threads: int,
        patches: Sequence[Mapping[str, bytes]] = (),
    ) -> None:
        """`adapters` maps shards to their checkpoints' files; `patches` are the files of those that are
        served, lowest first. Raises IntegrityError."""
        pin_threads(threads)  # before the patches are laid on
        self._threads = threads
        self._base, self.tokenizer = load_patched(base_dir, base_digest, patches)
        self.base_name = patched_name(base_digest, patches)
        self._shards = frozenset(adapters)
        self._model: Any = None
        for shard, files in sorted(adapters.items()):
            config, tensors = read_config(files), read_tensors(files, ADAPTER_FILE)
            if self._model is None:
                own, _ = load_patched(base_dir, base_digest, patches)
                self._model = attach(own, config, tensors, init_seed=0, name=_name(shard))
            else:
                add_adapter(self._model, config, tensors, _name(shard))
        if self._model is not None:
            self._model.eval().requires_grad_(False)
        self._ends = end_tokens(self._base, self.tokenizer)

    def generate(self, prompt_ids: Sequence[int], shards: Sequence[int], max_new_tokens: int) -> str:
        """The greedy continuation, without the end token."""
        pin_threads(self._threads)
        constituents = [_Constituent(self._select, shard) for shard in self._asked(shards)]
        fed = list(prompt_ids)
        answer: list[int] = []
        with torch.inference_mode():
            for _ in range(max_new_tokens):
                token = int(_mean([each.feed(fed, keep=1)[-1] for each in constituents]).argmax())
                if token in self._ends:
                    break
                answer.append(token)
                fed = [token]
        text: str = self.tokenizer.decode(answer, skip_special_tokens=True)
        return text

    def next_token_probabilities(self, prompt_ids: Sequence[int], shards: Sequence[int]) -> torch.Tensor:
        """The averaged distribution after the prompt, [V]."""
        pin_threads(self._threads)
        with torch.inference_mode():
            asked = [_Constituent(self._select, shard) for shard in self._asked(shards)]
            return _mean([each.feed(prompt_ids, keep=1)[-1] for each in asked])

    def answer_probability(
        self, prompt_ids: Sequence[int], answer_ids: Sequence[int], shards: Sequence[int]
    ) -> float:
        """The averaged distribution's probability of an answer's tokens, averaged over the tokens."""
        probabilities_KV = self.answer_probabilities_KV(prompt_ids, answer_ids, shards)
        picked = probabilities_KV[torch.arange(len(answer_ids)), torch.tensor(answer_ids)]
        return float(picked.mean())

    def answer_probabilities_KV(
        self, prompt_ids: Sequence[int], answer_ids: Sequence[int], shards: Sequence[int]
    ) -> torch.Tensor:
        """The averaged distribution before each token of an answer, given the true ones before it."""
        pin_threads(self._threads)
        ids = [*prompt_ids, *answer_ids]
        with torch.inference_mode():
            asked = [_Constituent(self._select, shard) for shard in self._asked(shards)]
            return _mean([each.feed(ids[:-1], keep=len(answer_ids)) for each in asked])

    def logprobs_BTV(self, ids_BT: torch.Tensor, shards: Sequence[int]) -> torch.Tensor:
        """Logarithm of the averaged distribution after every token; rows are padded on the right."""
        pin_threads(self._threads)
        asked = self._asked(shards)
        with torch.inference_mode():
            each_BTV = [
                self._select(shard)(input_ids=ids_BT, use_cache=False).logits.float().log_softmax(-1)
                for shard in asked
            ]
            return torch.stack(each_BTV).logsumexp(0) - math.log(len(asked))

    def _asked(self, shards: Sequence[int]) -> list[int | None]:
        if missing := [shard for shard in shards if shard not in self._shards]:
            raise InvalidInput(
                "no model is loaded for these shards",
                where="shards",
                expected=", ".join(map(str, sorted(self._shards))) or "none",
                got=", ".join(map(str, missing)),
                next_step="choose among the live shards",
            )
        return list(shards) or [BASE]

    def _select(self, shard: int | None) -> Any:
        if shard is BASE:
            return self._base
        self._model.set_adapter(_name(shard), inference_mode=True)
        return self._model


class _Constituent:
    """One model with the cache of what it has read."""

    def __init__(self, select: Any, shard: int | None) -> None:
        self._select = select
        self._shard = shard
        self._cache: Any = None

    def feed(self, ids: Sequence[int], keep: int) -> torch.Tensor:
        """Read more tokens; the probabilities of the token after each of the last `keep`, [keep, V]."""
        output = self._select(self._shard)(
            input_ids=torch.tensor([list(ids)]),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        self._cache = output.past_key_values
        probabilities_KV: torch.Tensor = output.logits[0].softmax(-1)
        return probabilities_KV


def _mean(distributions: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(distributions)).mean(0)


def _name(shard: int | None) -> str:
    return f"shard-{shard}"


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Ids after which an answer is over."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ends = configured if isinstance(configured, list) else [configured]
    return frozenset(end for end in [*ends, tokenizer.eos_token_id] if end is not None)
