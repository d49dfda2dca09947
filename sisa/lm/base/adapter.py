"""LoRA adapters on a base: which layers get them, and their bytes as peft reads them.

An adapter's initial weights depend on one seed alone, not on what the process drew earlier nor on the
base's device. `adapter_config.json` is canonical JSON without paths. safetensors writes the tensors with
one metadata key, so the same tensors give the same bytes. Adapters other than LoRA, and adapters on
embeddings, are not supported.

    files = adapter_files(attach(base, lora_config(training, base), tensors=None, init_seed=7))

A base's layers are the first list of modules in the base's decoder that is as long as its config says.
`lora_layers: top:N` adapts the N layers nearest to the output. Modules outside the layers get adapters
only under `all`.

Under `layerwise`, stage i of an order trains block i of the layers, from the top down. Blocks are runs
of neighbouring layers, as equal in length as possible; block 0 is nearest to the output, and an adapter
outside the layers belongs to it. The adapters of earlier blocks take part in the forward as they were
trained, and are frozen to the byte. Those of later blocks have their initial weights, whose product is
zero (LoRA's B is). A checkpoint holds the adapters of all blocks. A later stage adds its own block
alone, so removing the last slice means going back to the checkpoint before. A layerwise model has no
layers left for appended slices.

Source: S3T, Chowdhury et al., ICLR 2025 (arXiv 2406.16257), section 3. The code published with it sets
earlier blocks to zero while a later one is trained; here they stay, as the paper describes.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from torch import nn
from transformers.pytorch_utils import Conv1D

from sisa.core.checkpoint_files import ADAPTER_FILE, CONFIG_FILE
from sisa.core.digest import canonical_json
from sisa.core.errors import IntegrityError, InvalidInput
from sisa.lm.base.low_rank import damaged, read_settings, tensor_bytes

ALL_LAYERS = "all"
DEFAULT_NAME = "default"
_NUMBER = re.compile(r"\.(\d+)\.")  # the first number in a module's name is that of its layer


def layers_of(base: Any) -> tuple[str, Any]:
    """Return the name and the modules of a base's layers. Raise InvalidInput if they can't be found."""
    decoder, count = base.get_decoder(), getattr(base.config, "num_hidden_layers", 0)
    inside = set() if decoder is None else set(decoder.modules())
    for name, each in base.named_modules():
        if each in inside and isinstance(each, nn.ModuleList) and len(each) == count:
            return name, each
    raise InvalidInput(
        "the base model's layers can't be found",
        where="lora_layers",
        expected="a decoder with a list of layers",
        next_step="use lora_layers: all",
    )


def first_adapted(training: Mapping[str, Any], base: Any) -> int:
    """Return the number of the lowest adapted layer: 0 under `all`, 20 for the top 10 of 30.

    Raise InvalidInput if the base has fewer layers than `top:N` names.
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


def train_block(model: Any, num_blocks: int, place: int) -> None:
    """Freeze a wrapped base's adapters except those of block `place`.

    Raise InvalidInput if there are fewer layers than blocks, or no block `place`.
    """
    adapters = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    numbers = [int(found[1]) if (found := _NUMBER.search(name)) else None for name, _ in adapters]
    layers = sorted({each for each in numbers if each is not None}, reverse=True)
    if len(layers) < num_blocks:
        raise InvalidInput(
            "the base has fewer adapted layers than there are slices to train them",
            where="sisa.layerwise",
            expected=f"at least {num_blocks} layers, a block for each slice",
            got=f"{len(layers)}",
            next_step="lower sisa.slices, adapt more layers, or remove sisa.layerwise",
        )
    if place >= num_blocks:
        raise InvalidInput(
            "there is no block of layers left for this slice",
            where="sisa.layerwise",
            expected=f"at most {num_blocks} slices",
            got=f"stage {place + 1} of a chain",
            next_step="train without sisa.layerwise",
        )
    start, end = (each * len(layers) // num_blocks for each in (place, place + 1))
    for number, (_, each) in zip(numbers, adapters, strict=True):
        each.requires_grad_((layers[0] if number is None else number) in layers[start:end])


def lora_config(training: Mapping[str, Any], base: Any) -> LoraConfig:
    """Return the LoRA configuration of a run.

    Raise InvalidInput for modules or layers that the base does not have.
    """
    wanted: Any = training["lora_target_modules"]
    layers: dict[str, Any] = {}
    linear = {name: each for name, each in base.named_modules() if isinstance(each, nn.Linear | Conv1D)}
    names = list(linear)
    if training.get("lora_layers", ALL_LAYERS) != ALL_LAYERS:
        first = first_adapted(training, base)
        holder, modules = layers_of(base)
        numbers = list(range(first, len(modules)))
        layers = {"layers_to_transform": numbers, "layers_pattern": _last(holder)}
        names = [name for name in names if name.startswith(tuple(f"{holder}.{n}." for n in numbers))]
        if wanted == "all-linear":  # peft does not combine layers with this word
            wanted = {_last(name) for name in names}
    if wanted != "all-linear":
        wanted = sorted(set(wanted))
        _check_modules(wanted, names)
    return LoraConfig(
        r=training["lora_r"],
        lora_alpha=training["lora_alpha"],
        lora_dropout=training["lora_dropout"],
        target_modules=wanted,
        bias="none",
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(
            isinstance(each, Conv1D) and (wanted == "all-linear" or _last(name) in wanted)
            for name, each in linear.items()
        ),
        **layers,
    )


def _check_modules(wanted: list[str], names: list[str]) -> None:
    unknown = [each for each in wanted if not any(f".{name}".endswith(f".{each}") for name in names)]
    if unknown:
        raise InvalidInput(
            "the base model has no such modules",
            where="lora_target_modules",
            expected="all-linear, or among " + ", ".join(sorted({_last(name) for name in names})),
            got=", ".join(unknown),
            next_step="correct lora_target_modules in the run file",
        )


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def attach(
    base: Any, config: LoraConfig, tensors: Mapping[str, torch.Tensor] | None, init_seed: int
) -> Any:
    """Wrap a base's modules with one adapter, with the given tensors or drawn from `init_seed`."""
    with warnings.catch_warnings():
        # of modules that peft handles, and of a name that transformers drops in a later version
        warnings.filterwarnings("ignore", module="peft")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        model = get_peft_model(base, config)
    fill_adapter(model, tensors, init_seed)
    return model


def fill_adapter(model: Any, tensors: Mapping[str, torch.Tensor] | None, init_seed: int) -> None:
    """Give the adapter the given tensors, or initial ones from `init_seed`. Raise IntegrityError."""
    if tensors is None:
        _initialise(model, init_seed)
    else:
        put_tensors(model, tensors)


@torch.no_grad()
def _initialise(model: Any, init_seed: int) -> None:
    """Initialise the adapter as peft does: A like a linear layer, B with zeros."""
    generator = torch.Generator().manual_seed(init_seed)
    for module in model.modules():
        if isinstance(module, LoraLayer) and DEFAULT_NAME in module.lora_A:
            a_RI = torch.empty(module.lora_A[DEFAULT_NAME].weight.shape)
            torch.nn.init.kaiming_uniform_(a_RI, a=math.sqrt(5), generator=generator)
            module.lora_A[DEFAULT_NAME].weight.copy_(a_RI)
            module.lora_B[DEFAULT_NAME].weight.zero_()


@torch.no_grad()
def put_tensors(model: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy tensors into the adapter. Raise IntegrityError unless they have its names and shapes."""
    own = adapter_tensors(model)
    shapes = {name: each.shape for name, each in own.items()}
    if shapes != {name: each.shape for name, each in tensors.items()}:
        raise IntegrityError(
            "a checkpoint's tensors do not fit the base model and the LoRA configuration",
            where=ADAPTER_FILE,
            expected=f"{len(own)} tensors of this adapter's names and shapes",
            got=f"{len(tensors)} tensors",
            next_step="run `sisa verify` on the model",
        )
    for name, each in own.items():
        each.copy_(tensors[name])


def adapter_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Return the adapter's own tensors, which share its memory, under the names that peft reads."""
    found: dict[str, torch.Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return found


def adapter_files(model: Any) -> dict[str, bytes]:
    """Return the adapter's files as peft reads them."""
    config = config_bytes(model.peft_config[DEFAULT_NAME])
    return {ADAPTER_FILE: tensor_bytes(adapter_tensors(model)), CONFIG_FILE: config}


def config_bytes(config: LoraConfig) -> bytes:
    """Return a configuration as canonical JSON, for inference and without paths."""
    content = config.to_dict() | {"base_model_name_or_path": None, "inference_mode": True}
    return canonical_json(
        {key: sorted(each) if isinstance(each, set) else each for key, each in content.items()}
    )


def read_config(files: Mapping[str, bytes]) -> LoraConfig:
    """Return the configuration of a checkpoint's adapter. Raise IntegrityError if it can't be read."""
    try:
        return PeftConfig.from_peft_type(**read_settings(files))
    except (KeyError, ValueError, TypeError) as error:
        raise damaged(CONFIG_FILE, error) from error
