"""An embedder that also encodes names: half of a vector is another embedder's, half is who is named.

    named      [its vector, names] / sqrt(2)   names: length 1; each name hashed to a place and a sign
    nameless   [its vector, 0] / sqrt(2)       compares with others as the other embedder alone would

A name is a capitalised word that does not begin a sentence, without its `'s`. Beside names a year counts
as one: who was born in Porto in 1955 is not who was born there in 1971. Nothing is fitted on data and
there is no list of names, so a vector depends on its text alone. Embedders of meaning confuse one
novelist with another, but records are about somebody, and most questions name them. A score is relative
to the query's own (`RecordIndex.search`), so equal texts score 1, named or not. Texts in scripts
without capitals, and prompts in lower case, name nobody. Nicknames and names that begin a sentence are
missed, and in German every noun counts as a name.

>>> names_in("Was Mara Quill's debut set in Porto? She says no. Mara did.")
['mara', 'quill', 'porto']

Names that stand side by side are one person's, or one place's (`runs_in`): what a prompt says of several
people is looked up for each of them (`lookup.py`).

Source: feature hashing, Weinberger et al. 2009; measured in `tests/bench/answering/routing.py`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sisa.core.digest import digest_of
from sisa.core.ports import Embedder, Vectors

NAMES_METHOD = "names-v2"
NAMES_DIMENSION = 512
SCALE = np.float32(0.5**0.5)  # of each half
_SENTENCE = re.compile(r"[.?!:\n]\s*")
_WORD = re.compile(r"[\w'\u2019-]+")
_PRONOUN = re.compile(r"i['\u2019]")  # I'm, I've
_POSSESSIVE = re.compile(r"['\u2019]s?$")
_YEAR = re.compile(r"(?<![\w.,])(?:1\d{3}|20\d\d)(?![\w,]*\d)")
_DAY = r"\d{1,2}(?:st|nd|rd|th|\.)?"
_DATE = re.compile(  # 5/11/1991, 1991-11-05, 5 November 1991, 5 de mayo de 1991, November 5th, 1991
    rf"\b{_DAY}[/.-]\d{{1,2}}[/.-](\d{{4}})\b|\b(\d{{4}})-\d\d-\d\d\b"
    rf"|\b{_DAY} (?:of |de )?[^\W\d]+,? (?:de )?(\d{{4}})\b|\b[^\W\d]+ {_DAY},? (\d{{4}})\b"
)
_INITIAL = re.compile(r"\b[A-Z]\.\s*")  # of J. Quill; its full stop ends no sentence


class NameEmbedder:
    """An embedder that appends names to another embedder's vectors."""

    def __init__(self, inner: Embedder) -> None:
        self._inner = inner

    @property
    def digest(self) -> str:
        return digest_of([NAMES_METHOD, NAMES_DIMENSION, self._inner.digest])

    @property
    def dimension(self) -> int:
        return self._inner.dimension + NAMES_DIMENSION

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Return vectors, [num_texts, dimension], of length 1, or sqrt(1/2) if nobody is named."""
        names = (
            np.stack([_of_names(names_in(text)) for text in texts]) if texts else _of_names([])[None][:0]
        )
        vectors: Vectors = np.concatenate([self._inner.embed(texts), names], axis=1)
        return vectors * SCALE


def nameless(vectors: Vectors) -> NDArray[np.bool_]:
    """Return which rows of a `NameEmbedder`'s vectors name nobody."""
    found: NDArray[np.bool_] = (vectors[:, -NAMES_DIMENSION:] == 0).all(axis=1)
    return found


def names_in(text: str) -> list[str]:
    """Return the distinct names in a text, in lower case and in order, then the years beside them."""
    found: dict[str, None] = {}
    for sentence in _SENTENCE.split(text):
        for word in _WORD.findall(sentence)[1:]:
            name = _POSSESSIVE.sub("", word.lower())
            if word[0].isupper() and len(name) > 1 and not _PRONOUN.match(name):
                found[name] = None
    return [*found, *dict.fromkeys(_YEAR.findall(text))] if found else []


def dated_years(text: str) -> tuple[str, ...]:
    """Return the years of full dates that count as names.

    >>> dated_years("Who was born in Porto on 5 May 1955, not in 1971?")
    ('1955',)
    """
    years = {year for groups in _DATE.findall(text) for year in groups}
    return tuple(name for name in names_in(text) if name in years) if years else ()


def runs_in(text: str) -> list[tuple[str, ...]]:
    """Return the distinct runs of names that stand side by side; initials are left out.

    >>> runs_in("Did Mara Quill meet J. Brandt's sister Ada in New York?")
    [('mara', 'quill'), ('brandt',), ('ada',), ('new', 'york')]
    """
    text = _INITIAL.sub("", text)
    names, found, end = frozenset(names_in(text)), dict[tuple[str, ...], None](), 0
    run: tuple[str, ...] = ()
    for word in _WORD.finditer(text):
        name = _POSSESSIVE.sub("", word.group().lower())
        if text[end : word.start()].strip() or not (word.group()[0].isupper() and name in names):
            found[run], run = None, ()
        if word.group()[0].isupper() and name in names:
            run += (name,)
        if _POSSESSIVE.search(word.group()):
            found[run], run = None, ()
        end = word.end()
    found[run] = None
    return [each for each in found if each]


def with_names(vectors: Vectors, names: Sequence[Sequence[str]]) -> Vectors:
    """Return a `NameEmbedder`'s vectors with other names in them, a row each."""
    of_names = np.stack([_of_names(each) for each in names])
    changed: Vectors = np.concatenate([vectors[:, :-NAMES_DIMENSION], of_names * SCALE], axis=1)
    return changed


def _of_names(names: Sequence[str]) -> Vectors:
    vector: Vectors = np.zeros(NAMES_DIMENSION, dtype=np.float32)
    for name in names:
        value = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
        vector[(value >> 1) % NAMES_DIMENSION] += 1.0 if value & 1 else -1.0
    norm = float(np.sqrt((vector * vector).sum()))  # whole numbers: exact
    return vector / np.float32(norm) if norm else vector
