"""Low-rank changes: what LoRA adapters add to weight matrices, combined and merged into a base.

Shapes: R rank, I inputs, O outputs of a linear module. An adapter's change of a module is
`b_OR @ a_RI`, in float32, with the adapter's scale folded into `b_OR`. Only plain LoRA is read: an
adapter that changes a model by anything but a product of two matrices is refused. The sum of several
changes is one change whose rank is the sum of theirs.

>>> one, two = (Factors(torch.ones(1, 3), torch.full((2, 1), each)) for each in (2.0, 5.0))
>>> whole = stacked([{"m": one}, {"m": two}])
>>> whole["m"].a_RI.shape, bool((whole["m"].b_OR @ whole["m"].a_RI == 7).all())
(torch.Size([2, 3]), True)

Patches are merged into the base beneath the shards' adapters:

    weights under patches = weights + scale * B @ A of each patch, lowest first, in float32

Merging happens in memory. Only the modules that a patch changes get their own weights in this process;
all others stay memory-mapped. The bits depend on the base, the patches and the number of threads alone.
Files come as bytes that the caller has verified. They are read without peft, which takes seconds to
import, and written as peft reads them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from safetensors.numpy import save
from safetensors.torch import load
from transformers.pytorch_utils import Conv1D

from sisa.core.checkpoint_files import ADAPTER_FILE, CONFIG_FILE
from sisa.core.digest import canonical_json, patched_digest, sha256_hex
from sisa.core.errors import IntegrityError, Problem

PREFIX, A, B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
ANY_VALUE = {  # keys with any value in plain LoRA: names, modules, how it was initialised and trained
    *("r", "lora_alpha", "use_rslora", "lora_dropout", "init_lora_weights", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "revision"),
    *("task_type", "peft_type", "peft_version", "auto_mapping", "inference_mode"),
    "base_model_name_or_path",
}
ONE_VALUE = {"bias": "none", "megatron_core": "megatron.core", "qalora_group_size": 16}  # others: none


class Factors(NamedTuple):
    """The change of one module's weights, as two matrices."""

    a_RI: torch.Tensor
    b_OR: torch.Tensor


LowRankChange = Mapping[str, Factors]  # by module name


def read_change(files: Mapping[str, bytes]) -> dict[str, Factors]:
    """Return the change that an adapter makes. Raise IntegrityError if damaged or not plain LoRA."""
    settings, tensors = read_settings(files), read_tensors(files, ADAPTER_FILE)
    _check_plain(settings)
    rank, alpha = settings["r"], settings["lora_alpha"]
    scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    modules = sorted({name.removeprefix(PREFIX).removesuffix(A).removesuffix(B) for name in tensors})
    found = {}
    for module in modules:
        a_RI, b_OR = (tensors.get(f"{PREFIX}{module}{end}", torch.empty(0)) for end in (A, B))
        plain = a_RI.dtype == b_OR.dtype == torch.float32 and a_RI.dim() == b_OR.dim() == 2
        if not plain or not a_RI.shape[0] == rank == b_OR.shape[1]:
            raise _misfit(f"{module} lacks two float32 matrices of rank {rank}")
        found[module] = Factors(a_RI, b_OR * scale)
    if not found or len(tensors) != 2 * len(found):
        raise _misfit(f"{len(tensors)} tensors of {len(found)} modules")
    return found


def read_settings(files: Mapping[str, bytes]) -> dict[str, Any]:
    """Return the content of an adapter's configuration. Raise IntegrityError if it can't be read."""
    try:
        return dict(json.loads(files[CONFIG_FILE]))
    except (KeyError, ValueError, TypeError) as error:
        raise damaged(CONFIG_FILE, error) from error


def read_tensors(files: Mapping[str, bytes], name: str) -> dict[str, torch.Tensor]:
    """Return the tensors in a checkpoint's file. Raise IntegrityError if it is missing or damaged."""
    try:
        return load(files[name])
    except Exception as error:  # safetensors raises types of its own; all of them mean damage
        raise damaged(name, error) from error


def damaged(name: str, error: Exception) -> IntegrityError:
    """Return the error for a file of a checkpoint that is missing or can't be parsed."""
    return IntegrityError(
        "a checkpoint's file can't be read",
        where=name,
        got="nothing" if isinstance(error, KeyError) else type(error).__name__,
        next_step="run `sisa verify` on the model",
    )


def tensor_bytes(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Return tensors as safetensors bytes; equal tensors give equal bytes."""
    # numpy's writer gives the bytes of torch's in two thirds of the time
    plain = {name: each.detach().cpu().contiguous().numpy() for name, each in tensors.items()}
    return save(plain, metadata={"format": "pt"})


def _check_plain(settings: Mapping[str, Any]) -> None:
    others = {key: value or None for key, value in settings.items() if key not in ANY_VALUE}
    odd = [key for key, value in others.items() if value != ONE_VALUE.get(key)]
    if settings.get("peft_type") != "LORA":
        odd.append("peft_type")
    for key in ("r", "lora_alpha"):
        if type(settings.get(key)) is not int or settings[key] < 1:
            odd.append(key)
    if settings.get("init_lora_weights", True) not in (True, False, "gaussian"):
        odd.append("init_lora_weights")  # other initialisations change the base itself
    if odd:
        raise IntegrityError(
            "an adapter is not plain LoRA",
            where=CONFIG_FILE,
            got=", ".join(sorted(odd)),
            next_step="make it with rank, alpha and target modules alone",
        )


def _misfit(got: str, *problems: Problem) -> IntegrityError:
    return IntegrityError(
        "an adapter's tensors do not fit",
        where=ADAPTER_FILE,
        expected="lora_A and lora_B of modules that the base has, of their shapes",
        got=got,
        problems=problems,
        next_step="run `sisa verify` on the model",
    )


def check_fits(modules: Mapping[str, Any], change: LowRankChange) -> None:
    """Raise IntegrityError with each module, by name, that a change does not fit."""
    misfits = [
        Problem(name, "the base has no linear module of these shapes")
        for name, each in change.items()
        if shape_of(modules.get(name)) != (each.b_OR.shape[0], each.a_RI.shape[1])
    ]
    if misfits:
        raise _misfit(f"{len(misfits)} of {len(change)} modules do not fit", *misfits)


def merge_into(model: Any, change: LowRankChange) -> None:
    """Add a change to a model's weights, in new tensors: the old ones may be shared.

    Raise IntegrityError, changing nothing, if the change does not fit the model.
    """
    modules = dict(model.named_modules())
    check_fits(modules, change)
    with torch.no_grad():
        for name, each in change.items():
            delta_OI = each.b_OR @ each.a_RI
            delta = delta_OI.T if isinstance(modules[name], Conv1D) else delta_OI
            modules[name].weight = torch.nn.Parameter(modules[name].weight + delta, requires_grad=False)


def shape_of(module: Any) -> tuple[int, ...]:
    """Return (outputs, inputs) of a linear module; an empty tuple for anything else."""
    if isinstance(module, Conv1D):
        return tuple(reversed(module.weight.shape))
    return tuple(module.weight.shape) if isinstance(module, torch.nn.Linear) else ()


def stacked(parts: Sequence[LowRankChange]) -> dict[str, Factors]:
    """Return the sum of changes as one, with zeros for a part that does not change a module."""
    ranks = [next(iter(part.values())).a_RI.shape[0] for part in parts]
    found = {}
    for name in sorted({name for part in parts for name in part}):
        like = next(part[name] for part in parts if name in part)
        num_inputs, num_outputs = like.a_RI.shape[1], len(like.b_OR)
        nothing = (Factors(torch.zeros(r, num_inputs), torch.zeros(num_outputs, r)) for r in ranks)
        rows = [part.get(name, zeros) for part, zeros in zip(parts, nothing, strict=True)]
        a_RI, b_OR = torch.cat([row.a_RI for row in rows]), torch.cat([row.b_OR for row in rows], dim=1)
        found[name] = Factors(a_RI, b_OR)
    return found


def averaged(parts: Sequence[LowRankChange]) -> dict[str, Factors]:
    """Return the exact mean of changes: ranks add up, so nothing is approximated."""
    return {name: Factors(each.a_RI, each.b_OR / len(parts)) for name, each in stacked(parts).items()}


def merge_adapters(
    patches: Sequence[Mapping[str, bytes]], adapters: Sequence[Mapping[str, bytes]]
) -> dict[str, bytes]:
    """Return one adapter on the plain base that equals the mean of adapters over patches.

    Its scale is 1, and it names its modules in full. Raise IntegrityError if an adapter is damaged or
    they can't be combined.
    """
    settings = [read_settings(files) for files in (*patches, *adapters)]
    if len({each.get("fan_in_fan_out", False) for each in settings}) != 1:
        raise IntegrityError(
            "a patch and an adapter belong to different bases",
            where=CONFIG_FILE,
            expected="one value of fan_in_fan_out",
            next_step="run `sisa verify` on the model",
        )
    mean = averaged([read_change(files) for files in adapters])
    whole = stacked([*(read_change(files) for files in patches), mean])
    rank = len(next(iter(whole.values())).a_RI)
    unset = dict.fromkeys(("layers_to_transform", "layers_pattern", "exclude_modules"))
    config = {
        **settings[-1], "r": rank, "lora_alpha": rank, "target_modules": sorted(whole),
        "use_rslora": False, "init_lora_weights": True, **unset,
    }  # fmt: skip
    tensors = {f"{PREFIX}{name}{A}": each.a_RI for name, each in whole.items()}
    tensors |= {f"{PREFIX}{name}{B}": each.b_OR for name, each in whole.items()}
    return {ADAPTER_FILE: tensor_bytes(tensors), CONFIG_FILE: canonical_json(config)}


def patched_name(base_digest: str, patches: Sequence[Mapping[str, bytes]]) -> str:
    """Return the digest that names the base with these patches."""
    return patched_digest(base_digest, [sha256_hex(files[ADAPTER_FILE]) for files in patches])
