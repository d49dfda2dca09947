"""A made-up corpus to train a base on: questions and answers about things that nobody is.

Rules: deterministic (`random.Random(seed)`). It speaks of rivers, birds, trees and stones, never of
a person, so that no record can ever be in it. Its invented words have eight letters, those of the sample
people (`samples.py`) seven or fewer.

Not covered: being of use beyond the example.

>>> make_corpus(num_texts=1)[0]["text"].count("?")
1
>>> max(map(len, " ".join(each["text"] for each in make_corpus(9)).split())) <= 9
True
"""

from __future__ import annotations

import random

from sisa.data.samples import invented

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


def make_corpus(num_texts: int, seed: int = 11) -> list[dict[str, str]]:
    """Rows with `text`."""
    source = random.Random(seed)  # noqa: S311 - sample data, no secret
    rows = []
    for _ in range(num_texts):
        text = source.choice(TEXTS)
        while "{" in text:
            word = invented(CORPUS_WORD_PATTERN, source)
            number = str(source.randrange(2, 2100))
            for name, value in (("{Word}", word.capitalize()), ("{word}", word), ("{number}", number)):
                if name in text:
                    text = text.replace(name, value, 1)
                    break
        rows.append({"text": text})
    return rows
