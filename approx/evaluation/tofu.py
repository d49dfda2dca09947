"""TOFU's data from a local directory or from the hub, as questions.

    DIR/forget10_perturbed.jsonl    question, answer, paraphrased_answer, perturbed_answer: [text]
    DIR/retain_perturbed.jsonl      the same
    DIR/real_authors_perturbed.jsonl and world_facts_perturbed.jsonl     without paraphrased_answer
    DIR/forget10.jsonl, retain90.jsonl, full.jsonl ...                   question, answer
    DIR/idontknow.jsonl             text

On the hub these are configurations of one dataset, split `train`.

A set is read whole or refused with all of its problems, which name files and lines and never text.
`evaluation_sets` returns four sets: the three whose nine numbers make model utility, and the forget
set. On real authors and world facts the answer is its own paraphrase. Rows are identified by their
order.

TOFU's holdout sets are not in its first release, so membership attacks need a file of questions that no
model has seen (`read_holdout`).

Source: TOFU (Maini et al. 2024), `locuslab/TOFU`.

>>> RETAIN_OF["forget05"], len(PLAIN_SETS)
('retain95', 9)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from approx.metrics.model_utility import UTILITY_SETS
from sisa.core.digest import digest_of
from sisa.core.errors import EnvironmentFault, InvalidInput, Problem

ForgetSplit = Literal["forget01", "forget05", "forget10"]
RETAIN_OF: Mapping[ForgetSplit, str] = {
    "forget01": "retain99",
    "forget05": "retain95",
    "forget10": "retain90",
}
PLAIN_SETS = ("full", *RETAIN_OF, *RETAIN_OF.values(), "real_authors", "world_facts")
HOLDOUT = "holdout"
HUB_NAME = "locuslab/TOFU"

TofuRow = Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """One question of a set. Plain and holdout questions have no paraphrase and no wrong answers."""

    set: str
    idx: int
    question: str = field(repr=False)
    answer: str = field(repr=False)
    paraphrased: str | None = field(default=None, repr=False)
    perturbed: tuple[str, ...] = field(default=(), repr=False)

    @property
    def place(self) -> tuple[str, int]:
        return self.set, self.idx


def evaluation_sets(source: str, split: ForgetSplit, limit: int | None = None) -> list[Question]:
    """Return the questions of an evaluation: retain, real authors, world facts, then the forget set.

    `source` is a directory or a hub name. `limit` takes the first questions of each set (the published
    logs have 300). Raise InvalidInput listing what is missing or malformed, or EnvironmentFault.
    """
    reading = _Reading(source)
    found = []
    for name in (*UTILITY_SETS, split):
        found += reading.questions(name, f"{name}_perturbed", limit)
    reading.raise_problems()
    return found


def load_set(source: str, name: str) -> list[Question]:
    """Return the plain questions of one of `PLAIN_SETS`. Raise as `evaluation_sets`."""
    if name not in PLAIN_SETS:
        raise InvalidInput("no such set", expected=", ".join(PLAIN_SETS), got=name)
    reading = _Reading(source)
    found = reading.questions(name, name, None, plain=True)
    reading.raise_problems()
    return found


def load_refusals(source: str) -> list[str]:
    """Return ways to say "I don't know", for methods that train on them. Raise as `evaluation_sets`."""
    reading = _Reading(source)
    found = reading.texts("idontknow")
    reading.raise_problems()
    return found


def read_holdout(path: Path) -> list[Question]:
    """Return questions that no evaluated model was trained on, from a JSONL file."""
    reading = _Reading(str(path.parent))
    found = reading.questions(HOLDOUT, path.name.removesuffix(".jsonl"), None, plain=True)
    reading.raise_problems()
    return found


def questions_digest(questions: Sequence[Question]) -> str:
    """Return the digest that names a list of questions: their texts, in order."""
    return digest_of([asdict(each) for each in questions])


class _Reading:
    """The sets read so far, and every problem found in them."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._problems: list[Problem] = []
        self._rows: Callable[[str], list[Any]] = self._local if Path(source).is_dir() else self._hub

    def questions(
        self, name: str, stored: str, limit: int | None, *, plain: bool = False
    ) -> list[Question]:
        found = []
        for number, row in enumerate(self._rows(stored)[:limit]):
            if problem := _problem(row, plain):
                self._problems.append(Problem(f"{stored}, row {number + 1}", problem))
                continue
            texts = () if plain else tuple(row["perturbed_answer"])
            paraphrased = None if plain else row.get("paraphrased_answer", row["answer"])
            found.append(Question(name, number, row["question"], row["answer"], paraphrased, texts))
        if not found and not self._problems:
            self._problems.append(Problem(stored, "holds no question"))
        return found

    def texts(self, stored: str) -> list[str]:
        rows = self._rows(stored)
        if not all(isinstance(row, dict) and _is_text(row.get("text")) for row in rows):
            self._problems.append(Problem(stored, "a row without 'text'"))
            return []
        return [row["text"] for row in rows]

    def raise_problems(self) -> None:
        if self._problems:
            raise InvalidInput(
                "the TOFU data can't be used",
                where=self._source,
                expected="files in TOFU's layout, one JSON object a line",
                next_step="fetch the missing files, or give the hub name " + HUB_NAME,
                problems=self._problems,
            )

    def _local(self, stored: str) -> list[Any]:
        path = Path(self._source, f"{stored}.jsonl")
        try:
            lines = path.read_bytes().splitlines()
        except FileNotFoundError:
            self._problems.append(Problem(path.name, "missing"))
            return []
        except OSError as error:
            raise EnvironmentFault(
                f"the disk refused: {error.strerror}", where=str(path), next_step="check the file"
            ) from error
        return [_parsed(line) for line in lines if line.strip()]

    def _hub(self, stored: str) -> list[Any]:
        import datasets

        if self._source.startswith((".", "/", "~")) or "/" not in self._source:
            raise InvalidInput(
                "no such directory",
                where=self._source,
                expected=f"a directory of JSONL files, or a hub name such as {HUB_NAME}",
                next_step="check the path",
            )
        try:
            return list(datasets.load_dataset(self._source, stored, split="train"))
        except Exception as error:  # the library raises many kinds; a message may hold anything
            kinds = {kind.__name__ for kind in type(error).__mro__}
            if "ValueError" in kinds or "DatasetNotFoundError" in kinds:
                self._problems.append(Problem(stored, f"not on the hub ({type(error).__name__})"))
                return []
            raise EnvironmentFault(
                "the data could not be fetched from the hub",
                where=self._source,
                got=type(error).__name__,
                next_step="check the network, or give a local directory",
            ) from error


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _problem(row: Any, plain: bool) -> str:
    if not isinstance(row, dict):
        return "not a JSON object"
    if not (_is_text(row.get("question")) and _is_text(row.get("answer"))):
        return "no text in 'question' or 'answer'"
    if plain:
        return ""
    wrong = row.get("perturbed_answer")
    if not isinstance(wrong, list) or not wrong or not all(map(_is_text, wrong)):
        return "'perturbed_answer' is not a list of texts"
    if not _is_text(row.get("paraphrased_answer", "none")):
        return "no text in 'paraphrased_answer'"
    return ""


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
