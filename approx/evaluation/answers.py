"""Log-probabilities and scores of answers under a causal model.

Shapes: B examples, T1 tokens of the longest one, T = T1 - 1 positions, V words of the vocabulary, K
positions at which some row has an answer token, N answer tokens, of which P are scored at once.
Position t of a row predicts the token at t + 1; `mask_BT` is true where that token belongs to an answer
(its label is not NO_LOSS).

Batches for scoring are padded on the right, without an attention mask: under causal attention a real
token never sees padding, whatever its id. Sums and means run over answer tokens only. Log-probabilities
are computed in float32, or in float64 for float64 logits.

>>> batch = collate([Tokens([5, 6, 7], [-100, 6, 7]), Tokens([5, 8], [-100, 8])])
>>> batch.targets_BT.tolist(), batch.mask_BT.tolist()
([[6, 7], [8, 0]], [[True, True], [True, False]])
>>> batch.num_tokens_B.tolist()
[2, 1]
>>> batch = collate([Tokens([1, 2, 0], [-100, 2, 0])])
>>> found, = answer_scores(torch.zeros(1, 3, 4), batch)
>>> found.num_tokens, round(found.loss, 4), [round(each, 4) for each in found.means]
(2, 1.3863, [-1.3863, -1.3863])
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from approx.evaluation.answer_score import AnswerScore
from sisa.core.domain import Record
from sisa.core.errors import InvalidInput, Problem
from sisa.lm.base.tokens import NO_LOSS, Tokens, Untokenizable, tokenize


@dataclass(frozen=True)
class AnswerBatch:
    """Padded token ids, the token that each position predicts, and whether it belongs to an answer."""

    ids_BT1: Tensor
    targets_BT: Tensor
    mask_BT: Tensor

    @property
    def num_tokens_B(self) -> Tensor:
        """Return the number of answer tokens of each row."""
        return self.mask_BT.sum(dim=1)

    @property
    def answer_ids_N(self) -> Tensor:
        """Return all answer tokens, row after row."""
        return self.targets_BT[self.mask_BT]

    def at_answers(self) -> tuple[AnswerBatch, Tensor]:
        """Return the batch cut to the columns where some row has an answer token, and those columns."""
        columns_K = self.mask_BT.any(dim=0).nonzero().flatten()
        cut = AnswerBatch(self.ids_BT1, self.targets_BT[:, columns_K], self.mask_BT[:, columns_K])
        return cut, columns_K

    def to(self, device: torch.device | str) -> AnswerBatch:
        """Return the batch on another device."""
        return AnswerBatch(*(each.to(device) for each in vars(self).values()))


def answered(prompt: Sequence[int], answer: Sequence[int]) -> Tokens:
    """Return a prompt and its answer as an example, with loss on the answer only.

    >>> answered([5, 6], [7])
    Tokens(input_ids=[5, 6, 7], labels=[-100, -100, 7])
    """
    return Tokens([*prompt, *answer], [NO_LOSS] * len(prompt) + list(answer))


def examples_of(records: Sequence[Record], tokenizer: Any) -> list[Tokens]:
    """Return records as examples, with loss on their answers only.

    Raise InvalidInput listing every record that can't be tokenized.
    """
    found: list[Tokens] = []
    problems = []
    for number, record in enumerate(records, 1):
        try:
            found.append(tokenize(record, tokenizer, train_on_inputs=False))
        except Untokenizable as error:
            problems.append(Problem(f"answer {number} of {len(records)}", str(error)))
    if problems:
        raise InvalidInput(
            "answers can't be scored", problems=problems, next_step="choose another prompt form"
        )
    return found


def logits_at(model: Any, ids_BT1: Tensor, columns_K: Tensor) -> Tensor:
    """Return a causal model's logits at some columns."""
    found: Tensor = model(input_ids=ids_BT1, logits_to_keep=columns_K, use_cache=False).logits
    return found


def collate(examples: Sequence[Tokens]) -> AnswerBatch:
    """Return examples as one batch. Raise ValueError for no examples, or one without an answer token."""
    if not examples:
        raise ValueError("a batch of no examples")
    ids_BT1 = pad_sequence([torch.tensor(each.input_ids) for each in examples], True)
    labels_BT1 = pad_sequence([torch.tensor(each.labels) for each in examples], True, NO_LOSS)
    mask_BT = labels_BT1[:, 1:] != NO_LOSS
    if not bool(mask_BT.any(dim=1).all()):
        raise ValueError("an example without an answer token")
    # a label may differ from the token
    return AnswerBatch(ids_BT1, torch.where(mask_BT, labels_BT1[:, 1:], ids_BT1[:, 1:]), mask_BT)


def logprobs_BTV(logits_BTV: Tensor) -> Tensor:
    """Return log-probabilities of every word, in float32 or float64."""
    precision = torch.promote_types(logits_BTV.dtype, torch.float32)
    return torch.log_softmax(logits_BTV, dim=-1, dtype=precision)


def answer_logprobs_BT(logits_BTV: Tensor, batch: AnswerBatch) -> Tensor:
    """Return the log-probability of each answer token, and 0 at all other positions."""
    found_BTV = logprobs_BTV(logits_BTV[:, : batch.targets_BT.shape[1]])
    picked_BT = found_BTV.gather(-1, batch.targets_BT.unsqueeze(-1)).squeeze(-1)
    return torch.where(batch.mask_BT, picked_BT, torch.zeros_like(picked_BT))


def sum_logprobs_B(logits_BTV: Tensor, batch: AnswerBatch) -> Tensor:
    """Return the log-probability of each whole answer."""
    return answer_logprobs_BT(logits_BTV, batch).sum(dim=1)


def mean_logprobs_B(logits_BTV: Tensor, batch: AnswerBatch) -> Tensor:
    """Return the mean log-probability of each answer's tokens."""
    return sum_logprobs_B(logits_BTV, batch) / batch.num_tokens_B


def model_logprobs_B(model: Any, batch: AnswerBatch) -> Tensor:
    """Return the mean log-probability of each answer's tokens under a causal model."""
    cut, columns_K = batch.at_answers()
    return mean_logprobs_B(logits_at(model, cut.ids_BT1[:, :-1], columns_K), cut)


MAX_POSITIONS = 1024  # per forward pass
TOKENS_AT_ONCE = 8  # so that what is computed over the vocabulary stays in the processor's caches
TokenScore = tuple[float, bool, float, float, float]  # of one token, in the order of AnswerScore


def answer_scores(logits_BTV: Tensor, batch: AnswerBatch) -> list[AnswerScore]:
    """Return the score of each row; the logits may include the last position or not.

    Only answer positions are computed over the vocabulary, so a long prompt costs no memory.
    """
    rows = zip(logits_BTV, batch.targets_BT, batch.mask_BT, strict=True)
    return [
        score_of(token_scores(logits_TV, targets_T[mask_T], mask_T.nonzero()[:, 0]))
        for logits_TV, targets_T, mask_T in rows
    ]


def score_of(tokens: Iterable[TokenScore]) -> AnswerScore:
    """Return the score of an answer of at least one token."""
    return AnswerScore(*zip(*tokens, strict=True))


def token_scores(logits_TV: Tensor, targets_N: Tensor, positions_N: Tensor) -> list[TokenScore]:
    """Return the score of each target at its position. A word of probability 0 adds to no moment."""
    found: list[TokenScore] = []
    pieces = (torch.split(each, TOKENS_AT_ONCE) for each in (targets_N, positions_N))
    for targets_P, positions_P in zip(*pieces, strict=True):
        logprobs_PV = logprobs_BTV(logits_TV[positions_P])
        probabilities_PV = logprobs_PV.exp()
        finite_PV = torch.where(probabilities_PV > 0, logprobs_PV, torch.zeros_like(logprobs_PV))
        means_P = (probabilities_PV * finite_PV).sum(-1)
        variances_P = (probabilities_PV * (finite_PV - means_P.unsqueeze(-1)).square()).sum(-1)
        likeliest_P = logprobs_PV.argmax(-1)
        columns = (
            logprobs_PV.gather(-1, targets_P.unsqueeze(-1)).squeeze(-1),
            likeliest_P == targets_P,
            means_P,
            variances_P,
            logprobs_PV.gather(-1, likeliest_P.unsqueeze(-1)).squeeze(-1),
        )
        found += zip(*(each.tolist() for each in columns), strict=True)
    return found


def asks_by_prompt(model: Any) -> bool:
    """Return whether the model is a deletion-ready one, whose prompts choose who answers."""
    return bool(getattr(model, "asks_by_prompt", False))


def score_examples(model: Any, examples: Sequence[Tokens]) -> list[AnswerScore]:
    """Return the scores of examples under a model, in order."""
    found: list[AnswerScore] = []
    for rows in _batches(examples):
        whole = collate(rows).to(model.device)
        batch, columns_K = whole.at_answers()
        with torch.no_grad():  # tensors of inference mode would block gradients later
            if asks_by_prompt(model):
                labels_BT1 = torch.full_like(whole.ids_BT1, NO_LOSS)
                labels_BT1[:, 1:][whole.mask_BT] = whole.targets_BT[whole.mask_BT]
                logits_BTV = model(input_ids=whole.ids_BT1, labels=labels_BT1).logits
                found += answer_scores(logits_BTV[:, columns_K], batch)
            else:
                found += answer_scores(logits_at(model, batch.ids_BT1[:, :-1], columns_K), batch)
    return found


def _batches(examples: Sequence[Tokens]) -> Iterator[list[Tokens]]:
    rows: list[Tokens] = []
    for each in examples:
        longest = max(len(row.input_ids) for row in [*rows, each])
        if rows and longest * (len(rows) + 1) > MAX_POSITIONS:
            yield rows
            rows = []
        rows.append(each)
    if rows:
        yield rows


def gradient_squares(model: Any, examples: Sequence[Tokens]) -> list[list[float]]:
    """Return the squared norms of each answer's gradient, one for each tensor that is trained.

    The loss is the mean over the answer's tokens. All tensors of a frozen model count. No gradient is
    left behind, and none that was accumulated is changed. A tensor that no loss reaches has 0.
    """
    frozen = not any(each.requires_grad for each in model.parameters())
    counted = [each for each in model.parameters() if frozen or each.requires_grad]
    found = []
    try:
        for each in counted:
            each.requires_grad_(True)
        for example in examples:
            loss = -model_logprobs_B(model, collate([example]).to(model.device)).sum()
            gradients = torch.autograd.grad(loss, counted, allow_unused=True)
            squares = (
                each.float().square().sum().item() if each is not None else 0.0 for each in gradients
            )
            found.append(list(squares))
    finally:
        for each in counted:
            each.requires_grad_(not frozen)
    return found
