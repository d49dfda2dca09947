"""An embedder without weights: signed feature hashing of words and of character n-grams.

Nothing is fitted on data (no vocabulary, no document frequencies), so a vector depends on its text
alone. Features are lower-cased words, pairs of neighbouring words, and the character 3- to 5-grams of
each word with its borders marked. Each feature is hashed to a coordinate and a sign (Weinberger et al.
2009) and weighted by 1 + ln(count); the vector is scaled to length 1. A text without features gets one
fixed unit vector. The embedder does not capture meaning: a paraphrase that shares no words is not near.

>>> embedder = HashingEmbedder()
>>> a, b, c = embedder.embed(["Where was Mara born?", "where was mara BORN", "Price of tin in June"])
>>> float(a @ b) > 0.99 > 0.3 > float(a @ c)
True
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from sisa.core.digest import digest_of
from sisa.core.ports import Vectors

HASHING_METHOD = "hashing-v1"
CHARACTER_NGRAMS = (3, 4, 5)
_WORD = re.compile(r"\w+")


class HashingEmbedder:
    """An embedder that needs neither weights nor torch."""

    dimension = 384
    digest = digest_of([HASHING_METHOD, dimension, *CHARACTER_NGRAMS])

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Return unit vectors, [num_texts, 384]."""
        return np.array([_embed(text) for text in texts], np.float32).reshape(-1, self.dimension)


def _embed(text: str) -> list[float]:
    sums = [0.0] * HashingEmbedder.dimension
    for feature, count in sorted(Counter(features(text)).items()):
        value = int.from_bytes(hashlib.blake2b(feature.encode(), digest_size=8).digest(), "big")
        weight = 1.0 + math.log(count)
        sums[(value >> 1) % len(sums)] += weight if value & 1 else -weight
    norm = math.sqrt(math.fsum(each * each for each in sums))
    if norm == 0.0:
        sums[0] = norm = 1.0
    return [each / norm for each in sums]


def features(text: str) -> Iterator[str]:
    """Yield the features of a text, each prefixed with its kind so that kinds do not collide."""
    words = _WORD.findall(text.lower())
    for word in words:
        yield f"w {word}"
        framed = f"<{word}>"
        for size in CHARACTER_NGRAMS:
            for start in range(len(framed) - size + 1):
                yield f"c {framed[start : start + size]}"
    for pair in pairwise(words):
        yield "b " + " ".join(pair)
