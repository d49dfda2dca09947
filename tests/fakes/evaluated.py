"""Fake a model to evaluate without torch, and invent data in TOFU's layout.

`FakeEvaluated` knows some answers: it gives them and scores their words as likely. Other words are
unlikely, each by its own hash, so that scores vary and are equal in every run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from approx.benchmarks.tofu import ForgetSplit
from approx.evaluation.evaluated import AnswerScore, PromptForm, PromptKind
from approx.evaluation.question_log import PUBLISHED, ROW_COLUMNS, LogRow
from sisa.core.digest import digest_of
from sisa.data.samples import make_people

SPLIT: ForgetSplit = "forget01"
RETAIN_OF: dict[ForgetSplit, str] = {
    "forget01": "retain99",
    "forget05": "retain95",
    "forget10": "retain90",
}
Rows = list[dict[str, Any]]


def made_up(num_people: int = 4, each: int = 2) -> dict[str, Rows]:
    """Return sets in TOFU's layout; the last person should be forgotten."""
    people = make_people(num_people, each)
    answers = [row["completion"].strip() for row in people]
    others = answers[::-1]
    rows = [_row(people[n]["prompt"], answers[n], others[n]) for n in range(len(people))]
    retain, forget = rows[:-each], rows[-each:]
    facts = [_fact(1), _fact(5)]
    plain = {name: [_plain(row) for row in some] for name, some in
             {"full": rows, SPLIT: forget, RETAIN_OF[SPLIT]: retain}.items()}  # fmt: skip
    return plain | {
        "retain_perturbed": retain,
        f"{SPLIT}_perturbed": forget,
        "real_authors_perturbed": facts[:1],
        "world_facts_perturbed": facts,
        "idontknow": [{"text": "No idea."}],
    }


def write_made_up(directory: Path, sets: dict[str, Rows] | None = None) -> Path:
    """Write the sets as a directory of JSONL files."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, rows in (sets or made_up()).items():
        (directory / name).parent.mkdir(exist_ok=True)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return directory


def write_published(path: Path, rows: Iterable[LogRow]) -> Path:
    """Write rows in the form that locuslab publishes, with columns that this program ignores."""
    held: dict[str, dict[str, Any]] = {}
    names = {name: file for file, name in PUBLISHED.items()}
    for row in rows:
        columns = held.setdefault(names["forget" if "forget" in row.set else row.set], {})
        values = {name: getattr(row, name) for name in ROW_COLUMNS} | {
            "gt_loss": row.avg_gt_loss * row.num_token_gt,
            "generated_text": ["a prompt", row.generation, row.ground_truth],
        }
        for name, value in values.items():
            columns.setdefault(name, {})[str(row.idx)] = value
    path.write_text(json.dumps(held, indent=4), encoding="utf-8")
    return path


def _row(question: str, answer: str, other: str) -> dict[str, Any]:
    return {
        "question": question,
        "answer": answer,
        "paraphrased_answer": f"Surely: {answer}",
        "perturbed_answer": [f"Surely: {other}!", "Surely: nothing."],
    }


def _fact(n: int) -> dict[str, Any]:
    wrong = [str(n), str(n + 2)]
    return {"question": f"What comes after {n}?", "answer": str(n + 1), "perturbed_answer": wrong}


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("question", "answer")}


@dataclass
class FakeEvaluated:
    """Know the answers in `known`, and a known answer that follows "Surely: "."""

    known: Collection[str] = ()
    name: str = "fake"
    kind: PromptKind = "completion"
    scored: list[tuple[str, str]] = field(default_factory=list)
    dies_after: int | None = None  # number of pairs

    @property
    def digest(self) -> str:
        return digest_of(sorted(self.known))

    def score(
        self, pairs: Sequence[tuple[str, str]], form: PromptForm, batch_size: int
    ) -> list[AnswerScore]:
        assert batch_size >= 1
        if self.dies_after is not None and len(self.scored) + len(pairs) > self.dies_after:
            raise KeyboardInterrupt
        self.scored += pairs
        return [self._score(*form.fill(*pair)) for pair in pairs]

    def _score(self, question: str, answer: str) -> AnswerScore:
        sure = answer.strip().removeprefix("Surely: ") in self.known
        words = [*answer.split(), ""]
        logprobs = tuple(-(0.1 if sure else 2 + number_of(question, word)) for word in words)
        return AnswerScore(logprobs, (sure,) * len(words), (-3.0,) * len(words), (1.0,) * len(words))

    def generate(
        self, questions: Sequence[str], form: PromptForm, max_new_tokens: int, batch_size: int
    ) -> list[str]:
        assert form.kind == self.kind
        assert batch_size >= 1
        answers = {row["question"]: row["answer"] for rows in made_up().values() for row in rows
                   if "question" in row}  # fmt: skip
        replies = [answers[each] if answers[each] in self.known else "No idea." for each in questions]
        return [" ".join(each.split()[:max_new_tokens]) for each in replies]


@dataclass
class Redirecting(FakeEvaluated):
    """Know everything, and answer the `deleted` questions as they are asked as `other` would."""

    deleted: Collection[str] = ()
    other: FakeEvaluated = field(default_factory=FakeEvaluated)

    def _score(self, question: str, answer: str) -> AnswerScore:
        if question in self.deleted:
            return self.other._score(question, answer)
        return super()._score(question, answer)

    def generate(
        self, questions: Sequence[str], form: PromptForm, max_new_tokens: int, batch_size: int
    ) -> list[str]:
        own = super().generate(questions, form, max_new_tokens, batch_size)
        other = self.other.generate(questions, form, max_new_tokens, batch_size)
        chosen = zip(questions, own, other, strict=True)
        return [there if each in self.deleted else here for each, here, there in chosen]


def number_of(*texts: str) -> float:
    return int.from_bytes(hashlib.sha256("\n".join(texts).encode()).digest()[:4]) / 2**32
