"""Look a prompt up in the index in several ways, and take the way that finds the nearest records.

A way is a text together with the names that count in it. The way whose hits are nearest to the records
of one shard decides the route:

    whole turn      the last user turn, with all its names
    sentences       each sentence with its own names, and with each run of them ("Mara Quill") alone. A
                    sentence that names nobody takes the names of the one before. Used only if records
                    name everybody in the turn, so that an appended name neither hides whom a question is
                    about nor sends a question about a deleted person to somebody else's shard
    with context    the turn with the names of the latest earlier turn that has any. If the turn names
                    somebody itself, the nearest record must hold one of its names. A turn of up to three
                    words ("and when?") is looked up together with the turn before it

A run of names is known if one record holds all of it. A prompt with an unknown run of several names is
`DOUBT` less near. A prompt that is written with capitals and names nobody could be about anybody, so the
share of the first shard counts less for it. For one with a full date the nearest record must hold its
year: many people were born in one town, and are asked about in the same words.

Without names in the index (`names: false`), the last turn and those before it, back to one that names
somebody, are looked up. The settings were chosen on one half of TOFU's authors, without any user's
records; `tests/bench/answering/hostile.py` measures them on the other half and on other data.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from sisa.core.domain import Hit
from sisa.core.ports import Vectors
from sisa.lm.routing.names import dated_years, nameless, names_in, runs_in, with_names
from sisa.lm.routing.route import (
    DOUBT,
    EQUAL,
    NUM_ROUTING_HITS,
    SHARE_WEIGHT,
    UNNAMED_SHARE_WEIGHT,
    nearness,
)

NUM_NAMING = 8  # records that are asked whether they hold a run of names
NAMING = 0.25  # of the records near a prompt
SHORT_TURN = 3  # words
_SENTENCE = re.compile(r"(?<=\w\w[.?!])\s+|(?<=[\"')][.?!])\s+|\n+")

Run = tuple[str, ...]


@dataclass(frozen=True)
class Index:
    """The index as prompts are looked up in it; `vectors` returns those of the prompts of hits."""

    embed: Callable[[Sequence[str]], Vectors]
    search: Callable[[Vectors, int], list[list[Hit]]]
    vectors: Callable[[Sequence[Hit]], Vectors]
    has_names: bool


@dataclass(frozen=True)
class Query:
    """What a person asks, with the turns before it, the latest first."""

    asked: str
    before: tuple[str, ...] = ()


@dataclass(frozen=True)
class Way:
    """A way to look a prompt up; with `must_name`, the nearest record must hold one of these names."""

    text: str
    names: Run
    doubtful: bool = False
    must_name: Run = ()


@dataclass(frozen=True)
class Found:
    """The hits of the way that decides, best first, and how near they are."""

    hits: list[Hit]
    near: float


def look_up(
    prompts: Sequence[Query], index: Index, temperature: float, live: Collection[int]
) -> list[Found]:
    """Return the hits that decide each prompt's route, and how near they are."""
    if not prompts:
        return []
    asked = list(dict.fromkeys(query.asked for query in prompts))
    rows = dict(zip(asked, index.embed(asked), strict=True))
    ways = _ways(prompts, index, dimension=len(rows[asked[0]]))
    flat = [way for some in ways for way in some]
    others = [text for text in dict.fromkeys(way.text for way in flat) if text not in rows]
    if others:
        rows |= zip(others, index.embed(others), strict=True)
    vectors = np.stack([rows[way.text] for way in flat])
    if index.has_names:
        vectors = with_names(vectors, [way.names for way in flat])
    found = (
        Found(hits, _near(way, hits, index, temperature, live))
        for way, hits in zip(flat, index.search(vectors, NUM_ROUTING_HITS), strict=True)
    )
    return [max(islice(found, len(some)), key=lambda each: each.near) for some in ways]


def _near(way: Way, hits: list[Hit], index: Index, temperature: float, live: Collection[int]) -> float:
    if way.must_name and not (hits and _holds_one_of(way.must_name, hits[0], index)):
        return -np.inf
    weight = SHARE_WEIGHT
    anybody = index.has_names and not way.names and not runs_in(way.text)
    if anybody and way.text != way.text.lower() and hits:
        named = ~nameless(index.vectors(hits))
        weight = UNNAMED_SHARE_WEIGHT if named.mean() >= NAMING else weight
    return nearness(hits, temperature, live, weight, DOUBT if way.doubtful else 0.0)


def _holds_one_of(names: Run, hit: Hit, index: Index) -> bool:
    if hit.score >= EQUAL:
        return True  # hashed names can cancel each other out
    vectors = index.vectors([hit])
    alone = with_names(np.zeros_like(vectors[:1]), [names])[0]
    return bool((vectors @ alone).max(initial=0.0) > 0)


def _ways(prompts: Sequence[Query], index: Index, dimension: int) -> list[list[Way]]:
    if not index.has_names:
        return [[Way(text, ()) for text in _back_to_a_name(query)] for query in prompts]
    texts = dict.fromkeys(text for query in prompts for text in (query.asked, *query.before))
    known = _known(list(dict.fromkeys(run for text in texts for run in runs_in(text))), index, dimension)
    return [list(dict.fromkeys(ways_of(query, known))) for query in prompts]


def _known(runs: Sequence[Run], index: Index, dimension: int) -> frozenset[Run]:
    """Return the runs of names that one record holds in full."""
    if not runs:
        return frozenset()
    nothing = np.zeros((1, dimension), np.float32)
    queries = with_names(np.repeat(nothing, len(runs), axis=0), runs)
    comparable = ~nameless(queries)  # hashed names can cancel each other out
    nearest = iter(index.search(queries[comparable], NUM_NAMING))
    hits = [next(nearest) if each else [] for each in comparable]
    return frozenset(
        run
        for run, of in zip(runs, hits, strict=True)
        if of
        and _hold_all(index.vectors(of), np.concatenate([with_names(nothing, [(n,)]) for n in run]))
    )


def _hold_all(vectors: Vectors, names: Vectors) -> bool:
    """Return whether one of some vectors has all of some names."""
    return bool(((vectors @ names.T) > 0).all(axis=1).any())


def _back_to_a_name(query: Query) -> Iterator[str]:
    for text in (query.asked, *query.before):
        yield text
        if names_in(text):
            return


def ways_of(query: Query, known: Collection[Run]) -> Iterator[Way]:
    """Yield the ways to look a prompt up; `known` are the runs of names that records hold.

    >>> query = Query("Where was she born?", ("Who is Mara Quill?",))
    >>> [way.names for way in ways_of(query, {("mara", "quill")})]
    [(), ('mara', 'quill')]
    >>> query = Query("Who is Mara Quill? Compare with Ada Lane.")
    >>> [way.text for way in ways_of(query, {("mara", "quill"), ("ada", "lane")})]
    ['Who is Mara Quill? Compare with Ada Lane.', 'Who is Mara Quill?', 'Compare with Ada Lane.']
    >>> [way.doubtful for way in ways_of(query, {("mara", "quill")})]
    [True]
    """
    asked, runs = query.asked, runs_in(query.asked)
    own, dated = tuple(names_in(asked)), dated_years(asked)
    context = next((text for text in query.before if runs_in(text)), None)
    doubtful = _doubtful(runs, known) or (not runs and context is not None)
    yield Way(asked, own, doubtful, dated)
    if runs and not _doubtful(runs, known):
        yield from _of_sentences(asked, known)
    if context is not None:
        before = runs_in(context)
        found = [run for run in before if run in known]
        every = [] if len(found) == len(before) else [tuple(names_in(context))]
        for names in (*every, *found):
            if not set(names) & set(own):
                yield Way(asked, (*own, *names), _doubtful(before, known), dated or own)
    if query.before and len(asked.split()) <= SHORT_TURN:
        yield from ways_of(Query(query.before[0], query.before[1:]), known)


def _doubtful(runs: Sequence[Run], known: Collection[Run]) -> bool:
    return any(len(run) > 1 and run not in known for run in runs)


def _of_sentences(text: str, known: Collection[Run]) -> Iterator[Way]:
    latest: list[Run] = []
    for sentence in filter(str.strip, _SENTENCE.split(text)):
        runs = [run for run in runs_in(sentence) if run in known]
        own = tuple(names_in(sentence))
        every = [own, *runs] if own else latest
        dated = dated_years(sentence)
        yield from (Way(sentence, names, must_name=dated) for names in dict.fromkeys(every))
        latest = runs or latest
