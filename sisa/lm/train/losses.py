"""The loss of a micro-batch: cross-entropy summed over its label tokens, and nothing else.

Records are packed into one row without padding (`packing.py`). For a base that can't be run so, they are
in rows padded on the right, without an attention mask: under causal attention a real token never sees
padding. The head is computed on the hidden states that predict a label alone. It is frozen, so its
gradient is computed together with the loss and no logits are kept. If a model's head does more than one
product (scaled or capped logits, a head with an adapter), the model's own forward computes the logits at
the positions that any row needs. `loss_form` decides both by comparing bits of the base.

    (loss,) = summed_losses(model, [batch], loss_form(base, longest=512))

Legend: B rows, T positions, N label pairs, P pairs of a piece, H hidden, V words, K positions that any
row needs, M pairs of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from sisa.lm.base.tokens import NO_LOSS, Tokens
from sisa.lm.train.packing import attending, packs, positions

Batch = Sequence[Tokens]
KeepsBits = Callable[[int], bool]  # whether so many rows have the bits that each has among others
PIECE = 256  # pairs at once: 7% faster than 1,000, and no slower than 128
QUANTUM = 32  # rows of several micro-batches are padded to a multiple of it, so few numbers occur


@dataclass(frozen=True, slots=True)
class Form:
    """How a base computes the loss: with its head alone, and on records without padding."""

    plain_head: bool = True
    packed: bool = True


def loss_form(base: Any, longest: int) -> Form:
    """Return the form that a base allows for records of up to `longest` tokens."""
    return Form(has_plain_head(base), packs(base, longest))


def lay(
    batch: Batch, device: torch.device, *, packed: bool
) -> tuple[dict[str, Any], Tensor, Tensor, Tensor]:
    """Lay a batch out end to end in one row, or padded on the right to its longest record.

    Return a forward's inputs, and each pair's row, column and label, [N].
    """
    # the label at a position is that of the next token; a record's last position predicts nothing
    pairs = [(torch.tensor(each.input_ids), torch.tensor([*each.labels[1:], NO_LOSS])) for each in batch]
    if packed:
        ids_BT, next_BT = (torch.cat(each)[None] for each in zip(*pairs, strict=True))
    else:
        ids_BT = pad_sequence([ids for ids, _ in pairs], batch_first=True)
        next_BT = pad_sequence([following for _, following in pairs], True, NO_LOSS)
    rows_N, columns_N = (next_BT != NO_LOSS).nonzero(as_tuple=True)
    labels_N = next_BT[rows_N, columns_N].to(device)
    inputs: dict[str, Any] = {"input_ids": ids_BT.to(device), "use_cache": False}
    if packed:
        inputs["position_ids"] = positions([len(each.input_ids) for each in batch], device)
    return inputs, rows_N.to(device), columns_N.to(device), labels_N


def count_labels(batch: Batch) -> int:
    """Return the number of tokens of a micro-batch that bear loss."""
    return sum(each.num_labels for each in batch)


def summed_losses(
    model: Any, batches: Sequence[Batch], form: Form, keeps_bits: KeepsBits | None = None
) -> tuple[Tensor, ...]:
    """Return the cross-entropy summed over the label tokens of each micro-batch.

    `model` is a wrapped base with a configuration of the caller's own. Several micro-batches need a
    plain head and a packed row; their heads are computed together where that `keeps_bits`.
    """
    batch = [each for some in batches for each in some]
    inputs, rows_N, columns_N, labels_N = lay(batch, model.device, packed=form.packed)
    base = model.get_base_model()
    lengths = [len(each.input_ids) for each in batch]
    with attending(base, lengths) if form.packed else nullcontext():
        if not form.plain_head:
            columns_K, at_N = torch.unique(columns_N, return_inverse=True)
            logits_BKV = base(**inputs, logits_to_keep=columns_K).logits
            return (cross_entropy(logits_BKV[rows_N, at_N].float(), labels_N, reduction="sum"),)
        hidden_BTH = base.get_decoder()(**inputs).last_hidden_state
    hidden_NH, head = hidden_BTH[rows_N, columns_N], base.get_output_embeddings()
    sizes = [count_labels(each) for each in batches]
    found: tuple[Tensor, ...] = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        hidden_NH, head.weight, head.bias, labels_N, sizes, keeps_bits or (lambda _: False)
    )
    return found


class _HeadLoss(torch.autograd.Function):
    """Hidden states [N, H], head weight [V, H], bias [V] or None, labels [N] -> summed cross-entropies.

    `sizes` are the numbers of pairs of the micro-batches, which lie end to end and have a loss each. The
    forward also computes the hidden states' gradient, group by group, so that only the logits of P pairs
    are in memory at a time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        labels_N: Tensor,
        sizes: list[int],
        keeps_bits: KeepsBits,
    ) -> tuple[Tensor, ...]:
        sums: dict[_Piece, Tensor] = {}
        slopes_NH = torch.empty_like(hidden_NH)
        pieces = _pieces(sizes)
        for numbers in grouped([each.size for each in pieces], PIECE, keeps_bits):
            group = [pieces[at] for at in numbers]
            parts = [each.size for each in group]
            hidden_PH = torch.cat([hidden_NH[each.pairs] for each in group])
            labels_P = torch.cat([labels_N[each.pairs] for each in group])
            if len(group) > 1:
                spare = padded_rows(len(hidden_PH)) - len(hidden_PH)
                hidden_PH = torch.nn.functional.pad(hidden_PH, (0, 0, 0, spare))
                labels_P = torch.nn.functional.pad(labels_P, (0, spare))
                parts.append(spare)
            labels_P1 = labels_P[:, None]
            logits_PV = torch.nn.functional.linear(hidden_PH, weight_VH, bias_V).float()
            log_probs_PV = torch.log_softmax(logits_PV, 1)
            losses = torch.split(log_probs_PV.gather(1, labels_P1), parts)
            sums |= {each: own.sum() for each, own in zip(group, losses, strict=False)}
            if ctx.needs_input_grad[0]:
                slopes_PV = log_probs_PV.exp_()
                slopes_PV.scatter_(1, labels_P1, slopes_PV.gather(1, labels_P1) - 1)
                slopes_PH = torch.split(slopes_PV.to(weight_VH.dtype) @ weight_VH, parts)
                for each, own in zip(group, slopes_PH, strict=False):
                    slopes_NH[each.pairs] = own
        ctx.save_for_backward(slopes_NH)
        ctx.sizes = sizes
        found = [torch.zeros((), device=hidden_NH.device) for _ in sizes]
        for each in pieces:
            found[each.number] -= sums[each]
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (slopes_NH,) = ctx.saved_tensors
        parts = zip(torch.split(slopes_NH, ctx.sizes), gradients, strict=True)
        found = torch.cat([slopes_MH * each for slopes_MH, each in parts])
        return found.to(slopes_NH.dtype), None, None, None, None, None


class _Piece(NamedTuple):
    """Some pairs of a micro-batch: its number, the first pair, and the one after the last."""

    number: int
    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start

    @property
    def pairs(self) -> slice:
        return slice(self.start, self.end)


def _pieces(sizes: Sequence[int]) -> list[_Piece]:
    """Cut the pairs of each micro-batch into pieces.

    >>> [tuple(each) for each in _pieces([2, 300])]
    [(0, 0, 2), (1, 2, 258), (1, 258, 302)]
    """
    found, end = [], 0
    for number, size in enumerate(sizes):
        start, end = end, end + size
        found += [_Piece(number, at, min(at + PIECE, end)) for at in range(start, end, PIECE)]
    return found


def padded_rows(num_rows: int) -> int:
    """Return a number of rows, padded up to a multiple of QUANTUM."""
    return -(-num_rows // QUANTUM) * QUANTUM


def grouped(sizes: Sequence[int], most: int, keeps_bits: KeepsBits) -> list[list[int]]:
    """Return the positions of those sizes that are computed together, up to `most` rows in all.

    >>> grouped([30, 5, 20, 250], 256, lambda num: num >= 16)
    [[0, 2], [3], [1]]
    """
    groups: list[list[int]] = []
    apart = [number for number, size in enumerate(sizes) if not keeps_bits(size)]
    for number in (each for each in range(len(sizes)) if each not in apart):
        if not groups or padded_rows(sum(sizes[each] for each in (*groups[-1], number))) > most:
            groups.append([])
        groups[-1].append(number)
    found = []
    for group in groups:
        together = len(group) == 1 or keeps_bits(padded_rows(sum(sizes[each] for each in group)))
        found += [group] if together else [[each] for each in group]
    return found + [[each] for each in apart]


@torch.no_grad()
def has_plain_head(base: Any) -> bool:
    """Return whether a base's logits are, bit for bit, its head's product with its hidden states."""
    decoder, head = base.get_decoder(), base.get_output_embeddings()
    if decoder is None or decoder is base or type(head) is not torch.nn.Linear:
        return False
    ids_BT = torch.arange(4, device=base.device)[None]
    own = base(input_ids=ids_BT, use_cache=False).logits
    return torch.equal(own, head(decoder(input_ids=ids_BT, use_cache=False).last_hidden_state))
