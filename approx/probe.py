"""Does the base alone produce a text? Numbers for each record, and a count of those it seems to know.

    extraction strength,   of the answer's tokens, given the true ones before them
    exact memorisation
    continuation           ROUGE-L recall of what the base says greedily after the prompt
    membership margin      Min-K%++ of the answer above the mean of its neighbours: the answer, cut after
                           some shares of it and continued by the base itself (Mattern et al. 2023
                           compare with neighbours that a masked model proposes). About 0 for what the
                           base says anyway, below for what it would not say: no threshold is fitted

A record counts as known when the extraction strength is at least KNOWN_STRENGTH, or the greedy
continuation recalls KNOWN_RECALL of its answer and as many of its tokens are memorised. Recall alone
won't do: a base that knows how such answers are phrased recalls all but the names.

The base is asked as it is served: under the patches that it is given.

Rules: approximate, and said to be so wherever it is shown. The base is read, never changed. Of a plain
text the second half is the answer. At most MAX_PROBED records are asked, the first in their order, and
none any more after MAX_SECONDS; how many were is told. What is returned holds no text.

Not covered: knowledge under another wording; what adapters know; other languages' stemming.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from approx.answer_scores import answer_scores
from approx.answer_tokens import collate
from approx.evaluated import AnswerScore
from approx.metrics.exact_memorisation import exact_memorisation
from approx.metrics.extraction_strength import extraction_strength
from approx.metrics.min_k_plus_plus import min_k_plus_plus_score
from approx.metrics.rouge import rougeL_recall
from sisa.config import RunConfig
from sisa.domain import Probed, Record
from sisa.model.numerics import pin_threads
from sisa.model.patched import load_patched
from sisa.model.tokens import NO_LOSS, Tokens, Untokenizable, tokenize

MAX_PROBED, MAX_SECONDS = 32, 60.0  # the text waits for its erasure meanwhile
MAX_ANSWER_TOKENS = 64
SHARES = 3  # neighbours: continued from the prompt, from a third and from two thirds of the answer
KNOWN_RECALL, KNOWN_STRENGTH = 0.9, 0.5


def open_probe(
    base_dir: Path, base_digest: str, config: RunConfig, patches: Sequence[Mapping[str, bytes]]
) -> BaseProbe:
    """The probe of a model's base under patches, lowest first."""
    threads = config.sisa.threads_per_shard
    return BaseProbe(base_dir, base_digest, threads, config.sequence_len, patches)


class BaseProbe:
    """Asks one base, under patches or not; a `sisa.ports.Probe`."""

    def __init__(
        self,
        base_dir: Path,
        base_digest: str,
        threads: int,
        sequence_len: int,
        patches: Sequence[Mapping[str, bytes]] = (),
    ) -> None:
        self._base = (base_dir, base_digest, patches)
        self._threads = threads
        self._sequence_len = sequence_len

    def __call__(self, records: Sequence[Record]) -> Probed:
        """Raises IntegrityError for another base, or a patch that does not fit. Records that can't be
        tokenized are not probed."""
        pin_threads(self._threads)
        model, tokenizer = load_patched(*self._base)
        found: list[_Asked] = []
        started = time.monotonic()
        for record in records[:MAX_PROBED]:
            if found and time.monotonic() - started > MAX_SECONDS:
                break
            tokens = _answered(record, tokenizer, self._sequence_len)
            if tokens is not None:
                found.append(_Asked(model, tokenizer, tokens))
        if not found:
            return Probed(len(records))
        return Probed(
            num_records=len(records),
            num_probed=len(found),
            num_known=sum(each.known for each in found),
            extraction_strength=_mean([each.strength for each in found]),
            exact_memorisation=_mean([each.memorised for each in found]),
            membership_margin=_mean([each.margin for each in found]),
            continuation=_mean([each.recall for each in found]),
        )


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4)


def _answered(record: Record, tokenizer: Any, sequence_len: int) -> Tokens | None:
    """Prompt and answer; None where nothing can be asked."""
    try:
        tokens = tokenize(record, tokenizer, train_on_inputs=False)
    except Untokenizable:
        return None
    ids, labels = tokens.input_ids[:sequence_len], list(tokens.labels[:sequence_len])
    if record.kind == "text":
        half = len(ids) // 2
        labels[:half] = [NO_LOSS] * half
    answer = [at for at, label in enumerate(labels) if label != NO_LOSS and at > 0]
    return Tokens(ids, labels) if answer else None


class _Asked:
    """One record's numbers."""

    def __init__(self, model: Any, tokenizer: Any, tokens: Tokens) -> None:
        start = next(at for at, label in enumerate(tokens.labels) if label != NO_LOSS and at > 0)
        end = {tokenizer.eos_token_id, tokenizer.pad_token_id}
        answer = [each for each in tokens.input_ids[start:] if each not in end][:MAX_ANSWER_TOKENS]
        said = [
            _continued(model, tokenizer, tokens.input_ids[: start + kept], len(answer) - kept)
            for kept in sorted({len(answer) * share // SHARES for share in range(SHARES)})
        ]
        score = _scored(model, _from(tokens.input_ids[:start], answer))
        neighbours = [_from(tokens.input_ids[:start], each[start:]) for each in said]
        self.strength = extraction_strength(score.correct)
        self.memorised = exact_memorisation(score.correct)
        self.recall = rougeL_recall(
            tokenizer.decode(answer, skip_special_tokens=True),
            tokenizer.decode(said[0][start:], skip_special_tokens=True),
        )
        self.margin = _min_k(score) - sum(_min_k(_scored(model, n)) for n in neighbours) / len(said)
        recalled = min(self.recall, self.memorised) >= KNOWN_RECALL
        self.known = recalled or self.strength >= KNOWN_STRENGTH


def _from(prompt: Sequence[int], answer: Sequence[int]) -> Tokens:
    return Tokens([*prompt, *answer], [NO_LOSS] * len(prompt) + list(answer))


def _scored(model: Any, tokens: Tokens) -> AnswerScore:
    batch = collate([tokens], pad_id=0)
    with torch.inference_mode():
        (score,) = answer_scores(model(input_ids=batch.ids_BT1).logits, batch)
    return score


def _min_k(score: AnswerScore) -> float:
    return min_k_plus_plus_score(score.logprobs, score.means, score.variances)


def _continued(model: Any, tokenizer: Any, ids: Sequence[int], num_tokens: int) -> list[int]:
    """Some ids and what the base says greedily after them, of exactly so many tokens."""
    prompt = torch.tensor([list(ids)])
    with torch.inference_mode():
        out = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
    found: list[int] = out[0].tolist()
    return found
