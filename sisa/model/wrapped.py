"""A base with the adapter that is trained on it, kept from stage to stage.

Rules: to wrap a base costs as much as some steps of training, and nearly all stages of a process wrap
the same. `begin` gives each tensor of the adapter its value, the parent's or a freshly drawn one, so
that nothing of an earlier stage, ended or broken off, is left. Which of them are trained is said anew,
too.

Not covered: optimizer and schedule (`stage.py`); how the base came here.

    wrapped = Wrapped(base, training)
    trained = wrapped.begin(parent_tensors, init_seed=7)    # name -> parameter

Source: LoRA, Hu et al. 2022.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sisa.digest import canonical_json
from sisa.model.adapter import DEFAULT_NAME, attach, draw, lora_config, refuse_other_tensors
from sisa.model.layers import first_adapted
from sisa.model.layerwise import train_block
from sisa.model.losses import Form, form_of
from sisa.model.prefix import Lower
from sisa.model.trained_linear import quicken

KEYS = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_layers", "sequence_len")


def kind_of(training: Mapping[str, Any]) -> bytes:
    """What one wrapping has in common with another: stages of one kind share it."""
    return canonical_json({name: training.get(name) for name in KEYS})


class Wrapped:
    """A wrapped base, ready to be trained. The base's modules must be the caller's own."""

    def __init__(self, base: Any, training: Mapping[str, Any], form: Form | None = None) -> None:
        """`form` is of the base, where it is known.

        Raises InvalidInput: modules or layers that the base does not have, or layers that can't be run
        apart.
        """
        self.dtype = base.dtype
        self.form = form or form_of(base, training["sequence_len"])
        self.model = attach(base, lora_config(training, base), None, init_seed=0)
        self.model.eval()
        self.first = first_adapted(training, base)
        self.lower = Lower(self.model.get_base_model(), self.first) if self.first else None
        if self.lower is not None:
            self.lower.check()
        quicken(self.model)
        named = self.model.named_parameters()
        self._parameters = {name: each for name, each in named if each.requires_grad}

    def begin(
        self,
        tensors: Mapping[str, torch.Tensor] | None,
        init_seed: int,
        block: tuple[int, int] | None = None,
    ) -> dict[str, torch.nn.Parameter]:
        """The parameters to train, by name, with the values of `tensors`, or drawn from the seed.
        `block`: of so many blocks of layers, this one alone.

        Raises IntegrityError when the tensors are not exactly the adapter's.
        """
        self.model.train()
        for each in self._parameters.values():
            each.requires_grad_(True)
            each.grad = None
        if tensors is None:
            draw(self.model, init_seed)
        else:
            self._put(tensors)
        if block is not None:
            train_block(self.model, *block)
        return {name: each for name, each in self._parameters.items() if each.requires_grad}

    def tensors(self) -> dict[str, torch.Tensor]:
        """The adapter's tensors under the names that peft reads."""
        return {file_name(name): each.data for name, each in self._parameters.items()}

    def _put(self, tensors: Mapping[str, torch.Tensor]) -> None:
        own = self.tensors()
        refuse_other_tensors(own, tensors)
        for name, each in own.items():
            each.copy_(tensors[name])


def file_name(parameter: str) -> str:
    """A parameter's name in the adapter's file: without that of the adapter.

    >>> file_name("base_model.model.q_proj.lora_A.default.weight")
    'base_model.model.q_proj.lora_A.weight'
    """
    return parameter.replace(f".{DEFAULT_NAME}.", ".")
