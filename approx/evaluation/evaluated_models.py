"""Models to evaluate: a Hugging Face causal model, an adapter over its base, or a deletion-ready model.

The batch size changes results by rounding only: less than 1e-5 relative, or absolute for values below 1
(SmolLM2-135M in float32, batches of 1 and 8: 5e-6; half precision rounds more). A tie that close may go
either way. A deletion-ready model answers by the aggregation of its run file over its active patches,
and its digest names them; its answers are scored under the same distribution. Generation is greedy and
ignores the model's own generation config. Shapes are those of `answers.py`.

    model = open_evaluated("model")           # a directory, a hub name, or pypi:NAME==VERSION
    model.score([("Who?", "Ada.")], PromptForm("completion"), batch_size=8)[0].loss
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from approx.evaluation.answer_score import AnswerScore
from approx.evaluation.answer_tree import can_branch, lay_trees, tree_of, tree_scores
from approx.evaluation.answers import examples_of
from approx.evaluation.asking import Asking
from approx.evaluation.continuations import continue_greedily
from approx.evaluation.questions import PromptForm, PromptKind, Question
from sisa.config.fields import PYPI
from sisa.core.checkpoint_files import ADAPTER_FILE, CONFIG_FILE
from sisa.core.digest import digest_of, sha256_hex
from sisa.core.domain import Part, Record
from sisa.core.errors import InvalidInput, Problem
from sisa.flows.wiring.ledger_place import has_ledger
from sisa.lm.answer.generation import continue_all
from sisa.lm.answer.stacked_adapters import Rows, StackedAdapters
from sisa.lm.base.adapter import attach, read_config
from sisa.lm.base.low_rank import read_tensors
from sisa.lm.base.tokens import (
    NO_LOSS,
    Tokens,
    encode_prompt,
    end_tokens,
    form_alone,
    without_closing,
)
from sisa.lm.base.weights import base_digest, load_frozen, load_tokenizer, resolve_base, stored_model
from sisa.lm.routing.route import Route
from sisa.model import Model, open_model

_T = TypeVar("_T")
Logits = Callable[[Mapping[str, Tensor], Sequence[int], int], Tensor]
Dtype = Literal["float32", "bfloat16", "float16"]


def open_evaluated(
    spec: str, device: str = "cpu", dtype: Dtype = "float32"
) -> HuggingFaceModel | DeletionReadyModel:
    """Open the model that `spec` names; a deletion-ready model is opened on its own device.

    Raise InvalidInput, IntegrityError or EnvironmentFault.
    """
    from transformers import AutoModelForCausalLM

    directory = Path(spec).expanduser()
    if has_ledger(directory):
        return DeletionReadyModel(open_model(directory, executor="serial"))
    name, base, files = spec, spec, dict[str, bytes]()
    if (directory / CONFIG_FILE).is_file():
        held = [each for each in (CONFIG_FILE, ADAPTER_FILE) if (directory / each).is_file()]
        files = {each: (directory / each).read_bytes() for each in held}
        name, base = str(directory), _base_of(directory, files[CONFIG_FILE])
    found = resolve_base(base).directory if base.startswith(PYPI) else stored_model(base)
    digest = digest_of([base_digest(found), dtype, *map(sha256_hex, files.values())])
    model = load_frozen(AutoModelForCausalLM, found, dtype)
    if files:
        model = attach(model, read_config(files), read_tensors(files, ADAPTER_FILE), init_seed=0)
        model.eval().requires_grad_(False)
    return HuggingFaceModel(name, digest, model, load_tokenizer(found), device)


def _base_of(directory: Path, config: bytes) -> str:
    try:
        spec = json.loads(config)["base_model_name_or_path"]
    except (ValueError, TypeError, KeyError):
        spec = None
    if not isinstance(spec, str):
        raise InvalidInput(
            "the adapter does not name its base",
            where=str(directory / CONFIG_FILE),
            expected="base_model_name_or_path",
            next_step="export it with `sisa export`, or name its base in the file",
        )
    return spec


class HuggingFaceModel:
    """A causal model of transformers, with or without an adapter: `model`, and its `tokenizer`.

    `ends` are the tokens that end its answers.
    """

    def __init__(self, name: str, digest: str, model: Any, tokenizer: Any, device: str) -> None:
        from transformers import GenerationConfig

        self.name, self.digest = name, digest
        self.kind: PromptKind = "chat" if tokenizer.chat_template else "completion"
        self.tokenizer = tokenizer
        self.ends = end_tokens(model, tokenizer)
        self.model = _moved(model, device)
        self.model.generation_config = GenerationConfig(do_sample=False)  # not the model's own

    def score(
        self, pairs: Sequence[tuple[str, str]], form: PromptForm, batch_size: int
    ) -> list[AnswerScore]:
        tokens = tokens_of(pairs, form, self.tokenizer)
        _check_lengths(self.model, [len(each.input_ids) for each in tokens])
        return _scored(pairs, tokens, batch_size, self._logits, self.model, self.tokenizer)

    def _logits(self, inputs: Mapping[str, Tensor], _rows: Sequence[int], keep: int) -> Tensor:
        with torch.inference_mode():
            on = {name: each.to(self.model.device) for name, each in inputs.items()}
            found: Tensor = self.model(**on, logits_to_keep=keep, use_cache=False).logits
            return found.cpu()

    def generate(
        self, questions: Sequence[str], form: PromptForm, max_new_tokens: int, batch_size: int
    ) -> list[str]:
        prompts = [_prompt_ids(each, form, self.tokenizer) for each in questions]
        _check_lengths(self.model, [len(each) + max_new_tokens for each in prompts])
        drops_ended_rows = can_branch(self.model, max(map(len, prompts), default=0) + max_new_tokens)

        def said(rows: list[int]) -> list[str]:
            ids = [prompts[at] for at in rows]
            if drops_ended_rows:
                made = self._continued(ids, max_new_tokens)
            else:
                made = continue_greedily(self.model, ids, self.ends, max_new_tokens, batch_size)
            texts = self.tokenizer.batch_decode(made, skip_special_tokens=True)
            return [each.strip() for each in texts]

        return _in_batches(list(map(len, prompts)), batch_size, said)

    @torch.inference_mode()
    def _continued(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Return greedy continuations, whose rows are dropped at their end."""
        stack, asked = StackedAdapters(self.model, {}), [()] * len(prompts)

        def likeliest(logits_PV: Tensor, _held: Sequence[int], _rows: Rows) -> list[int]:
            picked: list[int] = logits_PV.argmax(-1).tolist()
            return picked

        return continue_all(self.model, stack, asked, prompts, likeliest, self.ends, max_new_tokens)


class DeletionReadyModel:
    """The constituent models that a deletion-ready model serves now (`answerer`), with its routing."""

    def __init__(self, model: Model) -> None:
        status = model.status()
        how = model.config.sisa.aggregation.model_dump(mode="json")
        self.name = status.directory
        self.model = model
        self.answerer, kind = model.answerer()
        base = self.answerer.base_name
        alone = form_alone(self.answerer.tokenizer)
        self.digest = digest_of([status.model_digest, base, model.embedder.digest, how, alone])
        self.kind: PromptKind = "chat" if kind == "chat" else "completion"

    def score(
        self, pairs: Sequence[tuple[str, str]], form: PromptForm, batch_size: int
    ) -> list[AnswerScore]:
        routes = self._routes([question for question, _ in pairs], form)
        tokens = tokens_of(pairs, self._forms(routes, form), self.answerer.tokenizer)

        def logits(inputs: Mapping[str, Tensor], rows: Sequence[int], keep: int) -> Tensor:
            chosen = [routes[at] for at in rows]
            return self.answerer.logprobs(chosen, **inputs, logits_to_keep=keep, use_cache=False).cpu()

        return _scored(pairs, tokens, batch_size, logits, self.answerer.model, self.answerer.tokenizer)

    def generate(
        self, questions: Sequence[str], form: PromptForm, max_new_tokens: int, batch_size: int
    ) -> list[str]:
        routes = self._routes(questions, form)
        ids = [
            _prompt_ids(each, own, self.answerer.tokenizer)
            for each, own in zip(questions, self._forms(routes, form), strict=True)
        ]

        def said(rows: list[int]) -> list[str]:
            prompts, chosen = [ids[at] for at in rows], [routes[at] for at in rows]
            return [each.strip() for each in self.answerer.generate(prompts, chosen, max_new_tokens)]

        return _in_batches(list(map(len, ids)), batch_size, said)

    def _forms(self, routes: Sequence[Route], form: PromptForm) -> list[PromptForm]:
        """Return the form of each prompt: the base alone is asked as a chat, as `generate` does."""
        if form.kind == "text":
            return [form] * len(routes)
        alone = replace(form, kind=form_alone(self.answerer.tokenizer) or form.kind)
        return [form if route.shards else alone for route in routes]

    def _routes(self, questions: Sequence[str], form: PromptForm) -> list[Route]:
        prompts = [form.fill(each, "")[0] or each for each in questions]
        distinct = list(dict.fromkeys(prompts))  # each distinct prompt is embedded and looked up once
        routes = dict(zip(distinct, self.model.routes(distinct), strict=True))
        return [routes[each] for each in prompts]


TEMPLATE_TOKENS = 256  # that a form may add to the bytes of a question and an answer


def check_readable(
    model: HuggingFaceModel | DeletionReadyModel, questions: Sequence[Question], asking: Asking
) -> None:
    """Check that a model can read each question with its answers, before any is asked.

    Raise InvalidInput listing every question that is too long. A text has no more tokens than bytes, so
    only long ones are tokenized.
    """
    own = model.answerer if isinstance(model, DeletionReadyModel) else model
    tokenizer, config = own.tokenizer, own.model.config
    if (limit := getattr(config, "max_position_embeddings", None)) is None:
        return
    problems = []
    for each in questions:
        form, num_new = asking.form_of(each), asking.num_new(each)
        texts = [each.answer, *filter(None, [each.paraphrased]), *each.perturbed]
        longest = max(len(text.encode()) for text in texts)
        if len(each.question.encode()) + max(longest, num_new) + TEMPLATE_TOKENS <= limit:
            continue
        examples = tokens_of([(each.question, text) for text in texts], form, tokenizer)
        lengths = [len(example.input_ids) for example in examples]
        if num_new:
            lengths.append(len(_prompt_ids(each.question, form, tokenizer)) + num_new)
        if max(lengths) > limit:
            problems.append(Problem(f"{each.set} {each.idx}", f"{max(lengths)} tokens"))
    if problems:
        raise InvalidInput(
            "questions with their answers are longer than the model can read",
            where=model.name,
            expected=f"at most {limit} tokens",
            next_step="lower --max-new-tokens, or leave these sets out",
            problems=problems,
        )


def _moved(model: Any, device: str) -> Any:
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidInput(
            "the model can't be put on this device",
            where="--device",
            got=device,
            next_step="name a device that torch sees, such as cpu or cuda",
        ) from error


def tokens_of(
    pairs: Sequence[tuple[str, str]], form: PromptForm | Sequence[PromptForm], tokenizer: Any
) -> list[Tokens]:
    """Return question-answer pairs as token examples, in one form or each in its own.

    Raise InvalidInput listing every failure.
    """
    return examples_of(records_of(pairs, form), tokenizer)


def records_of(
    pairs: Sequence[tuple[str, str]], form: PromptForm | Sequence[PromptForm]
) -> list[Record]:
    """Return question-answer pairs as records, in one form or each in its own."""
    found = []
    forms = [form] * len(pairs) if isinstance(form, PromptForm) else form
    for number, (pair, own) in enumerate(zip(pairs, forms, strict=True)):
        if own.kind == "text":
            parts: tuple[Part, ...] = (Part("text", pair[1]),)
        else:
            roles = ("user", "assistant") if own.kind == "chat" else ("prompt", "completion")
            parts = tuple(map(Part, roles, own.fill(*pair)))
        found.append(Record(str(number), None, own.kind, parts))
    return found


def _prompt_ids(question: str, form: PromptForm, tokenizer: Any) -> list[int]:
    return encode_prompt(form.fill(question, "")[0], tokenizer, form.kind)


def _check_lengths(model: Any, lengths: Sequence[int]) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and max(lengths, default=0) > limit:
        raise InvalidInput(
            "a question with its answer is longer than the model can read",
            expected=f"at most {limit} tokens",
            got=f"{max(lengths)} tokens",
            next_step="lower --max-new-tokens, or use a model with a longer context",
        )


def _scored(
    pairs: Sequence[tuple[str, str]],
    tokens: Sequence[Tokens],
    batch_size: int,
    logits: Logits,
    model: Any,
    tokenizer: Any,
) -> list[AnswerScore]:
    """Return scores in order; answers to one question that follow each other are one tree.

    `logits` gets the inputs of a batch, an answer of each of its rows, and the number of last columns
    whose logits are needed.
    """
    starts = [at for at, (question, _) in enumerate(pairs) if at == 0 or question != pairs[at - 1][0]]
    if not can_branch(model, max((len(each.input_ids) for each in tokens), default=0)):
        starts = list(range(len(pairs)))
    trees = [tree_of(tokens[at:end]) for at, end in pairwise([*starts, len(pairs)])]

    def scores(rows: list[int]) -> list[list[AnswerScore]]:
        batch = [trees[row] for row in rows]
        longest = max(len(each.ids) for each in batch)
        keep = max(longest - len(each.ids) + each.num_logits for each in batch)
        found = logits(lay_trees(batch, model.dtype), [starts[row] for row in rows], keep)
        return [tree_scores(each, longest, tree) for each, tree in zip(found, batch, strict=True)]

    size = max(1, batch_size * len(trees) // max(1, len(pairs)))
    found = chain(*_in_batches([len(each.ids) for each in trees], size, scores))
    return [
        replace(score, num_closing=_num_closing(each, tokenizer))
        for score, each in zip(found, tokens, strict=True)
    ]


def _num_closing(tokens: Tokens, tokenizer: Any) -> int:
    said = without_closing(tokens, tokenizer).labels
    return said.count(NO_LOSS) - tokens.labels.count(NO_LOSS)


def _in_batches(
    lengths: Sequence[int], size: int, compute: Callable[[list[int]], Sequence[_T]]
) -> list[_T]:
    """Call `compute` with batches of positions, and return all results in order.

    The longest rows come first: rows of one length are batched together, and running out of memory
    shows in the first batch.
    """
    order = sorted(range(len(lengths)), key=lambda at: -lengths[at])
    found: dict[int, _T] = {}
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        found |= dict(zip(rows, compute(rows), strict=True))
    return [found[at] for at in range(len(lengths))]
