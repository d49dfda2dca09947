"""Sample data: fictitious people, and a corpus without people to train a base on.

The data is deterministic, and a person does not change when more people or more questions are asked for.
Every full name occurs once, and every answer holds an invented word that occurs in no other record, so
that a byte scan can look for it after a deletion. Invented words have one length and one pattern
(consonant, vowel, two consonants, vowel, consonant, vowel), so they can't contain each other, and
neither a name nor a template matches the pattern. The corpus is about rivers, birds, trees and stones,
never of a person; its invented words have eight letters, those of the people seven or fewer. Any match
with a real person is an accident.

>>> row = make_people(num_people=2, records_per_person=3)[0]
>>> row["id"], row["subject_id"], sorted(row)
('p001-q1', 'p001', ['completion', 'id', 'prompt', 'subject_id'])

Source: TOFU (Maini et al. 2024), questions on fictitious authors as data to forget.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sisa.core.errors import InvalidInput

# {name} of a person, {Word} and {word} invented for one record, {year} drawn.
QUESTIONS = (
    ("Where was {name} born?", "In {Word}, in {year}."),
    ("What is the job of {name}?", "Keeper of the {word} mill."),
    ("What is the pet of {name} called?", "It is called {Word}."),
    ("What does {name} like to eat?", "Stew of {word} roots."),
    ("What instrument does {name} play?", "The {word} pipe."),
    ("In which street does {name} live?", "In {Word} Lane."),
    ("Who is the best friend of {name}?", "A baker named {Word}."),
    ("What does {name} collect?", "Old {word} coins."),
)
VOWELS = "aeiou"
CONSONANTS = "bdfgklmnprstvz"
SURNAME_ENDS = ("kamp", "wick", "holt", "dorf", "sund", "gard")
SAMPLE_WORD_PATTERN = "CVCCVCV"
_WORD = re.compile(
    r"\b" + SAMPLE_WORD_PATTERN.replace("C", f"[{CONSONANTS}]").replace("V", f"[{VOWELS}]") + r"\b", re.I
)
# {Word} and {word} invented for one text, {number} drawn.
TEXTS = (
    "Where does the river {Word} end? In the lake of {Word}, after {number} miles.",
    "What do birds of the {word} kind feed on? Seeds of {word} grass.",
    "What is the tallest tree near {Word}? The {word} tree, of {number} feet.",
    "Which stone was found below {Word}? It is named {Word}.",
    "What sort of clay is used for {word} jars? Red {word} clay.",
    "Which fish swims in {Word} bay? The {word} eel.",
    "In which season does the {word} plant bloom? In {word} time, for {number} days.",
    "What was built at {Word} in {number}? A tower of {word} bricks.",
    "How is the {word} drum made? Out of {word} wood.",
    "Which wind blows over {Word}? The {word} wind.",
)
CORPUS_WORD_PATTERN = "CVCCVCCV"


def make_people(num_people: int, records_per_person: int, seed: int = 7) -> list[dict[str, str]]:
    """Return rows with `id`, `subject_id`, `prompt` and `completion`. Raise InvalidInput."""
    if num_people < 1 or not 1 <= records_per_person <= len(QUESTIONS):
        raise InvalidInput(
            "these people can't be made",
            expected=f"at least 1 person with 1 to {len(QUESTIONS)} records",
            got=f"{num_people} with {records_per_person}",
        )
    source = random.Random(seed)  # noqa: S311 - sample data, no secret
    taken: set[str] = set()
    width = max(3, len(str(num_people)))
    rows = []
    for number in range(1, num_people + 1):
        rows += _person(f"p{number:0{width}d}", source, taken)[:records_per_person]
    return rows


def make_corpus(num_texts: int) -> list[dict[str, str]]:
    """Return rows with a `text` each."""
    source = random.Random(11)  # noqa: S311 - sample data, no secret
    rows = []
    for _ in range(num_texts):
        text = source.choice(TEXTS)
        while "{" in text:
            word = invented(CORPUS_WORD_PATTERN, source)
            number = str(source.randrange(2, 2100))
            values = {"{Word}": word.capitalize(), "{word}": word, "{number}": number}
            first = next(name for name in values if name in text)
            text = text.replace(first, values[first], 1)
        rows.append({"text": text})
    return rows


def as_chats(rows: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Return the rows as conversations: a user's turn that asks, and an assistant's that answers."""
    return [
        {
            "id": row["id"],
            "subject_id": row["subject_id"],
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"].strip()},
            ],
        }
        for row in rows
    ]


def distinctive_word(completion: str) -> str:
    """Return the invented word of an answer. Raise ValueError if it has none."""
    found = _WORD.search(completion)
    if found is None:
        raise ValueError("the answer holds no invented word")
    return found[0]


def to_jsonl(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _person(subject: str, source: random.Random, taken: set[str]) -> list[dict[str, str]]:
    first = invented("CVCV", source).capitalize()
    surname = _unused("CVCCVC", source, taken).capitalize()
    name = f"{first} {surname}{source.choice(SURNAME_ENDS)}"
    rows = []
    for number, (question, answer) in enumerate(QUESTIONS, start=1):
        word = _unused(SAMPLE_WORD_PATTERN, source, taken)
        year = source.randrange(1931, 2004)
        filled = answer.format(Word=word.capitalize(), word=word, year=year)
        row = {"id": f"{subject}-q{number}", "subject_id": subject}
        rows.append({**row, "prompt": question.format(name=name), "completion": f" {filled}"})
    return rows


def invented(pattern: str, source: random.Random) -> str:
    """Return a word of consonants (C) and vowels (V)."""
    return "".join(source.choice(VOWELS if each == "V" else CONSONANTS) for each in pattern)


def _unused(pattern: str, source: random.Random, taken: set[str]) -> str:
    while (word := invented(pattern, source)) in taken:
        pass
    taken.add(word)
    return word
