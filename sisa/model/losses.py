"""The loss of a micro-batch: cross-entropy summed over the tokens that bear it, and nothing beyond them.

Rules: rows are padded on the right and no attention mask is passed: under causal attention a real token
never sees padding. The decoder runs to its hidden states; those at (row, position) pairs that predict a
label are gathered, and the head is computed on them alone. The head is frozen, so that its gradient is
taken with the loss, in one go, and no logits are kept. Where a model's head does more than one product
(logits that are scaled or capped, a head with an adapter), its own forward is asked for the positions
that any row needs: `has_plain_head` decides, by the bits of the logits.

Not covered: losses on other things than next tokens.

Legend: B rows, T positions, N pairs, H hidden, V words, K positions that any row needs.

    loss = summed_loss(model, batch, direct=has_plain_head(base))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sisa.model.tokens import NO_LOSS, Tokens

Batch = Sequence[Tokens]
PROBE_IDS = 4


@dataclass(frozen=True, slots=True)
class Padded:
    """A micro-batch as tensors: ids [B, T], and of each pair its row [N], its position [N] and the
    label that it predicts [N]."""

    ids_BT: Tensor
    rows_N: Tensor
    columns_N: Tensor
    labels_N: Tensor

    def to(self, device: torch.device) -> Padded:
        """The same on a device."""
        if device.type == "cpu":
            return self
        parts = (self.ids_BT, self.rows_N, self.columns_N, self.labels_N)
        return Padded(*(each.to(device) for each in parts))


def pad(batch: Batch) -> Padded:
    """Pad on the right to the batch's own longest row."""
    length = max(len(each.input_ids) for each in batch)
    ids_BT = torch.zeros((len(batch), length), dtype=torch.long)
    labels_BT = torch.full((len(batch), length), NO_LOSS, dtype=torch.long)
    for row, each in enumerate(batch):
        ids_BT[row, : len(each.input_ids)] = torch.tensor(each.input_ids)
        labels_BT[row, : len(each.labels)] = torch.tensor(each.labels)
    next_BT = labels_BT[:, 1:]
    rows_N, columns_N = (next_BT != NO_LOSS).nonzero(as_tuple=True)
    return Padded(ids_BT, rows_N, columns_N, next_BT[rows_N, columns_N])


def count_labels(batch: Batch) -> int:
    """Tokens of a micro-batch that bear loss."""
    return sum(label != NO_LOSS for each in batch for label in each.labels[1:])


def summed_loss(model: Any, batch: Batch, *, direct: bool) -> Tensor:
    """Cross-entropy summed over a micro-batch's label tokens. `model` is a wrapped base; `direct`:
    whether its base has a plain head."""
    padded = pad(batch).to(model.device)
    if not direct:
        return _by_own_forward(model, padded)
    base = model.get_base_model()
    hidden_BTH = base.get_decoder()(input_ids=padded.ids_BT, use_cache=False).last_hidden_state
    head = base.get_output_embeddings()
    hidden_NH = hidden_BTH[padded.rows_N, padded.columns_N]
    found: Tensor = _HeadLoss.apply(hidden_NH, head.weight, head.bias, padded.labels_N)  # type: ignore[no-untyped-call]
    return found


def _by_own_forward(model: Any, padded: Padded) -> Tensor:
    columns_K, at_N = torch.unique(padded.columns_N, return_inverse=True)
    logits_BKV = model(input_ids=padded.ids_BT, logits_to_keep=columns_K, use_cache=False).logits
    return cross_entropy(logits_BKV[padded.rows_N, at_N].float(), padded.labels_N, reduction="sum")


class _HeadLoss(torch.autograd.Function):
    """Hidden states [N, H], the head's weight [V, H] and bias [V] or None, labels [N] -> the summed
    cross-entropy; the hidden states' gradient is computed on the way."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, labels_N: Tensor
    ) -> Tensor:
        logits_NV = torch.nn.functional.linear(hidden_NH, weight_VH, bias_V).float()
        labels_N1 = labels_N[:, None]
        log_probs_NV = torch.log_softmax(logits_NV, 1)
        loss = -log_probs_NV.gather(1, labels_N1).sum()
        if ctx.needs_input_grad[0]:
            slopes_NV = log_probs_NV.exp_()
            slopes_NV.scatter_(1, labels_N1, slopes_NV.gather(1, labels_N1) - 1)
            ctx.save_for_backward(slopes_NV.to(weight_VH.dtype) @ weight_VH)
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
    ids_BT = torch.arange(PROBE_IDS, device=base.device)[None]
    own = base(input_ids=ids_BT, use_cache=False).logits
    return torch.equal(own, head(decoder(input_ids=ids_BT, use_cache=False).last_hidden_state))
