"""Choose `min_score` on public prompts of the user's own, for an embedder and a number of shards.

The prompts belong to subjects, as records do, and are looked up among themselves. A model and its
records take no part, so the value depends on nothing that a deletion could concern. Each prompt is asked
twice: without its own record in the index, as a new question about a subject who is held, and without
all of its subject's records, as a question about a subject who was deleted. The value with the least sum
of two errors is the best:

    refused   share of prompts about held subjects that would be turned away
    sent      share of prompts about deleted subjects that a shard would answer

    calibrate(read_like(config, "public.jsonl", subjects="some"), embedder, config.sisa).best.min_score
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from sisa.config.config import SisaBlock
from sisa.core.digest import sha256_hex
from sisa.core.domain import Hit, Record
from sisa.core.errors import InvalidInput
from sisa.core.ports import Embedder, Vectors
from sisa.lm.routing.lookup import Index, Query, look_up
from sisa.lm.routing.route import resolve_aggregation

MAX_ASKED = 500  # prompts; the records of all are looked through
MIN_SUBJECTS = 10

Share = tuple[float, float, float]  # with its 95% interval


@dataclass(frozen=True)
class Errors:
    """What a `min_score` does with prompts about held and about deleted subjects."""

    min_score: float
    refused: Share
    sent: Share


@dataclass(frozen=True)
class Calibration:
    """The best value, and what `auto` does if the embedder has one."""

    prompts: int
    subjects: int
    best: Errors
    auto: Errors | None


def calibrate(records: Sequence[Record], embedder: Embedder, block: SisaBlock) -> Calibration:
    """Return the `min_score` that separates held from deleted subjects best.

    Raise InvalidInput for too few subjects.
    """
    asking = [each for each in records if each.subject_id and each.prompts]
    subjects = len({each.subject_id for each in asking})
    if subjects < MIN_SUBJECTS:
        raise InvalidInput(
            "too few subjects to choose a min_score",
            expected=f"prompts of {MIN_SUBJECTS} subjects or more",
            got=str(subjects),
            next_step="give rows with a prompt, or messages, and a subject",
        )
    held, deleted = _Public(asking, embedder, block).nearnesses()
    best = _best(held, deleted)
    auto = resolve_aggregation(
        block.aggregation.model_copy(update={"min_score": "auto"}), block.embedder, "completion"
    )
    return Calibration(
        prompts=len(held),
        subjects=subjects,
        best=_errors(best, held, deleted),
        auto=_errors(auto.min_score, held, deleted) if isinstance(auto.min_score, float) else None,
    )


def _best(held: Sequence[float], deleted: Sequence[float]) -> float:
    """Return the value with the least sum of errors, in the middle of the widest gap that has it.

    >>> _best([1.2, 1.1, 0.5], [0.4, 0.8])
    0.95
    """
    values = sorted({*held, *deleted})

    def cost(gap: tuple[float, float]) -> int:
        refused, sent = _num_errors(sum(gap) / 2, held, deleted)
        return refused * len(deleted) + sent * len(held)  # the sum of both shares, without rounding

    gaps = [(values[0], values[0]), *pairwise(values)]
    low, high = min(gaps, key=lambda gap: (cost(gap), gap[0] - gap[1]))
    return round((low + high) / 2, 3)


def _errors(least: float, held: Sequence[float], deleted: Sequence[float]) -> Errors:
    refused, sent = _num_errors(least, held, deleted)
    return Errors(least, share_of(refused, len(held)), share_of(sent, len(deleted)))


def _num_errors(least: float, held: Sequence[float], deleted: Sequence[float]) -> tuple[int, int]:
    """Return how many prompts are refused though held, and sent though deleted."""
    return sum(near < least for near in held), sum(near >= least for near in deleted)


def share_of(count: float, num: float) -> Share:
    """Return a share with its 95% interval (Wilson, 1927); `num` may be an effective number.

    >>> share_of(50, 100)
    (0.5, 0.4038, 0.5962)
    """
    share, z = count / num, 1.96
    middle, scale = share + z * z / (2 * num), 1 + z * z / num
    half = z * math.sqrt(share * (1 - share) / num + z * z / (4 * num**2))
    low, high = (middle - half) / scale, (middle + half) / scale
    return round(share, 4), round(low, 4), round(high, 4)


class _Public:
    """Public records, each in the shard to which some key would hash its subject."""

    def __init__(self, records: Sequence[Record], embedder: Embedder, block: SisaBlock) -> None:
        self._records, self._embedder, self._block = records, embedder, block
        self._embedded: dict[str, Vectors] = {}
        self._of_subject: dict[str, list[int]] = {}
        for number, record in enumerate(records):
            self._of_subject.setdefault(record.subject_id or "", []).append(number)
        texts = [(number, text) for number, record in enumerate(records) for text in record.prompts]
        self._numbers = np.array([number for number, _ in texts])
        self._vectors = self._embed([text for _, text in texts])
        self._shards = [
            int(sha256_hex((each.subject_id or "").encode())[:12], 16) % block.shards for each in records
        ]

    def _embed(self, texts: Sequence[str]) -> Vectors:
        fresh = [text for text in dict.fromkeys(texts) if text not in self._embedded]
        if fresh:
            self._embedded.update(zip(fresh, self._embedder.embed(fresh), strict=True))
        return np.stack([self._embedded[text] for text in texts])

    def nearnesses(self) -> tuple[list[float], list[float]]:
        """Return the nearness of prompts without their own record, and without their whole subject."""
        live, warm = frozenset(self._shards), self._block.aggregation.temperature
        held: list[float] = []
        deleted: list[float] = []
        for number in range(0, len(self._records), -(-len(self._records) // MAX_ASKED)):
            record = self._records[number]
            for left_out, into in (
                ([number], held),
                (self._of_subject[record.subject_id or ""], deleted),
            ):
                (found,) = look_up([Query(record.prompts[0])], self._without(left_out), warm, live)
                into.append(found.near)
        return held, deleted

    def _without(self, left_out: Collection[int]) -> Index:
        rows = np.flatnonzero(~np.isin(self._numbers, list(left_out)))
        vectors, numbers = self._vectors[rows], self._numbers[rows]

        def search(queries: Vectors, top_k: int) -> list[list[Hit]]:
            scores_QN = queries @ vectors.T / (queries * queries).sum(axis=1, keepdims=True)
            return [self._best_hits(scores, numbers, top_k) for scores in scores_QN]

        def of(hits: Sequence[Hit]) -> Vectors:
            return np.concatenate([vectors[numbers == hit.vector_id] for hit in hits])

        return Index(self._embed, search, of, self._block.names)

    def _best_hits(self, scores_N: Vectors, numbers: NDArray[np.int64], top_k: int) -> list[Hit]:
        best: dict[int, Hit] = {}
        for at in np.argsort(-scores_N, kind="stable").tolist():
            number = int(numbers[at])
            if number not in best:
                best[number] = Hit(number, float(scores_N[at]), self._shards[number])
            if len(best) == top_k:
                break
        return list(best.values())
