"""The aggregated model as a Hugging Face `PreTrainedModel`, for tools that know nothing of shards.

    model = open_model("model").as_transformers()
    model.generate(**tokenizer("Who is Mara?", return_tensors="pt"), max_new_tokens=32)

Its logits are the log-probabilities of the constituent models' combined distribution.

The prompt alone chooses who answers: the user turns of a chat in the tokenizer's template, else the
whole prompt. `generate` receives nothing but the prompt. In `forward` with `labels`, the prompt ends
before the first labelled token; without, it ends after the first of `prompt_ends` in the text, as in an
evaluation's "Question: ...\nAnswer:", so that no continuation reaches the router. A routed model refuses
a sequence whose prompt can't be found. Rows are padded on either side with an `attention_mask`, or on
the right without one.

The model does not train, does not search with beams (caches would have to be reordered), and does not
save (use `sisa export`).
"""

from __future__ import annotations

import re
import warnings
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from sisa.core.errors import InvalidInput
from sisa.lm.answer.answerer import Answerer
from sisa.lm.base.tokens import NO_LOSS
from sisa.lm.routing.route import Route

Question = str | list[dict[str, str]]  # a text, or the user turns of a chat
Router = Callable[[Sequence[Question]], list[Route]]
PROMPT_ENDS = ("Answer:", "<|im_start|>assistant\n")


class AggregatedModel(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """The constituent models that a model serves at one moment, as one causal language model."""

    main_input_name = "input_ids"
    asks_by_prompt = True  # who answers depends on where the prompt ends, which `labels` show
    _supports_sdpa = True  # the base's own implementation runs

    def __init__(
        self, answerer: Answerer, router: Router, prompt_ends: Sequence[str] = PROMPT_ENDS
    ) -> None:
        """Wrap an answerer. `router` returns the route of each prompt."""
        super().__init__(answerer.model.config)
        self.answerer, self.tokenizer = answerer, answerer.tokenizer
        self.base = answerer.model
        self.generation_config = answerer.model.generation_config
        self._router, self._ends = router, tuple(prompt_ends)
        self._turn = user_turn(self.tokenizer)
        self._routes: list[Route] | None = None
        self.eval().requires_grad_(False)

    def get_input_embeddings(self) -> Any:
        """Return the base's input embeddings."""
        return self.base.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        """Return the base's output embeddings."""
        return self.base.get_output_embeddings()

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """Generate as `GenerationMixin.generate` does, greedily or by sampling.

        Warn of answers that end at once. Raise InvalidInput for beams and for several sequences per
        prompt.
        """
        ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        for name in ("num_beams", "num_return_sequences"):
            if (kwargs.get(name) or 1) != 1:
                raise InvalidInput(
                    "the aggregated model generates one sequence per prompt, without beams",
                    where=name,
                    expected="1",
                    got=str(kwargs[name]),
                    next_step="remove it, or export the model",
                )
        mask = kwargs.get("attention_mask")
        rows = ids if mask is None else [row[m.bool()] for row, m in zip(ids, mask, strict=True)]
        self._routes = self._routed([(row, len(row)) for row in rows])
        try:
            found = super().generate(input_ids=ids, **kwargs)
        finally:
            self._routes = None
        made = getattr(found, "sequences", found)[:, ids.shape[1] :]
        texts = self.tokenizer.batch_decode(made, skip_special_tokens=True)
        if silent := sum(not each.strip() for each in texts):
            warnings.warn(f"{silent} of {len(texts)} answers ended at once", stacklevel=2)
        return found

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits [B, T, V] and, with labels, their mean loss, as any causal model does."""
        routes = self._routes or self._routes_of(input_ids, attention_mask, labels)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        logs_BTV = self.answerer.logprobs(
            routes,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=bool(use_cache),
            logits_to_keep=logits_to_keep,
        )
        loss = None
        if labels is not None:
            next_N = labels[:, 1:].reshape(-1).to(logs_BTV.device)
            logs_NV = logs_BTV[:, :-1].reshape(len(next_N), -1)
            loss = torch.nn.functional.cross_entropy(logs_NV, next_N, ignore_index=NO_LOSS)
        return CausalLMOutputWithPast(loss=loss, logits=logs_BTV, past_key_values=past_key_values)

    def _routes_of(self, ids: Tensor, mask: Tensor | None, labels: Tensor | None) -> list[Route]:
        prompts = []
        for number, row in enumerate(ids):
            kept = slice(None) if mask is None else mask[number].bool()
            seen = row[kept]
            if labels is None:
                prompts.append((seen, self._prompt_length(seen)))
            else:
                labelled = (labels[number][kept] != NO_LOSS).nonzero()
                prompts.append((seen, int(labelled[0]) if len(labelled) else len(seen)))
        return self._routed(prompts)

    def _routed(self, prompts: Sequence[tuple[Tensor, int]]) -> list[Route]:
        """Return the routes of rows with their prompts' lengths; equal prompts are looked up once."""
        texts = [self._asked(row[:length]) for row, length in prompts]
        distinct = list(dict.fromkeys(texts))
        found = dict(zip(distinct, self._router([_asked_of(each) for each in distinct]), strict=True))
        if self.answerer.shards and not any(route.shards for route in found.values()):
            warnings.warn(
                f"the base alone answers all of these {len(texts)} prompts: none is near any of the "
                "model's records (min_score in the run file's sisa.aggregation)",
                stacklevel=2,
            )
        return [found[text] for text in texts]

    def _asked(self, prompt: Tensor) -> tuple[str, ...]:
        """Return the texts of a prompt that are looked up, the latest last."""
        opening, closing = self._turn or ("", "")
        turns = self.tokenizer.decode(prompt).split(opening)[1:] if opening else []
        if turns:
            return tuple(each.partition(closing)[0].strip() for each in turns)
        return (str(self.tokenizer.decode(prompt, skip_special_tokens=True)).strip(),)

    def _prompt_length(self, row: Tensor) -> int:
        """Return the number of tokens in the prompt. Raise InvalidInput if its end can't be found."""
        if self.answerer.method != "routed":
            return 0

        def ends_within(length: int) -> bool:
            text = self.tokenizer.decode(row[:length])
            return any(end in text for end in self._ends)

        length = bisect_left(range(len(row) + 1), True, key=ends_within)
        if length <= len(row):
            return length
        raise InvalidInput(
            "the end of a sequence's prompt can't be found",
            where="input_ids",
            expected="labels, or one of " + ", ".join(map(repr, self._ends)),
            next_step="give the text that ends a prompt as `prompt_ends`",
        )


def _asked_of(texts: Sequence[str]) -> Question:
    return texts[0] if len(texts) == 1 else [{"role": "user", "content": text} for text in texts]


def user_turn(tokenizer: Any) -> tuple[str, str] | None:
    """Return the text before and after a user's turn in the tokenizer's chat template.

    Return None if there is no template, or if its output does not separate turns.
    """
    from jinja2.exceptions import TemplateError

    words = ("first-question", "first-answer", "second-question")
    roles = ("user", "assistant", "user")
    turns = [{"role": role, "content": word} for role, word in zip(roles, words, strict=True)]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        before, between, again, after = re.split("|".join(words), text)
    except (TemplateError, ValueError):  # no template, or one that changes the words
        return None
    opening, closing = _shared(before[::-1], again[::-1])[::-1], _shared(between, after)
    return (opening, closing) if opening.strip() and closing.strip() else None


def _shared(one: str, other: str) -> str:
    """Return the longest common prefix of two texts."""
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return "".join(letter for letter, _ in pairs)
