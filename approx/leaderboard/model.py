"""A model whose upper layers are trained again and again, over lower ones that are computed once a text.

Shapes: B texts, T positions, D hidden width.

Only the upper layers ever change, so the hidden states below them depend on the text alone; they are
kept in memory, a row each. Under causal attention a position depends on those before it only: what is
held of a row serves shorter and equally padded ones, and a row is held with some padding to spare. The
upper model scores and trains; the whole one, of the same modules, generates (it needs a cache of keys
below, too). Bases must be of Llama's family (`model.embed_tokens`, `model.layers`).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sisa.core.errors import InvalidInput
from sisa.lm.base.base import load_frozen

SPARE = 24  # positions of padding that a held row has beyond what was asked for


class LowerLayers(nn.Module):
    """Token ids to the hidden states below the upper layers, remembered."""

    def __init__(self, lower: Any) -> None:
        super().__init__()
        self._lower = [lower]  # no submodule: its weights belong to the whole model
        self._held: dict[tuple[int, ...], Tensor] = {}

    def forward(self, ids_BT: Tensor) -> Tensor:
        keys = [_without_repeats(row) for row in ids_BT.tolist()]
        length = ids_BT.shape[1]
        missing = [row for row, key in enumerate(keys) if self._too_short(key, length)]
        # What is made in inference mode can't be trained over later.
        with torch.inference_mode(False), torch.no_grad():
            if missing:
                asked_BT = ids_BT[missing].clone()
                padded_BT = torch.cat([asked_BT, asked_BT[:, -1:].expand(-1, SPARE)], dim=1)
                found_BTD = self._lower[0](input_ids=padded_BT, use_cache=False).last_hidden_state
                for row, states_TD in zip(missing, found_BTD, strict=True):
                    self._held[keys[row]] = states_TD.clone()
        return torch.stack([self._held[key][:length] for key in keys])

    def _too_short(self, key: tuple[int, ...], length: int) -> bool:
        held = self._held.get(key)
        return held is None or len(held) < length


def _without_repeats(row: list[int]) -> tuple[int, ...]:
    """A row less the repetitions of its last token: padded or not, the same name."""
    end = len(row)
    while end > 1 and row[end - 1] == row[end - 2]:
        end -= 1
    return tuple(row[:end])


@dataclass(frozen=True)
class SplitModel:
    """`upper` scores and trains over remembered states; `whole` generates. They share all modules."""

    upper: Any
    whole: Any


def load_split(directory: Path, upper_layers: int) -> SplitModel:
    """A model of its own copy of the weights. Raises InvalidInput where it can't be split."""
    from transformers import AutoModelForCausalLM

    whole = load_frozen(AutoModelForCausalLM, directory)
    inner: Any = getattr(whole, "model", None)
    layers = getattr(inner, "layers", None)
    if layers is None or not hasattr(inner, "embed_tokens") or not 0 < upper_layers < len(layers):
        raise InvalidInput(
            "the base can't be split into lower and upper layers",
            where="upper layers",
            expected="a model of Llama's family with more layers than that",
            got=f"{type(whole).__name__}, {upper_layers} upper layers",
            next_step="use another base, or fewer upper layers",
        )
    cut = len(layers) - upper_layers
    shared = {id(each): each for each in (*whole.parameters(), *whole.buffers(), *layers)}
    lower = copy.deepcopy(inner, dict(shared))
    lower.layers = layers[:cut]
    lower.norm = nn.Identity()
    lower.config.num_hidden_layers = cut
    upper = copy.deepcopy(whole, dict(shared))
    upper.model.layers = layers[cut:]
    upper.model.embed_tokens = LowerLayers(lower)
    upper.config.num_hidden_layers = upper_layers
    return SplitModel(upper, whole)
