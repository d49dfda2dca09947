"""Compare the wording of records with that of a corpus, by hashed runs of words.

    runs     all runs of RUN_WORDS words of a text, without case and punctuation; a shorter text is one
             run
    share    the part of a record's distinct runs that the corpus has
    refused  from `NEAR` on: half of the record's wording is in the corpus

Runs are stored as sorted 64-bit hashes: 8 bytes a word of the corpus, and nothing readable. A record
shorter than a run is compared with the corpus's sentences. Paraphrases are not found.

>>> corpus = runs_of("The ferry to the island leaves at nine, and it comes back at noon.")
>>> texts = ("The FERRY to the island leaves!", "Ada was born in Turin.")
>>> [overlap_share(text, corpus) for text in texts]
[1.0, 0.0]
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from sisa.core.domain import Record
from sisa.core.errors import InvalidInput, Problem

RUN_WORDS, NEAR = 5, 0.5
if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    WordRuns = NDArray[np.uint64]  # sorted, without duplicates

_WORD = re.compile(r"\w+")
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")


def runs_of(*texts: str) -> WordRuns:
    """Return the runs of all texts together."""
    import numpy as np

    return np.unique(np.fromiter((each for text in texts for each in _runs(text)), dtype=np.uint64))


def overlap_share(text: str, corpus: WordRuns) -> float:
    """Return the part of a text's distinct runs that are in the corpus; 0 for a text without words."""
    import numpy as np

    own = np.unique(np.fromiter(_hashes(_words(text)), dtype=np.uint64))
    return float(np.isin(own, corpus, assume_unique=True).mean()) if len(own) else 0.0


def check_overlap(records: Sequence[Record], corpus: WordRuns) -> None:
    """Raise InvalidInput with the position of every record that overlaps the corpus too much."""
    problems = []
    for number, record in enumerate(records, start=1):
        worst = max((overlap_share(part.text, corpus) for part in record.parts), default=0.0)
        if worst >= NEAR:
            problems.append(
                Problem(f"record {number}", f"{worst:.0%} of its wording is in the base's corpus")
            )
    if problems:
        raise InvalidInput(
            f"{len(problems)} of {len(records)} records share their text with the corpus of the base, "
            "from which nothing can be deleted; nothing was done",
            where="base_model.scratch.corpus",
            expected=f"less than {NEAR:.0%} of a record's runs of {RUN_WORDS} words",
            next_step="remove them from the corpus and train another base, or leave the records out",
            problems=problems,
        )


def _runs(text: str) -> Iterable[int]:
    yield from _hashes(_words(text))
    for sentence in _SENTENCE.split(text):
        words = _words(sentence)
        if len(words) < RUN_WORDS:  # a short record may equal it
            yield from _hashes(words)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _hashes(words: Sequence[str]) -> Iterable[int]:
    for at in range(max(1, len(words) - RUN_WORDS + 1) if words else 0):
        run = " ".join(words[at : at + RUN_WORDS]).encode()
        yield int.from_bytes(hashlib.blake2b(run, digest_size=8).digest(), "big")
