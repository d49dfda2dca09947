"""A base with the adapter to train: a pattern from which each stage gets modules of its own.

Wrapping a base and finding out how it can be run costs as much as some training steps, and nearly all
stages of a process wrap it alike. So the pattern is kept but never run: a stage trains a copy that
shares only the frozen tensors. Whatever a stage leaves behind (the memory layout of trained tensors,
rotary frequencies that grew with a long text, running statistics, gradients) disappears with its copy,
so no bit of a stage depends on what the process trained before.

    wrapped = Trainable(base, training)
    trained = wrapped.begin(parent_tensors, init_seed=7)    # name -> parameter

Source: LoRA, Hu et al. 2022.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sisa.core.digest import canonical_json
from sisa.lm.base.adapter import DEFAULT_NAME, attach, check_tensors, draw, lora_config
from sisa.lm.base.layers import first_adapted, train_block
from sisa.lm.base.weights import own_modules
from sisa.lm.train.frozen_prefix import FrozenLayers
from sisa.lm.train.losses import Form, loss_form
from sisa.lm.train.trained_linear import use_fused_linear

KEYS = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_layers", "sequence_len")


def pattern_key(training: Mapping[str, Any]) -> bytes:
    """Return the key of a pattern: stages with equal keys share it."""
    return canonical_json({name: training.get(name) for name in KEYS})


class Trainable:
    """A wrapped base, ready for training. The base's modules must be the caller's own."""

    def __init__(self, base: Any, training: Mapping[str, Any], form: Form | None = None) -> None:
        """`form` is the base's `loss_form`, if known.

        Raises InvalidInput for modules or layers that the base does not have, and for layers that can't
        be run apart.
        """
        self.dtype, self.first = base.dtype, first_adapted(training, base)
        self._pattern = attach(base, lora_config(training, base), None, init_seed=0)
        use_fused_linear(self._pattern)
        self._pattern.eval()
        probed = own_modules(self._pattern).get_base_model()
        self.form = form or loss_form(probed, training["sequence_len"])
        if self.first:
            FrozenLayers(probed, self.first).check(training["sequence_len"])
        self.model: Any = None
        self.lower: FrozenLayers | None = None
        self._parameters: dict[str, torch.nn.Parameter] = {}

    def begin(
        self,
        tensors: Mapping[str, torch.Tensor] | None,
        init_seed: int,
        block: tuple[int, int] | None = None,
    ) -> dict[str, torch.nn.Parameter]:
        """Return the parameters to train, by name, with the values of `tensors` or drawn from the seed.

        They belong to a new copy, which replaces `model` and `lower`. `block` is (number of blocks of
        layers, block to train); the other blocks are frozen. Raises IntegrityError unless the tensors
        are exactly the adapter's.
        """
        self.model = self.lower = None  # one copy at a time is in memory
        self._parameters = {}
        self.model = own_modules(self._pattern).train()
        if self.first:
            self.lower = FrozenLayers(self.model.get_base_model(), self.first)
        named = self.model.named_parameters()
        self._parameters = {name: each for name, each in named if each.requires_grad}
        if tensors is None:
            draw(self.model, init_seed)
        else:
            self._put(tensors)
        if block is not None:
            train_block(self.model, *block)
        return {name: each for name, each in self._parameters.items() if each.requires_grad}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the adapter's tensors under the names that peft reads."""
        return {file_name(name): each.data for name, each in self._parameters.items()}

    def _put(self, tensors: Mapping[str, torch.Tensor]) -> None:
        own = self.tensors()
        check_tensors(own, tensors)
        for name, each in own.items():
            each.copy_(tensors[name])


def file_name(parameter: str) -> str:
    """Return a parameter's name in the adapter's file, which leaves the adapter's own name out.

    >>> file_name("base_model.model.q_proj.lora_A.default.weight")
    'base_model.model.q_proj.lora_A.weight'
    """
    return parameter.replace(f".{DEFAULT_NAME}.", ".")
