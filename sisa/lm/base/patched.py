"""The base under patches: what is served, and trained over, beneath the shards' adapters.

    weights under patches = weights + scale * B @ A of each patch, lowest first, in float32

Rules: patches are laid on in memory; the base's files and the tensors that others share are never
written to. Only the modules that a patch changes get weights of their own in this process, all others
stay the memory-mapped ones. Without patches it is the base, bit for bit. The bits depend on base,
patches and number of threads alone; the caller pins the threads. Files come as bytes that the caller
has verified. Patches are for the CPU in float32: in bfloat16 parts of them would round away.

Not covered: which patches there are (`sisa/planning/patch_plan.py`); patches that are not LoRA.

    model, tokenizer = load_patched(directory, digest, [files])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sisa.core.digest import canonical_json, sha256_hex
from sisa.core.errors import IntegrityError, InvalidInput
from sisa.core.patch import patched_digest
from sisa.core.precision import DEFAULT_PRECISION, Precision
from sisa.lm.base.adapter import ADAPTER_FILE, CONFIG_FILE, read_config, tensor_bytes, written_config
from sisa.lm.base.low_rank import averaged, merge_into, read_change, stacked, tensors_of
from sisa.lm.base.numerics import usual_modes
from sisa.lm.base.weights import load_base, own_modules

AdapterFiles = Mapping[str, bytes]
_last: dict[tuple[Any, ...], Any] = {}  # the base under the patches that were last asked for


def load_patched(
    base_dir: Path,
    base_digest: str,
    patches: Sequence[AdapterFiles],
    precision: Precision = DEFAULT_PRECISION,
) -> tuple[Any, Any]:
    """As `load_base`, under patches, lowest first.

    Raises IntegrityError: another base; a patch that is damaged or does not fit it. InvalidInput for
    patches on another device than the CPU, or in another dtype than float32.
    """
    model, tokenizer = load_base(base_dir, base_digest, precision)
    if not patches:
        return model, tokenizer
    if precision != DEFAULT_PRECISION:
        raise InvalidInput(
            "there are patches beneath, and those are for the CPU in float32",
            where="device, dtype",
            expected=f"{DEFAULT_PRECISION.device}, {DEFAULT_PRECISION.dtype}",
            got=f"{precision.device}, {precision.dtype}",
            next_step="take the patches back (`sisa approx revert --all`), or restore the run file",
        )
    made_of = [
        {name: sha256_hex(files.get(name, b"")) for name in (ADAPTER_FILE, CONFIG_FILE)}
        for files in patches
    ]
    key = (base_dir.resolve(), base_digest, canonical_json(made_of), torch.get_num_threads())
    if key not in _last:
        with usual_modes():
            for files in patches:
                merge_into(model, read_change(files))
        _last.clear()
        _last[key] = model
    return own_modules(_last[key]), tokenizer


def patched_name(base_digest: str, patches: Sequence[AdapterFiles]) -> str:
    """The name of the base under patches, by their files."""
    return patched_digest(base_digest, [sha256_hex(files[ADAPTER_FILE]) for files in patches])


def merge_adapters(
    patches: Sequence[AdapterFiles], adapters: Sequence[AdapterFiles]
) -> dict[str, bytes]:
    """One adapter on the plain base that does what the mean of adapters over patches does. Its scale is
    1, and it names its modules in full.

    Raises IntegrityError: an adapter that is damaged, or none that can be put together.
    """
    configs = [read_config(files) for files in (*patches, *adapters)]
    if len({config.fan_in_fan_out for config in configs}) != 1:
        raise IntegrityError(
            "a patch and an adapter are of different bases",
            where=CONFIG_FILE,
            expected="one value of fan_in_fan_out",
            next_step="run `sisa verify` on the model",
        )
    mean = averaged([read_change(files) for files in adapters])
    whole = stacked([*(read_change(files) for files in patches), mean])
    config = configs[-1]
    config.r = config.lora_alpha = len(next(iter(whole.values())).a_RI)
    config.target_modules = list(whole)
    config.use_rslora, config.init_lora_weights = False, True
    config.layers_to_transform = config.layers_pattern = config.exclude_modules = None
    return {ADAPTER_FILE: tensor_bytes(tensors_of(whole)), CONFIG_FILE: written_config(config)}
