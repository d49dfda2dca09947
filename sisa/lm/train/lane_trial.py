"""A trial of lanes: whether micro-batches have the bits that each has alone, on this base and machine.

`refuse_lanes` compares the losses and gradients of whole micro-batches, alone and together, in each
slot; if they differ, there are no lanes. `RowTest` compares each number of rows, forward and backward,
before it is first used; a micro-batch with a number of rows that fails is computed alone.

    refuse_lanes(wrapped, 512) or compute([one, other])

Legend: N rows, T positions of a record, H hidden, I and O features of a linear map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sisa.core.domain import SliceJob
from sisa.lm.base.tokens import NO_LOSS, Tokens
from sisa.lm.train.frozen_layers import HiddenStateCache
from sisa.lm.train.lanes import LANE_ROWS, MicroBatch, compute
from sisa.lm.train.lora_linear import TrainedLinear
from sisa.lm.train.losses import PIECE, padded_rows
from sisa.lm.train.packing import attending
from sisa.lm.train.trainable import RowTests, Trainable

NUM_TRIED = 3  # lanes of the self-test


def refuse_lanes(wrapped: Trainable, longest: int) -> str | None:
    """Return why micro-batches on a base can't be computed together; None if they can, from now on.

    `longest` is the number of tokens of the longest record. The test takes as long as about ten steps.
    """
    wrapped.row_tests = None
    if not (wrapped.form.packed and wrapped.form.plain_head):
        return "records of this base can't share a row"
    model = wrapped.begin(None, 0).model
    adapted = [each for each in model.modules() if isinstance(each, BaseTunerLayer)]
    if not all(isinstance(each, TrainedLinear) for each in adapted):
        return "an adapted module is not a linear map"
    base = model.get_base_model().eval()
    if _follows_others(base, longest):
        return "positions of this base depend on the longest record beside"
    head = base.get_output_embeddings()
    maps = [each for each in base.modules() if isinstance(each, nn.Linear | Conv1D)]
    frozen = [each for each in maps if each is not head and not each.weight.requires_grad]
    of_layers = RowTest(frozen, LANE_ROWS[base.device.type])
    wrapped.row_tests = RowTests(of_layers, RowTest([head], PIECE))
    tried = [_drawn(wrapped, number, base.config.vocab_size) for number in range(NUM_TRIED)]
    together = padded_rows(sum(each.rows for each in tried))
    if not all(map(of_layers, [*(each.rows for each in tried), together])):
        refusal = "rows of this machine's matrix products depend on how many there are"
    elif _mixes(tried):
        refusal = "losses or gradients depend on what is computed beside them"
    else:
        return None
    wrapped.row_tests = None
    return refusal


@torch.no_grad()
def _follows_others(base: Any, longest: int) -> bool:
    """Return whether a record's states depend on how long the record beside it is."""
    ids_1N = torch.tensor([[0, 1, 2, 3] * 2], device=base.device)
    near_T = torch.arange(4, device=base.device)
    found = []
    for start in (0, max(0, longest - 4)):
        with attending(base, [4, 4]):
            at_1N = torch.cat([near_T, start + near_T])[None]
            found.append(base.get_decoder()(input_ids=ids_1N, position_ids=at_1N, use_cache=False)[0])
    return not torch.equal(*(each_1NH[:, :4] for each_1NH in found))


class RowTest:
    """Test whether a number of rows, in linear maps, keeps the bits that each row has among `most`.

    Each number is tested when it is first asked for: forward and the inputs' gradient, one map of each
    shape, random values.
    """

    def __init__(self, maps: Sequence[Any], most: int) -> None:
        """Compute what is compared with. The maps are torch's linear ones or transformers' Conv1D."""
        shapes = {(each.weight.shape, type(each), each.bias is None): each for each in maps}
        drawn = torch.Generator().manual_seed(1)
        self._most, self._found = most, dict[int, bool]()
        self._maps = []
        for each in shapes.values():
            weight_OI = each.weight.t() if isinstance(each, Conv1D) else each.weight
            inputs = [
                torch.randn(most, size, generator=drawn).to(weight_OI) for size in weight_OI.shape[::-1]
            ]
            self._maps.append((weight_OI, each.bias, inputs, _mapped(weight_OI, each.bias, *inputs)))

    def __call__(self, num: int) -> bool:
        """Return whether `num` rows keep their bits."""
        if num not in self._found:
            self._found[num] = 0 < num <= self._most and self._same(num)
        return self._found[num]

    def _same(self, num: int) -> bool:
        start = 7 * num % (self._most - num + 1)  # anywhere
        rows = slice(start, start + num)
        for weight_OI, bias_O, inputs, whole in self._maps:
            found = _mapped(weight_OI, bias_O, *(each[rows].clone() for each in inputs))
            if not all(torch.equal(ours, all_[rows]) for ours, all_ in zip(found, whole, strict=True)):
                return False
        return True


@torch.no_grad()
def _mapped(weight_OI: Tensor, bias_O: Tensor | None, x_NI: Tensor, g_NO: Tensor) -> list[Tensor]:
    return [torch.nn.functional.linear(x_NI, weight_OI, bias_O), g_NO @ weight_OI]


def _mixes(tried: Sequence[MicroBatch]) -> bool:
    """Return whether a bit depends on the micro-batches beside, or on the slot among them."""
    alone = [found for each in tried for found in _computed([each])]
    for turn in range(len(tried)):
        slots = [(turn + number) % len(tried) for number in range(len(tried))]
        together = _computed([tried[each] for each in slots])
        for slot, found in zip(slots, together, strict=True):
            if not all(map(torch.equal, alone[slot], found)):
                return True
    return False


def _drawn(wrapped: Trainable, number: int, vocab_size: int) -> MicroBatch:
    """Return random records for a random adapter; with dropout, if the base has any."""
    drawn = torch.Generator().manual_seed(number)
    own = wrapped.begin(None, number)
    for each in own.trained.values():
        each.data = torch.randn(each.shape, generator=drawn).mul_(0.05).to(each)
    batch = []
    for length in (17 + 5 * number, 3 + 7 * number)[: 1 + number % 2]:
        ids = torch.randint(vocab_size, (length,), generator=drawn).tolist()
        batch.append(Tokens(ids, [NO_LOSS] * (number + 2) + ids[number + 2 :]))
    job = SliceJob(number, 0, None, (), len(batch), (1, 1), {}, "", "")
    return MicroBatch(job, wrapped, own, HiddenStateCache(memory_bytes=0), batch, 7, seed=number)


def _computed(group: Sequence[MicroBatch]) -> list[list[Tensor]]:
    """Return the loss and the gradients of each micro-batch."""
    parameters = [[*each.own.trained.values()] for each in group]
    for each in (one for some in parameters for one in some):
        each.grad = None
    compute(group)
    return [
        [torch.tensor(each.loss), *(one.grad for one in some if one.grad is not None)]
        for each, some in zip(group, parameters, strict=True)
    ]
