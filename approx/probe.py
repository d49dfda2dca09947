"""Does the base alone produce a text? Numbers for each record, and a count of those it seems to know.

    extraction strength,   of the answer's tokens, given the true ones before them
    exact memorisation
    continuation           ROUGE-L recall of what the base says greedily after the prompt
    membership margin      Min-K%++ of the text above the mean of its own neighbours: the same text with
                           some tokens replaced by what the base finds likeliest there (Mattern et al.
                           2023 compare with neighbours; here the model itself proposes them). A text
                           that the base knows is likelier than its neighbours, another is not: so the
                           margin's sign needs no threshold that is fitted on other data

A record counts as known when the extraction strength is at least KNOWN_STRENGTH, or the greedy
continuation recalls KNOWN_RECALL of its answer and as many of its tokens are memorised; in either case
only with a positive margin. Recall alone won't do: a base that knows how such answers are phrased
recalls all but the names.

Rules: approximate, and said to be so wherever it is shown. The base is read, never changed. Of a plain
text the second half is the answer. At most MAX_PROBED records are asked, the first by keyed order; how
many were is told. What is returned holds no text.

Not covered: knowledge under another wording; what adapters or patches know; other languages' stemming.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
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
from sisa.model.base import load_base
from sisa.model.numerics import pin_threads
from sisa.model.tokens import NO_LOSS, Tokens, Untokenizable, tokenize

MAX_PROBED = 32
MAX_NEW_TOKENS = 64
NUM_NEIGHBOURS, REPLACED_SHARE = 4, 0.3
KNOWN_RECALL, KNOWN_STRENGTH = 0.9, 0.5


def open_probe(base_dir: Path, base_digest: str, config: RunConfig) -> BaseProbe:
    """The probe of a model's base."""
    return BaseProbe(base_dir, base_digest, config.sisa.threads_per_shard, config.sequence_len)


class BaseProbe:
    """Asks one base; a `sisa.ports.Probe`."""

    def __init__(self, base_dir: Path, base_digest: str, threads: int, sequence_len: int) -> None:
        self._base = (base_dir, base_digest)
        self._threads = threads
        self._sequence_len = sequence_len

    def __call__(self, records: Sequence[Record]) -> Probed:
        """Raises IntegrityError for another base. Records that can't be tokenized are not probed."""
        pin_threads(self._threads)
        model, tokenizer = load_base(*self._base)
        found = []
        for record in records[:MAX_PROBED]:
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
        score, likeliest = _scored(model, tokens)
        whole = score.without_end()
        self.strength = extraction_strength(whole.correct)
        self.memorised = exact_memorisation(whole.correct)
        self.margin = _min_k(score) - _mean_of_neighbours(model, tokens, likeliest)
        self.recall = _continued(model, tokenizer, tokens)
        said = min(self.recall, self.memorised) >= KNOWN_RECALL or self.strength >= KNOWN_STRENGTH
        self.known = said and self.margin > 0


def _scored(model: Any, tokens: Tokens) -> tuple[AnswerScore, list[list[int]]]:
    """The score of the answer, and the two likeliest tokens at each of its positions."""
    batch = collate([tokens], pad_id=0)
    with torch.inference_mode():
        logits_BTV = model(input_ids=batch.ids_BT1).logits
    (score,) = answer_scores(logits_BTV, batch)
    top_T2 = logits_BTV[0, :-1].topk(2, dim=-1).indices
    return score, top_T2[batch.mask_BT[0]].tolist()


def _min_k(score: AnswerScore) -> float:
    return min_k_plus_plus_score(score.logprobs, score.means, score.variances)


def _mean_of_neighbours(model: Any, tokens: Tokens, likeliest: Sequence[Sequence[int]]) -> float:
    """Mean score of neighbours: at some answer positions the base's own best other token."""
    places = [at for at, label in enumerate(tokens.labels) if label != NO_LOSS and at > 0]
    drawn = random.Random(0)  # noqa: S311  the same neighbours for the same text
    count = max(1, round(REPLACED_SHARE * len(places)))
    scores = []
    for _ in range(NUM_NEIGHBOURS):
        ids, labels = list(tokens.input_ids), list(tokens.labels)
        for number in drawn.sample(range(len(places)), count):
            at = places[number]
            first, second = likeliest[number]
            ids[at] = labels[at] = second if first == ids[at] else first
        scores.append(_min_k(_scored(model, Tokens(ids, labels))[0]))
    return sum(scores) / len(scores)


def _continued(model: Any, tokenizer: Any, tokens: Tokens) -> float:
    """ROUGE-L recall of the greedy continuation after all that comes before the answer."""
    start = next(at for at, label in enumerate(tokens.labels) if label != NO_LOSS and at > 0)
    end = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    answer = [each for each in tokens.input_ids[start:] if each not in end][:MAX_NEW_TOKENS]
    prompt = torch.tensor([tokens.input_ids[:start]])
    with torch.inference_mode():
        out = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=len(answer) + 1,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
    said = tokenizer.decode(out[0, start:], skip_special_tokens=True)
    return rougeL_recall(tokenizer.decode(answer, skip_special_tokens=True), said)
