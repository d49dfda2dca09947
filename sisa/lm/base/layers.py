"""A base's layers: which of them get adapters, and which of those each stage trains.

The layers are the first list of modules in the base's decoder that is as long as its config says.
`lora_layers: top:N` adapts the N layers nearest to the output. Modules outside the layers (embeddings,
the head) get adapters only under `all`.

Under `layerwise`, stage i of an order trains block i of the layers, from the top down. Blocks are runs
of neighbouring layers, as equal in length as possible; block 0 is nearest to the output, and an adapter
outside the layers belongs to it. The adapters of earlier blocks take part in the forward as they were
trained, and are frozen to the byte. Those of later blocks have their initial weights, whose product is
zero (LoRA's B is), so they change nothing. A checkpoint holds the adapters of all blocks in the usual
form; serving and export need not know about blocks. A later stage adds its own block alone, so removing
the last slice means going back to the checkpoint before. A layerwise model has no layers left for
appended slices.

>>> [block_of([0, 1, 2, 3, 4], 2, place) for place in (0, 1)]
[(3, 4), (0, 1, 2)]

Source: S3T, Chowdhury et al., ICLR 2025 (arXiv 2406.16257), section 3. The code published with it sets
earlier blocks to zero while a later one is trained; here they stay, as the paper describes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from sisa.core.errors import InvalidInput
from sisa.planning.plan import LAYERWISE

ALL_LAYERS = "all"
_NUMBER = re.compile(r"\.(\d+)\.")  # the first number in a module's name is that of its layer


def layers_of(base: Any) -> tuple[str, Any]:
    """Return the name and the modules of a base's layers. Raises InvalidInput if they can't be found."""
    decoder, count = base.get_decoder(), getattr(base.config, "num_hidden_layers", 0)
    for name, each in base.named_modules():
        inside = decoder is not None and any(each is module for module in decoder.modules())
        if inside and isinstance(each, nn.ModuleList) and len(each) == count:
            return name, each
    raise InvalidInput(
        "the base model's layers can't be found",
        where="lora_layers",
        expected="a decoder with a list of layers",
        next_step="use lora_layers: all",
    )


def first_adapted(training: Mapping[str, Any], base: Any) -> int:
    """Return the number of the lowest adapted layer: 0 under `all`, 20 for the top 10 of 30.

    Raises InvalidInput if the base has fewer layers than `top:N` names.
    """
    wanted = training.get("lora_layers", ALL_LAYERS)
    if wanted == ALL_LAYERS:
        return 0
    num_top, num_layers = int(wanted.removeprefix("top:")), len(layers_of(base)[1])
    if num_top > num_layers:
        raise InvalidInput(
            "the base model has fewer layers",
            where="lora_layers",
            expected=f"all, or at most top:{num_layers}",
            got=wanted,
            next_step="correct lora_layers in the run file",
        )
    return num_layers - num_top


def linear_names(base: Any) -> list[str]:
    """Return the names of a base's linear modules, transposed ones last."""
    named = list(base.named_modules())
    names = [name for name, each in named if isinstance(each, nn.Linear)]
    return names + [name for name, each in named if is_transposed(each)]


def is_transposed(module: Any) -> bool:
    """Return whether a module is a linear one that holds its weight transposed, as GPT-2's do."""
    return type(module).__name__ == "Conv1D"


def is_target(name: str, target: str) -> bool:
    """Return whether a module's name is one that an entry of `lora_target_modules` means.

    >>> is_target("model.layers.0.self_attn.q_proj", "q_proj"), is_target("model.xq_proj", "q_proj")
    (True, False)
    """
    return name == target or name.endswith(f".{target}")


def block_of(layers: Sequence[int], num_blocks: int, place: int) -> tuple[int, ...]:
    """Return the layers that stage `place` trains; there must be at least `num_blocks` layers."""
    highest_first = sorted(layers, reverse=True)
    start, end = (n * len(highest_first) // num_blocks for n in (place, place + 1))
    return tuple(reversed(highest_first[start:end]))


def train_block(model: Any, num_blocks: int, place: int) -> None:
    """Freeze a wrapped base's adapters except those of block `place`.

    Raises InvalidInput if there are fewer layers than blocks, or no block `place`.
    """
    adapters = {name: each for name, each in model.named_parameters() if each.requires_grad}
    numbers = {name: _layer(name) for name in adapters}
    layers = sorted({each for each in numbers.values() if each is not None})
    _check_blocks(len(layers), num_blocks)
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
    """Raise InvalidInput if a base has fewer layers to adapt than there are slices."""
    wanted, names = training["lora_target_modules"], linear_names(base)
    if wanted != "all-linear":
        names = [name for name in names if any(is_target(name, each) for each in wanted)]
    layers = {_layer(name) for name in names} - {None}
    top = str(training.get("lora_layers", ALL_LAYERS)).removeprefix("top:")
    _check_blocks(min(len(layers), int(top)) if top.isdigit() else len(layers), training[LAYERWISE])


def _layer(name: str) -> int | None:
    found = _NUMBER.search(name)
    return int(found[1]) if found else None


def _check_blocks(num_layers: int, num_blocks: int) -> None:
    if num_layers < num_blocks:
        raise InvalidInput(
            "the base has fewer adapted layers than there are slices to train them",
            where="sisa.layerwise",
            expected=f"at least {num_blocks} layers, a block for each slice",
            got=f"{num_layers}",
            next_step="lower sisa.slices, adapt more layers, or remove sisa.layerwise",
        )
