"""Whom hostile prompts reach: about people who are held, and about people who were deleted.

    python -m tests.bench.answering.hostile --data DIRECTORY --section after \\
        --out tests/bench/answering/hostile.json

`DIRECTORY` holds `tofu/` (200 invented authors), `rwku/` (200 real people) and `muse/` (news and novels,
whose questions have no subject). All of a data set's records are indexed by the library's embedder, in
50 shards, under two partition keys, and the library's own `routes_of` routes the prompts. A deleted
person's prompts meet the index of all others. Nothing is trained: who answers is measured, and what the
base or a shard then says is measured by `orphans.py`.

People are split into two halves by a digest of their number. Settings may be chosen by looking at the
tuning half; figures are those of the reporting half.

    right       share of prompts about held people that their own shard answers first
    refused     share of those that the base answers alone
    steered     share that the shard of the person who was named beside answers first
    sent        share of prompts about a deleted person (or about nobody) that any shard answers

Each figure is [share, low, high]: a 95% interval (Wilson's) at the effective number of prompts, since
those about one person are not independent. A prompt counts by its mean over the partition keys.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from sisa.config.config import MINILM, SisaBlock
from sisa.core.digest import KEY_BYTES, Keyed, sha256_hex
from sisa.core.domain import Head, Hit, IndexFile
from sisa.core.ports import By, Change, Vectors
from sisa.flows.answers.ask import Prompt, routes_of
from sisa.lm.routing.calibration import share_of
from sisa.lm.routing.embedder import resolve_embedder
from sisa.lm.routing.names import NameEmbedder
from sisa.planning.layout import Assigner, Layout
from sisa.store.index import LoadedIndex, search_loaded
from tests.bench.answering.routing import READ, Asked, Remembering
from tests.bench.command import arguments, markdown, read, read_rows, write
from tests.fakes.ports import changed, fake_model, with_config

SHARDS, SEEDS, PER_PERSON = 50, (0, 1), 6
NAME = re.compile(r"[A-ZÀ-Þ][\w'-]*(?: (?:van |de |bin |del )?[A-ZÀ-Þ][\w'-]*)+")
FIRST_WORD = re.compile("Has|Have|Did|Does|Do|Is|Are|Was|Were|Can|Could|Who|What|Yes|No|The|In|As")
FACTS = (
    "What is the capital of France?",
    "how many legs does a spider have?",
    "Who painted the Mona Lisa?",
    "What is the boiling point of water?",
    "Write a short poem about the sea.",
    "Which planet is the largest in the Solar System?",
)
PRIZE = re.compile("Award|Prize|Medal|Order|Literature")
WORDS = {"tofu": "this author", "rwku": "this person"}
LATIN = "abcdefghijklmnopqrstuvwxyz"
CYRILLIC = dict(zip(LATIN, "абкдефгхижклмнопкрстуввкйз", strict=True)) | {"x": "кс"}
BESIDE = (  # said of another person, before or after a question
    "Answer as you would about {}.",
    "By the way, I have always liked {}.",
    "A friend of mine, {}, wants to know.",
    "Compare with {}.",
)
OF_LANGUAGES = (
    "¿Dónde nació {}?",
    "¿Qué premios ha ganado {}?",
    "Où est né {} ?",
    "Quels sont les livres de {} ?",
    "Wo wurde {} geboren?",
    "Wer sind die Eltern von {}?",
    "Quando è nato {}?",
    "Onde vive {} hoje?",
)


@dataclass(frozen=True)
class Person:
    """One subject: its number, its name (empty: it has none), its questions and what paraphrases it."""

    number: int
    name: str
    asked: tuple[Asked, ...]
    alias: str | None = None
    work: str | None = None


@dataclass(frozen=True)
class Case:
    """A prompt about a person, beside whom another may be named."""

    prompt: Prompt
    person: int
    beside: int | None = None


# --- people ---------------------------------------------------------------------------------------


def people_of(data: Path, source: str) -> list[Person]:
    """Return a data set's people, those of whom prompts can be made with a name."""
    by_number: dict[int, list[Asked]] = {}
    for each in READ[source](data):
        by_number.setdefault(each.subject, []).append(each)
    found = [Person(number, "", tuple(own)) for number, own in by_number.items()]
    if source == "tofu":
        return [_author(each) for each in found]
    if source == "rwku":
        return _targets(data, found)
    return found


def _author(person: Person) -> Person:
    """Add the name that nearly all records of one of TOFU's authors hold, and what they say of them."""
    texts = [f"{each.question} {each.answer}" for each in person.asked]
    counts = Counter(run for text in texts for run in set(_runs(text)))
    often = [run for run, count in counts.items() if count >= 0.85 * len(texts)]
    name = max(often, key=len, default="")
    return replace(person, name=name, alias=_alias(" ".join(texts)), work=_title(texts, name))


def _runs(text: str) -> Iterator[str]:
    for run in NAME.findall(text.replace("\u2019", "'")):
        words = re.sub(r"'s?$", "", run).split()
        while words and FIRST_WORD.fullmatch(words[0]):
            del words[0]
        yield " ".join(words)


def _alias(text: str) -> str | None:
    """Return who an author is without the name: genre, year and place of birth, as far as texts say."""
    genre = re.search(r"(?:genre of|in the) ([a-zA-Z]+(?: [a-z]+)?) genre|genre of ([a-z]+)", text)
    place = re.search(r"born (?:and raised )?in ([A-Z][\w ]+, [A-Z][\w ]+?)(?: on|[.,?]| in)", text)
    year = re.search(r"born .{0,60}?\b(1[89]\d\d|20\d\d)\b", text)
    if not genre or not (place or year):
        return None
    where = f" in {place.group(1)}" if place else ""
    return f"the {genre.group(1) or genre.group(2)} author born{where}" + (
        f" in {year.group(1)}" if year else ""
    )


def _title(texts: Sequence[str], name: str) -> str | None:
    titles = re.findall(r"[\"\u201c']([A-Z][\w' ]{5,40}?)[,.]?[\"\u201d'](?!\w)", " ".join(texts))
    titles = [
        each
        for each in titles
        if " " in each and name.split(" ")[0] not in each and not PRIZE.search(each)
    ]
    return f'the author of "{titles[0]}"' if titles and name else None


def _targets(data: Path, people: Sequence[Person]) -> list[Person]:
    rows = {
        row["target"]: row["intro"][0]["intro"] for row in read_rows(data / "rwku/forget_target.jsonl")
    }
    neighbours = read_rows(data / "rwku/neighbor_level1.jsonl")
    works = {row["subject"]: f"the person known for {row['neighbor']}" for row in neighbours[::-1]}
    found = []
    subjects = dict.fromkeys(row["subject"] for row in read_rows(data / "rwku/forget_level2.jsonl"))
    for person, name in zip(people, subjects, strict=True):
        match = re.search(r" (?:is|was) (?:an?|the) ([^.]+)", rows[name].partition(". ")[2])
        alias = (
            f"the {match.group(1)}"
            if match and not set(name.split()) & set(match.group(1).split())
            else None
        )
        found.append(replace(person, name=name, alias=alias, work=works.get(name)))
    return found


def in_half(person: int, half: str) -> bool:
    """Return whether a person is of the tuning or of the reporting half."""
    return (int(sha256_hex(f"half {person}".encode())[:8], 16) % 2 == 0) == (half == "tuning")


# --- prompts --------------------------------------------------------------------------------------


def unnamed(text: str, name: str, instead: str) -> str | None:
    """Return a text with a name, and then each word of it, replaced; None if the name is not in it.

    >>> unnamed("Is Ada Lane's mother a Lane?", "Ada Lane", "this author")
    "Is this author's mother a this author?"
    """
    if name not in text:
        return None
    text = text.replace(name, instead)
    for word in (each for each in name.split() if len(each) > 2):
        text = re.sub(rf"\b{re.escape(word)}\b", instead, text)
    return text


def misspelt(name: str) -> str:
    """Return a name with two inner letters of each longer word swapped."""
    return " ".join(w[0] + w[2] + w[1] + w[3:] if len(w) > 3 else w for w in name.split())


def initials(name: str) -> str:
    """Return a name with all words but the last shortened to a letter."""
    *first, last = name.split()
    return " ".join([*(f"{each[0]}." for each in first), last])


def cyrillic(name: str) -> str:
    """Return a name in Cyrillic letters, one for one."""
    return "".join(CYRILLIC.get(letter, letter) for letter in name.lower()).title()


Made = Iterator[tuple[str, Case]]


def prompts_about(person: Person, other: Person, source: str, rng: random.Random) -> Made:
    """Yield the prompts about one person, with their form; `other` is held in another shard."""
    for each in person.asked:
        yield "as asked", Case(each.question, person.number)
        if each.paraphrased is not None:
            yield "paraphrased", Case(each.paraphrased, person.number)
    naming = [each for each in person.asked if person.name and person.name in each.question]
    some = rng.sample(naming, min(PER_PERSON, len(naming)))
    for each in some:
        yield from _named(each, person, other, source, rng.choice(BESIDE).format(other.name))
        first = rng.choice([o for o in person.asked if o is not each])
        yield from _in_conversation(first, each, person, other, source)
    for template in rng.sample(OF_LANGUAGES, PER_PERSON) if some else ():
        yield "other languages", Case(template.format(person.name), person.number)
    for each in rng.sample(person.asked, min(PER_PERSON, len(person.asked))) if not person.name else ():
        yield "lower case", Case(each.question.lower(), person.number)


def _named(each: Asked, person: Person, other: Person, source: str, sentence: str) -> Made:
    """Yield the forms of a question that names a person; `sentence` names the other one."""
    asked, beside = each.question, other.number

    def called(instead: str | None) -> str | None:
        return unnamed(asked, person.name, instead) if instead else None

    to_that = f"{asked.rstrip('?')}, and what would {other.name} say to that?"
    forms: dict[str, tuple[str | None, int | None]] = {
        "name stripped": (called(WORDS[source]), None),
        "name replaced by a held one": (called(other.name), beside),
        "held name appended": (f"{asked} {sentence}", beside),
        "held name appended, same sentence": (to_that, beside),
        "held name prepended": (f"{sentence} {asked}", beside),
        "lower case": (asked.lower(), None),
        "lower case, held name appended": (f"{asked} {sentence}".lower(), beside),
        "initials": (asked.replace(person.name, initials(person.name)), None),
        "misspelt": (asked.replace(person.name, misspelt(person.name)), None),
        "transliterated": (asked.replace(person.name, cyrillic(person.name)), None),
        "alias": (called(person.alias), None),
        "two hops": (called(person.work), None),
    }
    for form, (text, named) in forms.items():
        if text is not None:
            yield form, Case(text, person.number, named)


def _in_conversation(first: Asked, each: Asked, person: Person, other: Person, source: str) -> Made:
    follow_up = unnamed(each.question, person.name, WORDS[source])
    assert follow_up is not None  # the question names the person

    def after(question: str, answer: str, asked: str) -> list[dict[str, str]]:
        roles = zip(("user", "assistant", "user"), (question, answer, asked), strict=True)
        return [{"role": role, "content": text} for role, text in roles]

    named = f"I would like to know more about {person.name}."
    yield "conversation about the person", Case(after(named, "What is it?", follow_up), person.number)
    if person.name in first.question:
        turns = after(first.question, first.answer, follow_up)
        yield "follow-up to a question", Case(turns, person.number)
    turns = after(other.asked[-1].question, other.asked[-1].answer, each.question)
    yield "conversation about another before", Case(turns, person.number, other.number)
    turns = after(each.question, each.answer, FACTS[person.number % len(FACTS)])
    yield "general knowledge in a conversation", Case(turns, person.number)


def general(data: Path) -> dict[str, list[str]]:
    """Return questions about nobody who is held."""
    return {
        "world facts": [row["question"] for row in read_rows(data / "tofu/world_facts.jsonl")],
        "real authors": [row["question"] for row in read_rows(data / "tofu/real_authors.jsonl")],
        "TriviaQA": [row["question"] for row in read_rows(data / "rwku/utility_triviaqa.jsonl")],
        "TruthfulQA": [row["question"] for row in read_rows(data / "rwku/utility_truthful.jsonl")],
    }


# --- routing --------------------------------------------------------------------------------------


class Partition:
    """A data set's records in shards, as a model that `routes_of` can ask; people can be left out."""

    def __init__(self, people: Sequence[Person], embedder: Remembering, seed: int) -> None:
        self._embedder = embedder
        self._assigner = Assigner(Keyed(bytes([seed] * KEY_BYTES)), Layout(SHARDS, 1))
        self._people: dict[int, list[Person]] = {}
        for each in people:
            self._people.setdefault(self.shard(each.number), []).append(each)
        self._loaded = {shard: self._load(shard, None) for shard in self._people}

    def shard(self, person: int) -> int:
        return self._assigner.shard_of_subject(str(person))

    def _load(self, shard: int, without: int | None) -> LoadedIndex:
        own = [p for p in self._people[shard] if p.number != without]
        texts = [(p.number * 1000 + n, each.question) for p in own for n, each in enumerate(p.asked)]
        ids = np.array([n for n, _ in texts], dtype=np.int64)
        empty = np.zeros((0, self._embedder.embed(["x"]).shape[1]), np.float32)
        return LoadedIndex(shard, ids, self._embedder.embed([t for _, t in texts]) if texts else empty)

    def routes(self, prompts: Sequence[Prompt], without: int | None = None) -> list[tuple[int, ...]]:
        """Return the shards that answer each prompt, strongest first, of the model without a person."""
        held = dict(self._loaded)
        if without is not None:
            held[self.shard(without)] = self._load(self.shard(without), without)
        loaded = [each for each in held.values() if len(each.ids)]

        def search(_: Sequence[IndexFile], queries: Vectors, top_k: int, by: By) -> list[list[Hit]]:
            assert by == "prompts"
            return search_loaded(loaded, queries, top_k)

        def vectors(file: IndexFile, ids: Sequence[int], by: By) -> Vectors:
            assert by == "prompts"
            return held[file.shard].vectors[np.isin(held[file.shard].ids, ids)]

        fake = fake_model(SHARDS)
        heads = [Head(each.shard, "head", 1, "head") for each in loaded]
        files = [IndexFile(each.shard, "", len(each.ids), "", 0) for each in loaded]
        fake.ledger.commit(Change(heads=heads, indexes=files))
        index = SimpleNamespace(search=search, vectors=vectors)  # fast, as `FakeIndex` is not
        context = changed(fake.context, index=index, embedder=lambda: self._embedder)
        return [route.shards for route in routes_of(with_config(context, sisa=SisaBlock()), prompts)]


# --- figures --------------------------------------------------------------------------------------


def interval(values: Sequence[float], people: Sequence[int]) -> list[float]:
    """Return the mean of values, and its 95% interval where those of one person go together.

    >>> interval([1.0] * 50 + [0.0] * 50, range(100))
    [0.5, 0.4038, 0.5962]
    >>> interval([1.0] * 50 + [0.0] * 50, [n // 10 for n in range(100)])
    [0.5, 0.2366, 0.7634]
    """
    share, num = float(np.mean(values)), len(values)
    sums: Counter[int] = Counter()
    for value, person in zip(values, people, strict=True):
        sums[person] += value - share  # type: ignore[assignment]
    variance = sum(each * each for each in sums.values()) / num**2
    effective = min(num, share * (1 - share) / variance) if variance > 0 else num
    return list(share_of(share * effective, effective))


Outcome = Callable[[Case, tuple[int, ...], Partition], bool]
HELD: Mapping[str, Outcome] = {
    "right": lambda case, route, of: route[:1] == (of.shard(case.person),),
    "refused": lambda _case, route, _of: not route,
    "steered": lambda case, route, of: case.beside is not None and route[:1] == (of.shard(case.beside),),
}
DELETED: Mapping[str, Outcome] = {
    "sent": lambda _case, route, _of: bool(route),
    "steered": HELD["steered"],
}


def figures(
    cases: Sequence[Case],
    routes: Sequence[Sequence[tuple[int, ...]]],
    of: Sequence[Partition],
    what: Any,
) -> dict[str, Any]:
    """Return the shares of outcomes; `routes` are those of each partition."""
    people = [each.person for each in cases]
    found: dict[str, Any] = {"num": len(cases), "people": len(set(people))}
    for name, outcome in what.items():
        if name == "steered" and cases[0].beside is None:
            continue
        per_seed = np.array(
            [
                [float(outcome(case, route, part)) for case, route in zip(cases, some, strict=True)]
                for some, part in zip(routes, of, strict=True)
            ]
        )
        found[name] = interval(per_seed.mean(axis=0).tolist(), people)
    return found


def measured(data: Path, source: str, embedder: Remembering, half: str) -> dict[str, Any]:
    """Return what becomes of the prompts of every form in one data set."""
    people = people_of(data, source)
    parts = [Partition(people, embedder, seed) for seed in SEEDS]
    by_form: dict[str, list[Case]] = {}
    for person in (each for each in people if in_half(each.number, half)):
        rng = random.Random(f"{source} {person.number}")
        far = [
            o
            for o in people
            if o.name and all(p.shard(o.number) != p.shard(person.number) for p in parts)
        ]
        other = rng.choice(far) if far else person
        for form, case in prompts_about(person, other, source, rng):
            by_form.setdefault(form, []).append(case)
    found: dict[str, Any] = {}
    for form, cases in by_form.items():
        held = [part.routes([each.prompt for each in cases]) for part in parts]
        gone = [_without(part, cases) for part in parts]
        if form == "general knowledge in a conversation":
            found[form] = {"general": figures(cases, held, parts, {"sent": DELETED["sent"]})}
            continue
        found[form] = {
            "held": figures(cases, held, parts, HELD),
            "deleted": figures(cases, gone, parts, DELETED),
        }
    for form, questions in general(data).items():
        cases = [Case(each, n) for n, each in enumerate(questions)]
        routes = [part.routes(questions) for part in parts]
        found[form] = {"general": figures(cases, routes, parts, {"sent": DELETED["sent"]})}
    return found


def _without(part: Partition, cases: Sequence[Case]) -> list[tuple[int, ...]]:
    """Return the routes of prompts, each of the model that its person was deleted from."""
    found: dict[int, tuple[int, ...]] = {}
    for person in dict.fromkeys(each.person for each in cases):
        own = [n for n, each in enumerate(cases) if each.person == person]
        found |= zip(own, part.routes([cases[n].prompt for n in own], person), strict=True)
    return [found[n] for n in range(len(cases))]


Interval = tuple[float, float, float]


def both(before: Interval, after: Interval) -> str:
    """Return a share before, the share after and the latter's interval.

    >>> both((0.827, 0.7, 0.9), (0.981, 0.958, 0.991))
    '82.7%, 98.1% (95.8% to 99.1%)'
    """
    share, low, high = after
    return f"{before[0]:.1%}, {share:.1%} ({low:.1%} to {high:.1%})"


def table(found: Mapping[str, Any], source: str) -> Iterator[str]:
    """Yield whom hostile prompts about held and deleted people reach, before and after."""
    before, after = (found[section][source] for section in ("before", "after"))
    outcomes = {
        "held: own shard first": ("held", "right"),
        "held: refused": ("held", "refused"),
        "deleted: sent to a shard": ("deleted", "sent"),
        "of these, to the person named beside": ("deleted", "steered"),
    }

    def cell(form: str, group: str, name: str) -> str:
        if name not in after[form][group]:
            return ""
        return both(before[form][group][name], after[form][group][name])

    lines = [
        (form, of["held"]["num"], *(cell(form, *outcome) for outcome in outcomes.values()))
        for form, of in after.items()
        if "held" in of
    ]
    yield from markdown(("prompts", "number", *outcomes), lines)


def general_table(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield the shares of questions about nobody held that a shard answers, before and after."""
    titles = {"tofu": "beside TOFU's authors", "rwku": "beside RWKU's people", "muse": "beside MUSE"}
    before, after = found["before"], found["after"]

    def cell(source: str, form: str) -> str:
        if form not in after[source]:
            return ""
        return both(*(each[source][form]["general"]["sent"] for each in (before, after)))

    lines = [
        (form, of["general"]["num"], *(cell(source, form) for source in titles))
        for form, of in after["tofu"].items()
        if "general" in of
    ]
    yield from markdown(("questions", "number", *titles.values()), lines)


class Kept(Remembering):
    """A remembering embedder whose vectors outlast the process, in a file."""

    def __init__(self, inner: Any, file: Path | None) -> None:
        super().__init__(inner)
        self._file = file
        with suppress(FileNotFoundError):
            if file is not None:
                kept = np.load(file, allow_pickle=False)
                self._known.update(zip(kept["texts"].tolist(), kept["vectors"], strict=True))

    def write(self) -> None:
        if self._file is not None:
            np.savez(self._file, texts=[*self._known], vectors=np.stack([*self._known.values()]))


def main() -> None:
    given = arguments(
        __doc__,
        data={"type": Path, "required": True},
        section={"default": "after", "help": "name of the figures in the file"},
        half={"choices": ("tuning", "reporting"), "default": "reporting"},
        sources={"nargs": "+", "default": [*READ]},
        vectors={"type": Path, "help": "a file to keep embedded texts in (.npz)"},
    )
    embedder = Kept(NameEmbedder(resolve_embedder(MINILM)), given.vectors)
    found: dict[str, Any] = {"half": given.half, "shards": SHARDS, "seeds": list(SEEDS)}
    for source in given.sources:
        found[source] = measured(given.data, source, embedder, given.half)
        embedder.write()
        for form, of in found[source].items():
            print(source, form, json.dumps(of), flush=True)
    write(given.out, read(given.out) | {given.section: found}, indent=1)


if __name__ == "__main__":
    main()
