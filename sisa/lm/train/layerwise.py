"""Layers slice by slice: the stage at place i of an order trains the i-th block of layers, top down.

    num_blocks   that of slices; blocks are runs of neighbouring layers, as equal as can be
    block 0      the layers nearest to the output, trained by the first stage of whatever order

Rules: earlier blocks' adapters are in the forward as they were trained, and frozen, to the byte; those
of later blocks have their first weights, whose product is zero (LoRA's B is), so that they change
nothing. A stage's file holds all of them, in the usual form: whoever serves or exports it need not know
of blocks. What a later stage adds is its own block alone: taking the last slice out costs its block and
nothing else, and that is the checkpoint before. Layers are those with adapters; an adapter outside of
layers goes with the top.

Not covered: appended slices, for which no layers are left (`ingest.py` refuses them).

>>> [block_of([0, 1, 2, 3, 4], 2, place) for place in (0, 1)]
[(3, 4), (0, 1, 2)]

Source: S3T, Chowdhury et al., ICLR 2025 (arXiv 2406.16257), section 3. The code published with it
sets the earlier blocks to zero while a later one is trained; here they stay, as the paper describes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sisa.core.errors import InvalidInput
from sisa.planning.plan import LAYERWISE

_NUMBER = re.compile(r"\.(\d+)\.")  # the first number in a module's name is its layer's


def block_of(layers: Sequence[int], num_blocks: int, place: int) -> tuple[int, ...]:
    """The layers that the stage at a place trains; there are at least as many layers as blocks."""
    highest_first = sorted(layers, reverse=True)
    start, end = (n * len(highest_first) // num_blocks for n in (place, place + 1))
    return tuple(reversed(highest_first[start:end]))


def train_block(model: Any, num_blocks: int, place: int) -> None:
    """Freeze the adapters of a wrapped base but for those of one block. Raises InvalidInput for fewer
    layers than blocks, or a place beyond the last."""
    adapters = {name: each for name, each in model.named_parameters() if each.requires_grad}
    numbers = {name: _layer(name) for name in adapters}
    layers = sorted({each for each in numbers.values() if each is not None})
    _refuse(len(layers), num_blocks)
    if place >= num_blocks:
        raise InvalidInput(
            "there is no block of layers left for this slice",
            where="sisa.layerwise",
            expected=f"at most {num_blocks} slices",
            got=f"stage {place + 1} of a chain",
            next_step="train without sisa.layerwise",
        )
    block = block_of(layers, num_blocks, place)
    for name, each in adapters.items():
        number = numbers[name]
        each.requires_grad_((layers[-1] if number is None else number) in block)


def check_enough_layers(base: Any, training: Mapping[str, Any]) -> None:
    """Raises InvalidInput for a base with fewer layers to adapt than there are slices."""
    wanted = training["lora_target_modules"]
    names = (
        name
        for name, each in base.named_modules()
        if isinstance(each, torch.nn.Linear) or type(each).__name__ == "Conv1D"
    )
    targets = (n for n in names if wanted == "all-linear" or n.rpartition(".")[2] in wanted)
    layers = {_layer(name) for name in targets} - {None}
    top = str(training.get("lora_layers", "all")).removeprefix("top:")
    _refuse(min(len(layers), int(top)) if top.isdigit() else len(layers), training[LAYERWISE])


def _layer(name: str) -> int | None:
    found = _NUMBER.search(name)
    return int(found[1]) if found else None


def _refuse(num_layers: int, num_blocks: int) -> None:
    if num_layers < num_blocks:
        raise InvalidInput(
            "the base has fewer layers with adapters than there are slices to train them",
            where="sisa.layerwise",
            expected=f"at least {num_blocks} layers, a block for each slice",
            got=f"{num_layers}",
            next_step="lower sisa.slices, adapt more layers, or leave sisa.layerwise out",
        )
