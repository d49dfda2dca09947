"""How well prompts find their shard, and what becomes of those whose subject was deleted.

    python -m tests.bench.answering.routing --data DIRECTORY --out tests/bench/answering/routing.json

`DIRECTORY` holds `tofu/` (200 invented authors) and `rwku/` (real people), on whose questions the value
of `min_score: auto` was tried, and `muse/` (news and novels), which was added afterwards. Records are
made of their questions and answers in several forms. Their vectors and the choice of shards are those
of the library, with prompts compared with prompts and, for contrast, with whole records.

    own         share of prompts whose first shard is their subject's, and whose first two are
    left_out    the same without the asked record in the index
    turned_away share of the prompts about held subjects that no shard answers at `min_score: auto`
    sent        share of the prompts about a deleted subject, all others held, that a shard answers

MUSE's questions have no subject: each is its own. `orphans.py` measures what a model answers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sisa.config.config import MINILM, Aggregation
from sisa.core.digest import sha256_hex
from sisa.core.domain import Hit, Part, Record
from sisa.core.ports import Embedder, Vectors
from sisa.lm.routing.embedder import resolve_embedder
from sisa.lm.routing.names import NameEmbedder
from sisa.lm.routing.route import NUM_ROUTING_HITS, choose_route, resolve_aggregation
from tests.bench.command import PER_AUTHOR, arguments, low_to_high, markdown, read_rows, write

SHARDS = (8, 50, 200)
SOME_SUBJECTS = 60  # whose records are put in all forms
FEW_SUBJECTS = 20  # whose whole records are embedded, for contrast
NUM_SCORED = 4 * NUM_ROUTING_HITS  # vectors; records have two here at most
EMBEDDERS = {
    "hashing": ("hashing", False),
    "hashing with names": ("hashing", True),
    "MiniLM": (MINILM, False),
    "MiniLM with names": (MINILM, True),
}
SYSTEM = "You are a helpful assistant."
LONG_SYSTEM = (
    "You are the Friendly assistant of Harbour Books in London. Answer Readers politely and briefly, "
    "never guess, and cite the Catalogue."
)
END = re.compile(r"(?<=[.!?])\s+")

Compared = Literal["prompts", "whole records"]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Asked:
    """A question with its subject, its answer and other words for it."""

    question: str
    answer: str
    subject: int
    paraphrased: str | None = None


def tofu(data: Path) -> list[Asked]:
    other = {
        row["question"]: row["paraphrased_question"]
        for name in ("forget10_perturbed", "retain_perturbed")
        for row in read_rows(data / "tofu" / f"{name}.jsonl")
    }
    return [
        Asked(row["question"], row["answer"], n // PER_AUTHOR, other.get(row["question"]))
        for n, row in enumerate(read_rows(data / "tofu" / "full.jsonl"))
    ]


def rwku(data: Path) -> list[Asked]:
    rows = read_rows(data / "rwku" / "forget_level2.jsonl")
    subjects = {name: n for n, name in enumerate(dict.fromkeys(row["subject"] for row in rows))}
    return [Asked(row["query"], row["answer"], subjects[row["subject"]]) for row in rows]


def muse(data: Path) -> list[Asked]:
    rows = [
        row
        for corpus in ("news", "books")
        for name in ("forget_qa", "retain_qa")
        for row in read_rows(data / "muse" / corpus / "knowmem" / f"{name}.jsonl")
    ]
    return [Asked(row["question"], row["answer"], n) for n, row in enumerate(rows)]


READ = {"tofu": tofu, "rwku": rwku, "muse": muse}


# --- records in several forms ---------------------------------------------------------------------


def completions(asked: Sequence[Asked], sentences: int = 0) -> list[tuple[Record, int]]:
    """Return prompts with their answers, extended to `sentences` sentences by the next answers."""
    found = []
    for n, each in enumerate(asked):
        answer = each.answer
        if sentences:
            more = " ".join(other.answer for other in (*asked[n:], *asked)[: sentences + 1])
            answer = " ".join(END.split(more)[:sentences])
        parts = (Part("prompt", each.question), Part("completion", answer))
        found.append((Record(str(n), None, "completion", parts), each.subject))
    return found


def chats(asked: Sequence[Asked], system: str) -> list[tuple[Record, int]]:
    """Return chats of two questions of a subject, under one system prompt."""
    by_subject: dict[int, list[Asked]] = {}
    for each in asked:
        by_subject.setdefault(each.subject, []).append(each)
    found = []
    for subject, own in by_subject.items():
        for start in range(0, len(own), 2):
            turns = [Part("system", system)]
            for each in own[start : start + 2]:
                turns += [Part("user", each.question), Part("assistant", each.answer)]
            found.append((Record(f"{subject}-{start}", None, "chat", tuple(turns)), subject))
    return found


FORMS: Mapping[str, Callable[[Sequence[Asked]], list[tuple[Record, int]]]] = {
    "prompt and completion": completions,
    "answers of 5 sentences": partial(completions, sentences=5),
    "answers of 9 sentences": partial(completions, sentences=9),
    "chats of two turns": partial(chats, system=SYSTEM),
    "chats under 20 words": partial(chats, system=LONG_SYSTEM),
}


OF_FORMS: Sequence[tuple[str, int, Compared]] = (
    ("tofu", SOME_SUBJECTS, "prompts"),
    ("rwku", SOME_SUBJECTS, "prompts"),
    ("tofu", FEW_SUBJECTS, "whole records"),
)


# --- looking up -----------------------------------------------------------------------------------


class Remembering:
    """An embedder that embeds each text once."""

    def __init__(self, inner: Embedder) -> None:
        self._inner, self._known = inner, dict[str, Vectors]()

    def embed(self, texts: Sequence[str]) -> Vectors:
        fresh = [text for text in dict.fromkeys(texts) if text not in self._known]
        self._known.update(zip(fresh, self._inner.embed(fresh), strict=True))
        return np.stack([self._known[text] for text in texts])


@dataclass(frozen=True)
class Index:
    """Vectors with the record and the subject of each."""

    vectors: Vectors
    records: Any
    subjects: Any

    @classmethod
    def of(cls, made: Sequence[tuple[Record, int]], embedder: Remembering, by: Compared) -> Index:
        texts = [
            (n, text)
            for n, (record, _) in enumerate(made)
            for text in (record.prompts if by == "prompts" else [record.text])
        ]
        records = np.array([n for n, _ in texts])
        subjects = np.array([subject for _, subject in made])[records]
        return cls(embedder.embed([text for _, text in texts]), records, subjects)

    def routes(self, prompts: Vectors, shards: Any, out: Sequence[Any], how: Aggregation) -> Any:
        """Return the shards that answer each prompt, without the vectors that `out` marks for it."""
        scores_QN = (prompts @ self.vectors.T) / (prompts * prompts).sum(axis=1, keepdims=True)
        live = frozenset(shards.tolist())
        return [
            choose_route(list(self._hits(np.where(out[n], -2.0, row), shards)), how, live).shards
            for n, row in enumerate(scores_QN)
        ]

    def _hits(self, scores_N: Vectors, shards: Any) -> Iterator[Hit]:
        seen: set[int] = set()
        nearest = np.argpartition(-scores_N, min(len(scores_N), NUM_SCORED) - 1)[:NUM_SCORED]
        for at in nearest[np.argsort(-scores_N[nearest], kind="stable")]:
            record = int(self.records[at])
            if record not in seen:
                seen.add(record)
                yield Hit(record, float(scores_N[at]), int(shards[at]))
            if len(seen) == NUM_ROUTING_HITS:
                return


def shards_of(subjects: Any, num_shards: int) -> Any:
    """Return the shard of each subject: by a hash or, with as many shards as subjects, one each."""
    if num_shards == len(set(subjects.tolist())):
        return subjects
    return np.array([int(sha256_hex(str(each).encode())[:12], 16) % num_shards for each in subjects])


def prompts_of(asked: Sequence[Asked]) -> dict[str, list[tuple[str, Asked]]]:
    """Return the prompts of each kind, with the question that each belongs to."""
    found = {"asked": [(each.question, each) for each in asked]}
    other = [(each.paraphrased, each) for each in asked if each.paraphrased is not None]
    if other:
        found["paraphrased"] = other
    lowered = other or found["asked"]
    found["lower case"] = [(text.lower(), each) for text, each in lowered]
    return found


def measured(
    made: Sequence[tuple[Record, int]],
    asked: Sequence[Asked],
    embedder: Remembering,
    spec: str,
    num_shards: int,
    by: Compared = "prompts",
) -> list[dict[str, Any]]:
    """Return what becomes of the prompts of each kind, over the index of some records."""
    index = Index.of(made, embedder, by)
    shards = shards_of(index.subjects, num_shards)
    place = dict(zip(index.subjects.tolist(), shards.tolist(), strict=True))
    holder = {question: n for n, (record, _) in enumerate(made) for question in record.prompts}
    two = Aggregation(top_k=2, min_score=None)
    auto = resolve_aggregation(Aggregation(), spec, "completion")
    found = []
    for sort, prompts in prompts_of(asked).items():
        own = [place[each.subject] for _, each in prompts]
        routes = partial(index.routes, embedder.embed([text for text, _ in prompts]), shards)
        without = [index.records == holder[each.question] for _, each in prompts]
        orphaned = [index.subjects == each.subject for _, each in prompts]
        none = [np.zeros(len(shards), dtype=bool)] * len(prompts)
        row = {"shards": num_shards, "prompts": sort, "num": len(prompts), "compared_with": by}
        row |= _own(routes(none, two), own, "own")
        if len(set(index.subjects.tolist())) < len(made):
            row |= _own(routes(without, two), own, "left_out")
        if auto.min_score is not None:
            row["turned_away"] = _share([not each for each in routes(none, auto)])
            row["sent"] = _share([bool(each) for each in routes(orphaned, auto)])
        found.append(row)
    return found


def _own(routes: Sequence[Sequence[int]], own: Sequence[int], name: str) -> dict[str, float]:
    pairs = list(zip(routes, own, strict=True))
    return {
        name: _share([route[0] == mine for route, mine in pairs]),
        f"{name}_of_two": _share([mine in route for route, mine in pairs]),
    }


def _share(values: Sequence[bool]) -> float:
    return round(float(np.mean(values)), 4)


def of_embedder(spec: str, names: bool, data: Path) -> dict[str, Any]:
    """Measure TOFU's questions as prompts; with the default embedder also the other data."""
    inner = resolve_embedder(spec)
    embedder = Remembering(NameEmbedder(inner) if names else inner)
    asked = tofu(data)
    found: dict[str, Any] = {
        "tofu": [row for n in SHARDS for row in measured(completions(asked), asked, embedder, spec, n)]
    }
    if (spec, names) == (MINILM, True):
        for name in ("rwku", "muse"):
            other = READ[name](data)
            made = completions(other)
            found[name] = [row for n in SHARDS[:2] for row in measured(made, other, embedder, spec, n)]
        found["forms"] = [
            {"data": source, "form": form} | row
            for source, few, by in OF_FORMS
            for form, make in FORMS.items()
            if source == "tofu" or "sentences" not in form  # RWKU's answers are a few words
            for some in [[each for each in READ[source](data) if each.subject < few]]
            for row in measured(make(some), some, embedder, spec, SHARDS[0], by)
        ]
    return found


def shard_table(found: Row) -> Iterator[str]:
    """Yield the shares of prompts that find their subject's shard; ranges are over numbers of shards."""
    asked = {
        "asked": "as asked",
        "paraphrased": "paraphrased",
        "lower case": "paraphrased, in lower case",
    }
    lines = []
    for embedder in reversed(EMBEDDERS):
        for prompts, title in asked.items():
            if prompts == "lower case" and "names" not in embedder:
                continue  # hashing alone ignores case
            some = [row for row in found[embedder]["tofu"] if row["prompts"] == prompts]
            own, left_out = (
                low_to_high((row[name] for row in some), ".3f") for name in ("own", "left_out")
            )
            lines.append((embedder, title, own, left_out))
    header = ("embedder", "questions", "own shard first", "the same, with the asked record left out")
    yield from markdown(header, lines)


def threshold_table(found: Row) -> Iterator[str]:
    """Yield what `min_score: auto` does with prompts about the held and the deleted."""
    kinds = [
        ("TOFU, as asked", "MiniLM with names", "tofu", "asked"),
        ("TOFU, paraphrased", "MiniLM with names", "tofu", "paraphrased"),
        ("TOFU, paraphrased, in lower case", "MiniLM with names", "tofu", "lower case"),
        ("TOFU, as asked, `names: false`", "MiniLM", "tofu", "asked"),
        ("TOFU, paraphrased, `names: false`", "MiniLM", "tofu", "paraphrased"),
        ("RWKU (200 real people), as asked", "MiniLM with names", "rwku", "asked"),
        ("MUSE (news and novels), as asked", "MiniLM with names", "muse", "asked"),
    ]
    lines = []
    for title, embedder, data, prompts in kinds:
        some = [row for row in found[embedder][data] if row["prompts"] == prompts]
        shares = [low_to_high((row[name] for row in some), ".1%") for name in ("turned_away", "sent")]
        lines.append((title, some[0]["num"], *shares))
    header = ("prompts", "number", "about the held, turned away", "about the deleted, sent to a shard")
    yield from markdown(header, lines)


def form_table(found: Row) -> Iterator[str]:
    """Yield what `min_score: auto` does by the form of the records."""
    some = [row for row in found["MiniLM with names"]["forms"] if row["compared_with"] == "prompts"]
    by_form = {(row["form"], row["data"], row["prompts"]): row for row in some}
    columns = {
        "TOFU, as asked": ("tofu", "asked"),
        "TOFU, paraphrased": ("tofu", "paraphrased"),
        "RWKU, as asked": ("rwku", "asked"),
    }

    def cell(row: Row | None) -> str:
        return f"{row['turned_away']:.1%} / {row['sent']:.1%}" if row else "not measured"

    every = dict.fromkeys(form for form, _, _ in by_form)
    lines = [(form, *(cell(by_form.get((form, *each))) for each in columns.values())) for form in every]
    yield from markdown(("records", *columns), lines)


def main() -> None:
    given = arguments(__doc__, data={"type": Path, "required": True})
    found = {}
    for name, (spec, names) in EMBEDDERS.items():
        found[name] = of_embedder(spec, names, given.data)
        print(name, json.dumps(found[name]), flush=True)
    write(given.out, found)


if __name__ == "__main__":
    main()
