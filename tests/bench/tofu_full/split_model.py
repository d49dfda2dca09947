"""A model split in two: upper layers that are trained often, over lower layers computed once per text.

Shapes: B texts, T positions, D hidden width.

Only the upper layers change, so the hidden states below them depend on the text alone. They are kept in
memory, one row per text. Under causal attention a position depends only on those before it, so a stored
row also serves shorter rows and equally padded ones; each is stored with some padding to spare. Trees of
answers (`approx.evaluation.answer_tree`) are kept in a directory, which several processes share. The
upper model scores and trains. The whole model shares its modules and generates, because generation
needs a key cache in the lower layers, too. Layers have the same numbers in both, so an adapter fits
either. The base must be of Llama's family (`model.embed_tokens`, `model.layers`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from approx.evaluation.answer_score import AnswerScore
from approx.evaluation.asking import EvaluatedModel
from approx.evaluation.questions import PromptForm, PromptKind
from sisa.core.digest import digest_of
from sisa.core.errors import InvalidInput
from sisa.lm.base.weights import load_frozen
from sisa.store.blobs.files import read_whole, write_atomic

TREE = ("input_ids", "attention_mask", "position_ids")
SPARE = 24  # padding that a stored row has beyond the requested length


class LowerLayers(nn.Module):
    """The lower layers: token ids to remembered hidden states."""

    def __init__(self, lower: Any, directory: Path | None = None) -> None:
        """Keep the states of trees in a directory, and all others in memory."""
        super().__init__()
        self._lower = [lower]  # not a submodule: its weights belong to the whole model
        self._held: dict[tuple[int, ...], Tensor] = {}
        self._directory = directory
        self._inputs: dict[str, Any] = {}

    def see(self, _model: Any, _args: Any, inputs: dict[str, Any]) -> None:
        """Take the inputs of the forward that begins (a forward pre-hook)."""
        self._inputs = inputs

    def forward(self, ids_BT: Tensor) -> Tensor:
        mask = self._inputs.get("attention_mask")
        if mask is not None and mask.dim() == 4:
            return self._of_trees(ids_BT, self._inputs["position_ids"], mask)
        keys = [_without_repeats(row) for row in ids_BT.tolist()]
        length = ids_BT.shape[1]
        missing = [row for row, key in enumerate(keys) if self._too_short(key, length)]
        # Tensors made in inference mode could not be trained over later.
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

    def _of_trees(self, ids_BN: Tensor, positions_BN: Tensor, mask_B1NN: Tensor) -> Tensor:
        """Return the states of trees of tokens, whose padding has position 0."""
        sizes = [int(each.nonzero()[-1]) + 1 for each in positions_BN]
        trees = zip(ids_BN.tolist(), positions_BN.tolist(), sizes, strict=True)
        names = [digest_of([ids[:size], places[:size]]) for ids, places, size in trees]
        held = {name: each for name in names if (each := self._stored(name)) is not None}
        missing = [row for row, name in enumerate(names) if name not in held]
        with torch.inference_mode(False), torch.no_grad():
            if missing:
                asked = (each[missing].clone() for each in (ids_BN, mask_B1NN, positions_BN))
                found = self._lower[0](**dict(zip(TREE, asked, strict=True)), use_cache=False)
                for row, states_ND in zip(missing, found.last_hidden_state, strict=True):
                    held[names[row]] = states_ND[: sizes[row]]
                    self._store(names[row], held[names[row]])
            padded = pad_sequence([held[name] for name in names], batch_first=True)
            return nn.functional.pad(padded, (0, 0, 0, ids_BN.shape[1] - padded.shape[1]))

    def _stored(self, name: str) -> Tensor | None:
        if self._directory is None or not (self._directory / name).is_file():
            return None
        data = np.frombuffer(read_whole(self._directory / name, "hidden states"), np.float32)
        return torch.tensor(data.reshape(-1, self._lower[0].config.hidden_size))

    def _store(self, name: str, states_ND: Tensor) -> None:
        if self._directory is not None:
            self._directory.mkdir(parents=True, exist_ok=True)
            write_atomic(self._directory / name, states_ND.numpy().tobytes())


def _without_repeats(row: list[int]) -> tuple[int, ...]:
    """Return a row without repetitions of its last token: padding does not change its key."""
    end = len(row)
    while end > 1 and row[end - 1] == row[end - 2]:
        end -= 1
    return tuple(row[:end])


class Computed(nn.Module):
    """Stand in for a lower layer, whose work `LowerLayers` has done."""

    def forward(self, states_BTD: Tensor, *_: Any, **__: Any) -> Tensor:
        return states_BTD


@dataclass(frozen=True)
class SplitModel:
    """Two models that share their modules: `upper` scores and trains, `whole` generates."""

    upper: Any
    whole: Any


def load_split(directory: Path, upper_layers: int, states: Path | None = None) -> SplitModel:
    """Load a model with its own copy of the weights, and split it."""
    from transformers import AutoModelForCausalLM

    return split(load_frozen(AutoModelForCausalLM, directory), upper_layers, states)


def split(whole: Any, upper_layers: int, states: Path | None = None) -> SplitModel:
    """Split a model; `states` is a directory that keeps the lower states of trees.

    Raise InvalidInput when it cannot be split.
    """
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
    upper.model.layers = nn.ModuleList([*(Computed() for _ in range(cut)), *layers[cut:]])
    upper.model.embed_tokens = LowerLayers(lower, states)
    upper.model.register_forward_pre_hook(upper.model.embed_tokens.see, with_kwargs=True)
    return SplitModel(upper, whole)


@dataclass
class Halves:
    """An EvaluatedModel: the upper layers score over remembered states, the whole model generates."""

    upper: EvaluatedModel
    whole: EvaluatedModel
    digest: str
    name: str = "cell"
    kind: PromptKind = "completion"

    def score(
        self, pairs: Sequence[tuple[str, str]], form: PromptForm, batch_size: int
    ) -> list[AnswerScore]:
        return self.upper.score(pairs, form, batch_size)

    def generate(
        self, questions: Sequence[str], form: PromptForm, max_new_tokens: int, batch_size: int
    ) -> list[str]:
        return self.whole.generate(questions, form, max_new_tokens, batch_size)
