"""TOFU's data from a local directory or from the hub, as questions.

    DIR/forget10_perturbed.jsonl    question, answer, paraphrased_answer, perturbed_answer: [text]
    DIR/retain_perturbed.jsonl      the same
    DIR/real_authors_perturbed.jsonl and world_facts_perturbed.jsonl     without paraphrased_answer
    DIR/forget10.jsonl, retain90.jsonl, full.jsonl ...                   question, answer

On the hub these are configurations of one dataset, split `train`.

A set is read whole or refused with all of its problems, which name files and lines and never text. On
real authors and world facts the answer is its own paraphrase. Rows are identified by their order.

TOFU's holdout sets are not in its first release, so membership attacks need a file of questions that no
model has seen (`read_holdout`).

Source: TOFU (Maini et al. 2024), `locuslab/TOFU`.

>>> Question("forget05", 3, "Who?", "Ada.").place
('forget05', 3)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from approx.metrics.model_utility import UTILITY_SETS
from sisa.core.digest import digest_of
from sisa.core.errors import EnvironmentFault, InvalidInput, Problem
from sisa.store.blobs.files import disk_errors

ForgetSplit = Literal["forget01", "forget05", "forget10"]
HOLDOUT = "holdout"
HUB_NAME = "locuslab/TOFU"


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
    return read_sets(source, {name: f"{name}_perturbed" for name in (*UTILITY_SETS, split)}, limit)


def read_holdout(path: Path) -> list[Question]:
    """Return questions that no evaluated model was trained on, from a JSONL file."""
    return read_sets(str(path.parent), {HOLDOUT: path.name.removesuffix(".jsonl")}, plain=True)


def read_sets(
    source: str, sets: Mapping[str, str], limit: int | None = None, *, plain: bool = False
) -> list[Question]:
    """Return the questions of sets, given with the names they are stored under.

    Plain sets hold questions and answers alone. Raise as `evaluation_sets`.
    """
    found: list[Question] = []
    problems: list[Problem] = []
    for name, stored in sets.items():
        rows = read_rows(source, stored, problems)[:limit]
        if not rows and not problems:
            problems.append(Problem(stored, "holds no question"))
        for number, row in enumerate(rows):
            if problem := _problem(row, plain):
                problems.append(Problem(f"{stored}, row {number + 1}", problem))
                continue
            texts = () if plain else tuple(row["perturbed_answer"])
            paraphrased = None if plain else row.get("paraphrased_answer", row["answer"])
            found.append(Question(name, number, row["question"], row["answer"], paraphrased, texts))
    if problems:
        raise InvalidInput(
            "the TOFU data can't be used",
            where=source,
            expected="files in TOFU's layout, one JSON object a line",
            next_step="fetch the missing files, or give the hub name " + HUB_NAME,
            problems=problems,
        )
    return found


def questions_digest(questions: Sequence[Question]) -> str:
    """Return the digest that names a list of questions: their texts, in order."""
    return digest_of([asdict(each) for each in questions])


def read_rows(source: str, stored: str, problems: list[Problem]) -> list[Any]:
    """Return the rows of a stored set, unchecked; a missing set is added to the problems."""
    if not Path(source).is_dir():
        return _from_hub(source, stored, problems)
    path = Path(source, f"{stored}.jsonl")
    if not path.exists():
        problems.append(Problem(path.name, "missing"))
        return []
    with disk_errors(path):
        lines = path.read_bytes().splitlines()
    return [_parsed(line) for line in lines if line.strip()]


def _from_hub(source: str, stored: str, problems: list[Problem]) -> list[Any]:
    import datasets

    if source.startswith((".", "/", "~")) or "/" not in source:
        raise InvalidInput(
            "no such directory",
            where=source,
            expected=f"a directory of JSONL files, or a hub name such as {HUB_NAME}",
            next_step="check the path",
        )
    try:
        return list(datasets.load_dataset(source, stored, split="train"))
    except Exception as error:  # the library raises many kinds; a message may hold anything
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if "ValueError" in kinds or "DatasetNotFoundError" in kinds:
            problems.append(Problem(stored, f"not on the hub ({type(error).__name__})"))
            return []
        raise EnvironmentFault(
            "the data could not be fetched from the hub",
            where=source,
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
