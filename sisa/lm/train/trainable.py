"""A base with the adapter to train: a pattern from which each stage gets modules of its own.

Wrapping a base and finding out how it can be run costs as much as some training steps, and nearly all
stages of a process wrap it alike. So the pattern is kept but never run: a stage trains a copy that
shares only the frozen tensors. What a stage leaves behind disappears with its copy: the memory layout of
trained tensors, rotary frequencies that grew with a long text, running statistics, gradients. So no bit
of a stage depends on what the process trained before.

    wrapped = Trainable(base, training)
    own = wrapped.begin(parent_tensors, init_seed=7)
    own.model, own.trained                                  # modules; name -> parameter
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch

from sisa.core.digest import sha256_hex
from sisa.lm.base.adapter import (
    DEFAULT_NAME,
    attach,
    config_bytes,
    fill_adapter,
    first_adapted,
    lora_config,
    train_block,
)
from sisa.lm.base.base_checks import kept_check
from sisa.lm.base.weights import own_modules
from sisa.lm.train.frozen_layers import FrozenLayers
from sisa.lm.train.lora_linear import TrainedLinear, trained_linears, use_fused_linear
from sisa.lm.train.losses import Form, KeepsBits, loss_form


class RowTests(NamedTuple):
    """Whether the linear maps of the layers, and the head, keep the bits of so many rows."""

    layers: KeepsBits
    head: KeepsBits


@dataclass(frozen=True)
class StageModel:
    """A copy of a wrapped base for one stage: its modules, frozen layers and trained parameters."""

    model: Any
    frozen: FrozenLayers | None  # below the lowest adapted one, if there are any
    trained: Mapping[str, torch.nn.Parameter]

    @cached_property
    def linears(self) -> list[TrainedLinear]:
        return trained_linears(self.model)


class Trainable:
    """A wrapped base, ready for training. The base's modules must be the caller's own."""

    def __init__(self, base: Any, training: Mapping[str, Any], known: Sequence[str] = ()) -> None:
        """Wrap a base. Raise InvalidInput if it lacks modules or layers, or they can't be run apart.

        The outcomes of checks are kept under `known`: the base's name and the fingerprint.
        """
        self.dtype, self.first = base.dtype, first_adapted(training, base)
        config, longest = lora_config(training, base), training["sequence_len"]
        of = (*known, sha256_hex(config_bytes(config)), str(longest)) if known else ()
        self._pattern = attach(base, config, None, init_seed=0)
        use_fused_linear(self._pattern)
        self._pattern.eval()
        self.form = Form(*kept_check("form", of, lambda: self._check(longest)))
        self.row_tests: RowTests | None = None  # None: no lanes

    def _check(self, longest: int) -> tuple[bool, bool]:
        """Return the base's form. Raise InvalidInput if its layers can't be run apart."""
        probed = own_modules(self._pattern).get_base_model()
        form = loss_form(probed, longest)
        if self.first:
            FrozenLayers(probed, self.first).check(longest)
        return form.plain_head, form.packed

    def begin(
        self,
        tensors: Mapping[str, torch.Tensor] | None,
        init_seed: int,
        block: tuple[int, int] | None = None,
    ) -> StageModel:
        """Return a copy whose adapter has the values of `tensors`, or drawn from the seed.

        `block` is (number of blocks of layers, block to train); the other blocks are frozen. Raise
        IntegrityError unless the tensors are exactly the adapter's.
        """
        model = own_modules(self._pattern).train()
        frozen = FrozenLayers(model.get_base_model(), self.first) if self.first else None
        fill_adapter(model, tensors, init_seed)
        if block is not None:
            train_block(model, *block)
        trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
        return StageModel(model, frozen, trained)


def file_name(parameter: str) -> str:
    """Return a parameter's name in the adapter's file, which leaves the adapter's own name out."""
    return parameter.replace(f".{DEFAULT_NAME}.", ".")
