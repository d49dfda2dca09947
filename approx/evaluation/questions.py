"""Questions of a benchmark: the form of their prompts, and how they are read, from files or the hub.

    DIR/NAME.jsonl              one JSON object a line; on the hub the configuration NAME, split `train`
    DIR/CONFIG/SPLIT.jsonl      on the hub the split SPLIT of the configuration CONFIG

A benchmark names its stored sets and says how a row becomes a question. All sets are read whole or
refused with all of their problems, which name files and rows and never text.

>>> Question("forget05", 3, "Who?", "Ada.").place
('forget05', 3)
>>> form = PromptForm("completion", "Question: {question}\\nAnswer: {answer}")
>>> form.fill("Who?", "Ada.")
('Question: Who?\\nAnswer:', ' Ada.')
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from sisa.core.digest import digest_of
from sisa.core.errors import EnvironmentFault, InvalidInput, Problem
from sisa.data.dataset_export import NEEDS_CODE, needs_code
from sisa.store.blobs.files import disk_errors

PromptKind = Literal["completion", "chat", "text"]
QUESTION, ANSWER = "{question}", "{answer}"
PLAIN = QUESTION + ANSWER
HOLDOUT = "holdout"
StoredRow = Mapping[str, Any]


@dataclass(frozen=True)
class PromptForm:
    """The way a question becomes a prompt, and its answer the continuation.

    `chat` is one turn of the user and one of the assistant by the tokenizer's template. `completion`
    fills `template`; white space before {answer} belongs to the answer, as tokenizers expect. `text` is
    the answer alone, scored from its second token on if the tokenizer has no beginning token.
    """

    kind: PromptKind
    template: str = PLAIN

    def __post_init__(self) -> None:
        before, found, after = self.template.partition(ANSWER)
        if before.count(QUESTION) != 1 or not found or after:
            raise InvalidInput(
                "the template can't be used",
                where="--template",
                expected="{question} once, and {answer} at the end",
                got=self.template,
                next_step="correct the template",
            )

    def fill(self, question: str, answer: str) -> tuple[str, str]:
        """Return the prompt and the answer as texts; together they are the filled template."""
        if self.kind == "chat":
            return question, answer
        if self.kind == "text":
            return "", answer
        before = self.template.removesuffix(ANSWER)
        stem = before.rstrip()
        return stem.replace(QUESTION, question), before[len(stem) :] + answer


@dataclass(frozen=True)
class How:
    """How to ask a question that is not asked in the evaluation's own form.

    `kind` replaces the kind of that form: "completion" gives the question as it stands, and "text"
    scores the answer as a plain text. The greedy answer has at most `max_new_tokens` tokens (0: none is
    asked for) and ends before the first of `stops`. `accepted` are other right answers.
    """

    kind: PromptKind | None = None
    max_new_tokens: int = 0
    stops: tuple[str, ...] = ()
    accepted: tuple[str, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Question:
    """One question of a set. Plain and holdout questions have no paraphrase and no wrong answers.

    Without `how`, every question is scored, and one with a paraphrased answer is also answered.
    """

    set: str
    idx: int
    question: str = field(repr=False)
    answer: str = field(repr=False)
    paraphrased: str | None = field(default=None, repr=False)
    perturbed: tuple[str, ...] = field(default=(), repr=False)
    how: How | None = None

    @property
    def place(self) -> tuple[str, int]:
        return self.set, self.idx


def plain_text(name: str, idx: int, text: str, others: Sequence[str] = ()) -> Question:
    """Return a text that is scored as it stands, and others that are scored beside it.

    The text is its own question, because a deletion-ready model chooses who answers by it.
    """
    return Question(name, idx, text, text, perturbed=tuple(others), how=How("text"))


def questions_digest(questions: Sequence[Question]) -> str:
    """Return the digest that names a list of questions: their texts and manner, in order."""
    held = [asdict(each) for each in questions]
    return digest_of([{name: row[name] for name in row if name != "how" or row[name]} for row in held])


class Malformed(ValueError):
    """A row that is no question; the message holds no text of it."""


@dataclass(frozen=True)
class StoredSet:
    """A set: the name that it is stored under, and the function that makes a question of a row.

    An optional set may be missing. `make` may return None to leave a row out, or raise Malformed. `hub`
    is the set's name on the hub where it is another one.
    """

    stored: str
    make: Callable[[int, StoredRow], Question | None]
    optional: bool = False
    hub: str = ""


@dataclass(frozen=True)
class Source:
    """A benchmark's name, its name on the hub if there is one, and the split where a set names none."""

    benchmark: str
    hub: str = ""
    split: str = "train"


def read_questions(
    place: str,
    of: Source,
    sets: Sequence[StoredSet],
    limit: int | None = None,
    *,
    may_be_empty: bool = False,
) -> list[Question]:
    """Return the questions of sets, in order; `place` is a directory or a hub name.

    `limit` takes the first questions of each set. Raise InvalidInput listing what is missing or
    malformed, or EnvironmentFault.
    """
    found: list[Question] = []
    problems: list[Problem] = []
    taken: Counter[str] = Counter()
    for each in sets:
        lost: list[Problem] = []
        here = Path(place).is_dir()
        if here:
            rows = _rows_of_file(Path(place), f"{each.stored}.jsonl", lost)
        else:
            rows = _from_hub(place, each.hub or each.stored, lost, of)
        problems += [] if each.optional else lost
        if not rows and not lost:
            problems.append(Problem(each.stored, "holds no question"))
        for made in _questions_of(each, rows, problems):
            if limit is None or taken[made.set] < limit:
                taken[made.set] += 1
                found.append(made)
    if not found and not problems and not may_be_empty:
        problems.append(Problem(place, "holds no question that was asked for"))
    if problems:
        raise InvalidInput(
            f"the {of.benchmark} data can't be used",
            where=place,
            expected=f"files in {of.benchmark}'s layout, one JSON object a line",
            next_step="fetch the missing files" + (of.hub and f", or give the hub name {of.hub}"),
            problems=problems,
        )
    return found


def read_question_file(path: Path, name: str) -> list[Question]:
    """Return the questions and answers of a JSONL file as a set.

    Raise InvalidInput listing what is malformed, or EnvironmentFault.
    """
    problems: list[Problem] = []
    rows = _rows_of_file(path.parent, path.name, problems)
    found = list(_questions_of(StoredSet(path.name, partial(plain_question, name)), rows, problems))
    if not rows and not problems:
        problems.append(Problem(path.name, "holds no question"))
    if problems:
        raise InvalidInput(
            "the questions can't be used",
            where=str(path),
            expected="a JSON object with a question and an answer on each line",
            next_step="correct the file",
            problems=problems,
        )
    return found


def _questions_of(of: StoredSet, rows: Sequence[Any], problems: list[Problem]) -> Iterator[Question]:
    """Yield the questions of rows; malformed rows are added to the problems."""
    for number, row in enumerate(rows):
        try:
            made = of.make(number, _object(row))
        except Malformed as error:
            problems.append(Problem(f"{of.stored}, row {number + 1}", str(error)))
            continue
        if made is not None:
            yield made


def check_apart(name: str, asked: Sequence[str], **others: Sequence[str]) -> None:
    """Check that no question of a set is in another. Raise InvalidInput listing every one that is."""
    held = set(asked)
    problems = [
        Problem(f"{other}, question {number + 1}", f"is in {name}, too")
        for other, questions in others.items()
        for number, question in enumerate(questions)
        if question in held
    ]
    if problems:
        raise InvalidInput(
            "sets that must be apart overlap",
            expected=f"no question of {name} in another set",
            next_step="remove these questions from one of the sets",
            problems=problems,
        )


def plain_question(name: str, number: int, row: StoredRow) -> Question:
    """Return the question of a row with `question` and `answer`. Raise Malformed."""
    question, answer = texts_of(row, "question", "answer")
    return Question(name, number, question, answer)


def texts_of(row: StoredRow, *names: str) -> list[str]:
    """Return the values of columns that hold text. Raise Malformed."""
    if not all(is_text(row.get(name)) for name in names):
        raise Malformed("no text in " + " or ".join(map(repr, names)))
    return [row[name] for name in names]


def list_of(row: StoredRow, name: str, least: int = 1) -> list[str]:
    """Return the value of a column that holds a list of texts. Raise Malformed."""
    found = row.get(name)
    if not isinstance(found, list) or len(found) < least or not all(map(is_text, found)):
        raise Malformed(f"{name!r} is not a list of texts")
    return found


def is_text(value: Any) -> bool:
    """Return whether a value is a text that is not blank."""
    return isinstance(value, str) and bool(value.strip())


def _rows_of_file(folder: Path, name: str, problems: list[Problem]) -> list[Any]:
    """Return the rows of a file, unchecked; a missing file is added to the problems."""
    path = folder / name
    if not path.exists():
        problems.append(Problem(name, "missing"))
        return []
    with disk_errors(path):
        lines = path.read_bytes().splitlines()
    return [_parsed(line) for line in lines if line.strip()]


def _from_hub(place: str, stored: str, problems: list[Problem], of: Source) -> list[Any]:
    import datasets

    if place.startswith((".", "/", "~")) or "/" not in place:
        raise InvalidInput(
            "no such directory",
            where=place,
            expected="a directory of JSONL files, or a hub name" + (of.hub and f" such as {of.hub}"),
            next_step="check the path",
        )
    name, _, split = stored.partition("/")
    try:
        return list(datasets.load_dataset(place, name, split=split or of.split))
    except Exception as error:  # the library raises many kinds; a message may hold anything
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if "ValueError" in kinds or "DatasetNotFoundError" in kinds:
            problems.append(Problem(stored, f"not on the hub ({type(error).__name__})"))
            return []
        if needs_code(error):
            return _converted(place, name, split or of.split)
        raise EnvironmentFault(
            "the data could not be fetched from the hub",
            where=place,
            got=type(error).__name__,
            next_step="check the network, or give a local directory",
        ) from error


def _converted(place: str, name: str, split: str) -> list[Any]:
    """Return rows of the hub's conversion to Parquet, for a dataset that needs code of its own."""
    import datasets

    try:
        conversion = "refs/convert/parquet"
        return list(datasets.load_dataset(place, data_dir=name, split=split, revision=conversion))
    except Exception as error:
        raise InvalidInput(f"the dataset {NEEDS_CODE}", where=place, got=type(error).__name__) from error


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _object(row: Any) -> StoredRow:
    if not isinstance(row, dict):
        raise Malformed("not a JSON object")
    return row
