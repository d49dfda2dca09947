"""LoRA adapters as bytes, in the form that `PeftModel.from_pretrained` loads.

An adapter's initial weights depend on one seed alone, not on what the process drew earlier nor on the
base's device. `adapter_config.json` is canonical JSON without paths. safetensors writes the tensors with
one metadata key, so the same tensors give the same bytes. Adapters other than LoRA, and adapters on
embeddings, are not supported.

    model = attach(base, lora_config(training, base), tensors=None, init_seed=7)
    files = {ADAPTER_FILE: tensor_bytes(adapter_tensors(model)), CONFIG_FILE: config_bytes(model)}
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load, save

from sisa.core.digest import canonical_json
from sisa.core.errors import IntegrityError, InvalidInput
from sisa.lm.base.layers import (
    ALL_LAYERS,
    first_adapted,
    is_target,
    is_transposed,
    layers_of,
    linear_names,
)

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
DEFAULT_NAME = "default"


def lora_config(training: Mapping[str, Any], base: Any) -> LoraConfig:
    """Return the LoRA configuration of a run.

    Raises InvalidInput for modules or layers that the base does not have.
    """
    wanted, names = training["lora_target_modules"], linear_names(base)
    layers: dict[str, Any] = {}
    if training.get("lora_layers", ALL_LAYERS) != ALL_LAYERS:
        first = first_adapted(training, base)
        holder, modules = layers_of(base)
        layers["layers_to_transform"] = list(range(first, len(modules)))
        layers["layers_pattern"] = _last(holder)
        inside = tuple(f"{holder}.{number}." for number in range(first, len(modules)))
        names = [name for name in names if name.startswith(inside)]
        if wanted == "all-linear":  # peft does not combine layers with this word
            wanted = sorted({_last(name) for name in names})
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
            is_transposed(each) and (wanted == "all-linear" or _last(name) in wanted)
            for name, each in base.named_modules()
        ),
        **layers,
    )


def _check_modules(wanted: list[str], names: list[str]) -> None:
    unknown = [each for each in wanted if not any(is_target(name, each) for name in names)]
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
    base: Any,
    config: LoraConfig,
    tensors: Mapping[str, torch.Tensor] | None,
    init_seed: int,
    name: str = DEFAULT_NAME,
) -> Any:
    """Wrap a base's modules with one adapter, with the given tensors or drawn from `init_seed`."""
    with _quiet_peft():
        model = get_peft_model(base, config, adapter_name=name)
    if tensors is None:
        draw(model, init_seed, name)
    else:
        put_tensors(model, tensors, name)
    return model


@torch.no_grad()
def draw(model: Any, init_seed: int, name: str = DEFAULT_NAME) -> None:
    """Initialise adapter `name` as peft does: A like a linear layer, B with zeros."""
    generator = torch.Generator().manual_seed(init_seed)
    for module in model.modules():
        if isinstance(module, LoraLayer) and name in module.lora_A:
            a = torch.empty(module.lora_A[name].weight.shape)
            torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
            module.lora_A[name].weight.copy_(a)
            module.lora_B[name].weight.zero_()


def add_adapter(model: Any, config: LoraConfig, tensors: Mapping[str, torch.Tensor], name: str) -> None:
    """Add one more adapter to a wrapped base."""
    model.add_adapter(name, config)
    put_tensors(model, tensors, name)


def put_tensors(model: Any, tensors: Mapping[str, torch.Tensor], name: str) -> None:
    """Load tensors into adapter `name`. Raises IntegrityError unless names and shapes match."""
    check_tensors(adapter_tensors(model, name), tensors)
    set_peft_model_state_dict(model, dict(tensors), adapter_name=name)


def check_tensors(expected: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise IntegrityError unless tensors have the expected names and shapes."""
    shapes, others = ({name: x.shape for name, x in each.items()} for each in (expected, tensors))
    if shapes != others:
        raise IntegrityError(
            "a checkpoint's tensors do not fit the base model and the LoRA configuration",
            where=ADAPTER_FILE,
            expected=f"{len(expected)} tensors of this adapter's names and shapes",
            got=f"{len(tensors)} tensors",
            next_step="run `sisa verify` on the model",
        )


def adapter_tensors(model: Any, name: str = DEFAULT_NAME) -> dict[str, torch.Tensor]:
    """Return the tensors of one adapter under the names that peft reads."""
    tensors: dict[str, torch.Tensor] = get_peft_model_state_dict(
        model, adapter_name=name, save_embedding_layers=False
    )
    return tensors


def tensor_bytes(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Return tensors as safetensors bytes; equal tensors give equal bytes."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return save(plain, metadata={"format": "pt"})


def read_tensors(files: Mapping[str, bytes], name: str) -> dict[str, torch.Tensor]:
    """Return the tensors in a checkpoint's file. Raises IntegrityError if it is missing or damaged."""
    try:
        return load(files[name])
    except Exception as error:  # safetensors raises types of its own; all of them mean damage
        raise IntegrityError(
            "a checkpoint's file can't be read",
            where=name,
            got="nothing" if name not in files else type(error).__name__,
            next_step="run `sisa verify` on the model",
        ) from error


def config_bytes(model: Any) -> bytes:
    """Return the adapter's configuration as canonical JSON, for inference and without paths."""
    return written_config(model.peft_config[DEFAULT_NAME])


def written_config(config: LoraConfig) -> bytes:
    """Return a configuration as `config_bytes` writes it."""
    content = config.to_dict()
    for key, value in content.items():
        if isinstance(value, set | frozenset):
            content[key] = sorted(value)
    content |= {"base_model_name_or_path": None, "inference_mode": True}
    return canonical_json(content)


def read_config(files: Mapping[str, bytes]) -> LoraConfig:
    """Return the configuration of a checkpoint's adapter. Raises IntegrityError if it can't be read."""
    try:
        config = PeftConfig.from_peft_type(**json.loads(files[CONFIG_FILE]))
    except (KeyError, ValueError, TypeError) as error:
        raise IntegrityError(
            "a checkpoint's adapter configuration can't be read",
            where=CONFIG_FILE,
            got=type(error).__name__,
            next_step="run `sisa verify` on the model",
        ) from error
    return config


@contextmanager
def _quiet_peft() -> Iterator[None]:
    """Silence peft's warnings.

    They concern a name that transformers is about to drop (both are pinned) and modules that peft
    handles correctly.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="peft")
        warnings.filterwarnings(
            "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
        )
        yield
