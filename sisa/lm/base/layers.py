"""Which of a base's layers get adapters: all, or the top ones.

Rules: a base's layers are the first list of modules in its decoder that is as long as its config says.
`top:N` means the N that are nearest to the output. A base that has fewer, or whose layers can't be
found, is refused before anything is trained.

Not covered: modules outside the layers (embeddings, the head), which get no adapters under `top:N`.

    first_adapted({"lora_layers": "top:10"}, base)      # 20 of SmolLM2's 30 layers lie below
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from sisa.core.errors import InvalidInput

ALL_LAYERS = "all"


def layers_of(base: Any) -> tuple[str, Any]:
    """Name and modules of a base's layers. Raises InvalidInput where they can't be told."""
    decoder, count = base.get_decoder(), getattr(base.config, "num_hidden_layers", 0)
    for name, each in base.named_modules():
        inside = decoder is not None and any(each is module for module in decoder.modules())
        if inside and isinstance(each, nn.ModuleList) and len(each) == count:
            return name, each
    raise InvalidInput(
        "the base model's layers can't be told apart",
        where="lora_layers",
        expected="a decoder with a list of layers",
        next_step="use lora_layers: all",
    )


def first_adapted(training: Mapping[str, Any], base: Any) -> int:
    """The lowest layer that gets adapters; 0 under `all`. Raises InvalidInput."""
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
            next_step="mend lora_layers in the run file",
        )
    return num_layers - num_top
