"""The loss of a micro-batch: cross-entropy summed over the tokens that bear it, and nothing beyond them.

Rules: records lie end to end, without padding (`packed.py`); for a base that can't be run so, in rows
padded on the right, and no attention mask is passed: under causal attention a real token never sees
padding. The decoder runs to its hidden states; those at (row, position) pairs that predict a label are
gathered, and the head is computed on them alone. The head is frozen, so that its gradient is taken with
the loss, in one go, and no logits are kept. Where a model's head does more than one product (logits that
are scaled or capped, a head with an adapter), its own forward is asked for the positions that any row
needs. `loss_form` decides both, by bits of the base.

Not covered: losses on other things than next tokens.

Legend: B rows, T positions, N pairs, H hidden, V words, K positions that any row needs.

    loss = summed_loss(model, batch, form_of(base, longest=512))
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from sisa.lm.base.tokens import NO_LOSS, Tokens
from sisa.lm.train.packed import attending, packs, positions

Batch = Sequence[Tokens]
NUM_PROBE_IDS = 4
PIECE = 256  # pairs; 7% faster than 1,000 at once, and not slower than 128


@dataclass(frozen=True, slots=True)
class Form:
    """How a base is asked for the loss: its head by itself, records without padding."""

    plain_head: bool = True
    packed: bool = True


def loss_form(base: Any, longest: int) -> Form:
    """What a base allows, on records of up to `longest` tokens."""
    return Form(has_plain_head(base), packs(base, longest))


@dataclass(frozen=True, slots=True)
class BatchTensors:
    """A micro-batch as tensors: ids [B, T], their positions [B, T] where records lie end to end, and of
    each pair its row [N], its column [N] and the label that it predicts [N]."""

    ids_BT: Tensor
    positions_BT: Tensor | None
    rows_N: Tensor
    columns_N: Tensor
    labels_N: Tensor

    def to(self, device: torch.device) -> BatchTensors:
        """The same on a device."""
        if device.type == "cpu":
            return self
        moved = {name: getattr(self, name) for name in ("ids_BT", "rows_N", "columns_N", "labels_N")}
        at = None if self.positions_BT is None else self.positions_BT.to(device)
        return replace(self, positions_BT=at, **{name: each.to(device) for name, each in moved.items()})

    def inputs(self) -> dict[str, Any]:
        """What a forward is given."""
        where = {} if self.positions_BT is None else {"position_ids": self.positions_BT}
        return {"input_ids": self.ids_BT, "use_cache": False, **where}


def lay(batch: Batch, *, packed: bool) -> BatchTensors:
    """End to end in one row, or padded on the right to the batch's own longest."""
    lengths = [len(each.input_ids) for each in batch]
    # the label at a position is that of the next token; a record's last position predicts nothing
    told = [(torch.tensor(each.input_ids), torch.tensor([*each.labels[1:], NO_LOSS])) for each in batch]
    if packed:
        ids_BT, next_BT = (torch.cat(each)[None] for each in zip(*told, strict=True))
    else:
        ids_BT = pad_sequence([ids for ids, _ in told], batch_first=True)
        next_BT = pad_sequence([following for _, following in told], True, NO_LOSS)
    rows_N, columns_N = (next_BT != NO_LOSS).nonzero(as_tuple=True)
    at = positions(lengths, ids_BT.device) if packed else None
    return BatchTensors(ids_BT, at, rows_N, columns_N, next_BT[rows_N, columns_N])


def count_labels(batch: Batch) -> int:
    """Tokens of a micro-batch that bear loss."""
    return sum(label != NO_LOSS for each in batch for label in each.labels[1:])


def summed_loss(model: Any, batch: Batch, form: Form) -> Tensor:
    """Cross-entropy summed over a micro-batch's label tokens. `model` is a wrapped base, and its
    configuration the caller's own; `form` is of its base."""
    laid = lay(batch, packed=form.packed).to(model.device)
    base = model.get_base_model()
    with _attending(base, batch, form):
        if not form.plain_head:
            return _by_own_forward(base, laid)
        hidden_BTH = base.get_decoder()(**laid.inputs()).last_hidden_state
    head = base.get_output_embeddings()
    hidden_NH = hidden_BTH[laid.rows_N, laid.columns_N]
    found: Tensor = _HeadLoss.apply(hidden_NH, head.weight, head.bias, laid.labels_N)  # type: ignore[no-untyped-call]
    return found


def _attending(base: Any, batch: Batch, form: Form) -> AbstractContextManager[None]:
    return attending(base, [len(each.input_ids) for each in batch]) if form.packed else nullcontext()


def _by_own_forward(base: Any, laid: BatchTensors) -> Tensor:
    columns_K, at_N = torch.unique(laid.columns_N, return_inverse=True)
    logits_BKV = base(**laid.inputs(), logits_to_keep=columns_K).logits
    return cross_entropy(logits_BKV[laid.rows_N, at_N].float(), laid.labels_N, reduction="sum")


class _HeadLoss(torch.autograd.Function):
    """Hidden states [N, H], the head's weight [V, H] and bias [V] or None, labels [N] -> the summed
    cross-entropy; the hidden states' gradient is computed on the way, piece by piece, so that logits of
    P pairs at a time are in memory."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, labels_N: Tensor
    ) -> Tensor:
        loss, slopes = torch.zeros((), device=hidden_NH.device), []
        pieces = (torch.split(each, PIECE) for each in (hidden_NH, labels_N))
        for hidden_PH, labels_P in zip(*pieces, strict=True):
            labels_P1 = labels_P[:, None]
            logits_PV = torch.nn.functional.linear(hidden_PH, weight_VH, bias_V).float()
            log_probs_PV = torch.log_softmax(logits_PV, 1)
            loss -= log_probs_PV.gather(1, labels_P1).sum()
            if ctx.needs_input_grad[0]:
                slopes_PV = log_probs_PV.exp_()
                slopes_PV.scatter_(1, labels_P1, slopes_PV.gather(1, labels_P1) - 1)
                slopes.append(slopes_PV.to(weight_VH.dtype) @ weight_VH)
        ctx.save_for_backward(torch.cat(slopes) if slopes else hidden_NH)
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (slopes_NH,) = ctx.saved_tensors
        return (slopes_NH * gradients[0]).to(slopes_NH.dtype), None, None, None


@torch.no_grad()
def has_plain_head(base: Any) -> bool:
    """Whether a base's logits are, bit for bit, its head's product with what its decoder gives."""
    decoder, head = base.get_decoder(), base.get_output_embeddings()
    if decoder is None or decoder is base or type(head) is not torch.nn.Linear:
        return False
    ids_BT = torch.arange(NUM_PROBE_IDS, device=base.device)[None]
    own = base(input_ids=ids_BT, use_cache=False).logits
    return torch.equal(own, head(decoder(input_ids=ids_BT, use_cache=False).last_hidden_state))
