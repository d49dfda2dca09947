"""Ask a model the questions of a benchmark and log one row per question: one loop serves all.

Metrics of an answer's tokens leave out the tokens that close it (as open-unlearning leaves out the end
token); the loss includes the end token (as locuslab's does).

    rows = evaluate(model, questions, Path("full.jsonl"), Asking(PromptForm("chat")))
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from approx.evaluation.answer_score import AnswerScore, check_finite
from approx.evaluation.question_log import Header, LogRow, LogWriter, parse_row, read_log
from approx.evaluation.questions import How, PromptForm, PromptKind, Question, questions_digest
from approx.metrics.membership import min_k_score, text_scores
from approx.metrics.memorisation import exact_memorisation, extraction_strength
from approx.metrics.privleak import MIN_K
from approx.metrics.word_overlap import rougeL_recall
from sisa.core.digest import canonical_json, digest_of
from sisa.core.errors import ConfigConflict, InvalidInput

MAX_NEW_TOKENS = 200  # of an answer, as TOFU generates them


class EvaluatedModel(Protocol):
    """A model that scores and gives answers.

    `digest` names the weights and how they are used, and `kind` the form of prompts that suits them.
    """

    @property
    def name(self) -> str: ...

    @property
    def digest(self) -> str: ...

    @property
    def kind(self) -> PromptKind: ...

    def score(
        self, pairs: Sequence[tuple[str, str]], form: PromptForm, batch_size: int
    ) -> list[AnswerScore]:
        """Return the scores of (question, answer) pairs, in order. Raise InvalidInput for unfit ones."""
        ...

    def generate(
        self, questions: Sequence[str], form: PromptForm, max_new_tokens: int, batch_size: int
    ) -> list[str]:
        """Return greedy answers, in order, without surrounding white space."""
        ...


@dataclass(frozen=True)
class Asking:
    """Everything that changes a measurement, apart from the model and the questions.

    `max_new_tokens` bounds answers; questions with a manner of their own may have fewer.
    """

    form: PromptForm
    max_new_tokens: int = MAX_NEW_TOKENS

    def form_of(self, question: Question) -> PromptForm:
        """Return the form in which a question is asked."""
        if question.how is None or question.how.kind is None:
            return self.form
        return PromptForm(question.how.kind)

    def num_new(self, question: Question) -> int:
        """Return how many tokens a greedy answer may have, 0 if none is asked for."""
        if question.how is not None:
            return min(question.how.max_new_tokens, self.max_new_tokens)
        return 0 if question.paraphrased is None else self.max_new_tokens


@dataclass(frozen=True)
class FinishedLog:
    """A model's finished log. `settings` is None for a published log, which does not include them."""

    name: str
    digest: str | None
    log: Path
    settings: Mapping[str, Any] | None
    rows: list[LogRow] = field(repr=False)


def finished_log(path: Path, benchmark: str = "tofu") -> FinishedLog:
    """Return a log that was written before; published logs are TOFU's.

    Raise InvalidInput, also for a log of another benchmark, or IntegrityError.
    """
    header, rows = read_log(path)
    if not rows:
        raise InvalidInput("the log holds no question", where=str(path))
    if benchmark != (found := "tofu" if header is None else header.log):
        raise InvalidInput(
            "the log is of another benchmark", where=str(path), expected=benchmark, got=found
        )
    if header is None:
        return FinishedLog(path.name, None, path, None, rows)
    return FinishedLog(path.name, header.model, path, header.settings, rows)


def check_same_settings(model: FinishedLog, reference: FinishedLog) -> None:
    """Raise ConfigConflict if the model and the reference were asked in different ways."""
    if None not in (model.settings, reference.settings) and model.settings != reference.settings:
        raise ConfigConflict(
            "the reference was evaluated under other settings than the model",
            where=f"{model.name} and {reference.name}",
            expected=canonical_json(model.settings).decode(),
            got=canonical_json(reference.settings).decode(),
            next_step="evaluate both again with one --prompt and one --max-new-tokens",
        )


def log_name(model: EvaluatedModel, split: str, header: Header) -> str:
    """Return a readable file name, the same for the same evaluation."""
    called = re.sub(r"[^A-Za-z0-9]+", "-", Path(model.name).name).strip("-")[:40] or "model"
    return f"{split}-{called}-{digest_of([model.name, header.line().decode()])[:16]}.jsonl"


def header_of(
    model: EvaluatedModel, questions: Sequence[Question], settings: Asking, benchmark: str = "tofu"
) -> Header:
    """Return the header of an evaluation's log."""
    held = {**asdict(settings.form), "max_new_tokens": settings.max_new_tokens}
    if settings.form.kind == "chat":
        held["answer_ends_at"] = "end token"  # earlier logs of chats counted the template's line break
    return Header(model.digest, questions_digest(questions), held, benchmark)


def evaluate(
    model: EvaluatedModel,
    questions: Sequence[Question],
    log: Path,
    settings: Asking,
    header: Header | None = None,
    *,
    batch_size: int = 8,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> list[LogRow]:
    """Ask the questions that the log lacks, and return all rows in the order of the questions.

    Without a `header` the log is one of TOFU. Raise InvalidInput for scores that are not finite,
    ConfigConflict for a log of another evaluation, and whatever the model raises.
    """
    with LogWriter(log, header or header_of(model, questions, settings), parse_row) as writer:
        held = {row.place for row in writer.rows}
        waiting = [each for each in questions if each.place not in held]
        for start in range(0, len(waiting), batch_size):
            writer.append(_ask(model, waiting[start : start + batch_size], settings, batch_size))
            progress(len(writer.rows), len(questions))
        rows = {row.place: row for row in writer.rows}
    return [rows[each.place] for each in questions]


_Key = TypeVar("_Key")


def _ask(
    model: EvaluatedModel, questions: Sequence[Question], settings: Asking, batch_size: int
) -> list[LogRow]:
    said: dict[tuple[str, int], str] = {}
    for (form, tokens), some in _grouped(
        questions, lambda each: (settings.form_of(each), settings.num_new(each))
    ):
        if tokens:
            asked = [each.question for each in some]
            answers = model.generate(asked, form, tokens, batch_size)
            said |= {each.place: text for each, text in zip(some, answers, strict=True)}
    rows: dict[tuple[str, int], LogRow] = {}
    for form, some in _grouped(questions, settings.form_of):
        pairs = [
            (each.question, text)
            for each in some
            for text in (each.answer, *filter(None, [each.paraphrased]), *each.perturbed)
        ]
        found = model.score(pairs, form, batch_size)
        check_finite((each.loss for each in found), model.name)
        scores = iter(found)
        rows |= {each.place: _row(each, scores, said.get(each.place)) for each in some}
    return [rows[each.place] for each in questions]


def _grouped(
    questions: Sequence[Question], key: Callable[[Question], _Key]
) -> Iterator[tuple[_Key, list[Question]]]:
    """Yield each key with its questions, in the order in which the keys first occur."""
    found: dict[_Key, list[Question]] = {}
    for each in questions:
        found.setdefault(key(each), []).append(each)
    yield from found.items()


def _row(question: Question, scores: Iterator[AnswerScore], generated: str | None) -> LogRow:
    """Return the row of a question, whose answers' scores come next."""
    own = next(scores)
    bare = own.without_closing()
    paraphrased = None if question.paraphrased is None else next(scores).loss
    others = [next(scores) for _ in question.perturbed]
    how = question.how or How()
    if generated is not None:
        generated = before_any(generated, how.stops)
    return LogRow(
        set=question.set,
        idx=question.idx,
        avg_gt_loss=own.loss,
        num_token_gt=own.num_tokens,
        num_token_said=bare.num_tokens,
        ground_truth=question.answer,
        avg_paraphrased_loss=paraphrased,
        average_perturb_loss=tuple(each.loss for each in others),
        rougeL_recall=None if generated is None else rougeL_recall(question.answer, generated),
        generation=generated,
        extraction_strength=extraction_strength(bare.correct),
        exact_memorisation=exact_memorisation(bare.correct),
        **text_scores(bare.logprobs, bare.means, bare.variances, question.answer),
        min_40=min_k_score(bare.logprobs, MIN_K),
        logprob=sum(bare.logprobs),
        others_logprob=tuple(sum(each.without_closing().logprobs) for each in others),
        accepted=how.accepted,
    )


def before_any(text: str, stops: Sequence[str]) -> str:
    """Return a text up to the first of the stops in it, without surrounding white space.

    >>> before_any("Ada.\\n\\nQuestion: Who?", ["\\n\\n", "Question:"])
    'Ada.'
    """
    ends = [at for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(ends, default=len(text))].strip()
