"""The base with patches merged in: what is served, and trained over, beneath the shards' adapters.

    weights under patches = weights + scale * B @ A of each patch, lowest first, in float32

Patches are merged in memory; the base's files and shared tensors are never written to. Only the modules
that a patch changes get their own weights in this process; all others stay memory-mapped. Without
patches the result is the base, bit for bit. The bits depend on the base, the patches and the number of
threads alone; the caller pins the threads. Files come as bytes that the caller has verified. Patches
need the CPU in float32: in bfloat16 parts of them would be rounded away.

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
_last: dict[tuple[Any, ...], Any] = {}  # the base with the patches that were last loaded


def load_patched(
    base_dir: Path,
    base_digest: str,
    patches: Sequence[AdapterFiles],
    precision: Precision = DEFAULT_PRECISION,
) -> tuple[Any, Any]:
    """Return (model, tokenizer) as `load_base` does, with patches merged in, lowest first.

    Raises IntegrityError for another base, or a patch that is damaged or does not fit, and InvalidInput
    for patches on another device than the CPU or in another dtype than float32.
    """
    model, tokenizer = load_base(base_dir, base_digest, precision)
    if not patches:
        return model, tokenizer
    if precision != DEFAULT_PRECISION:
        raise InvalidInput(
            "the model has patches, which need the CPU in float32",
            where="device, dtype",
            expected=f"{DEFAULT_PRECISION.device}, {DEFAULT_PRECISION.dtype}",
            got=f"{precision.device}, {precision.dtype}",
            next_step="revert the patches (`sisa approx revert --all`), or restore the run file",
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
    """Return the digest that names the base with these patches."""
    return patched_digest(base_digest, [sha256_hex(files[ADAPTER_FILE]) for files in patches])


def merge_adapters(
    patches: Sequence[AdapterFiles], adapters: Sequence[AdapterFiles]
) -> dict[str, bytes]:
    """Return one adapter on the plain base that equals the mean of adapters over patches.

    Its scale is 1, and it names its modules in full. Raises IntegrityError if an adapter is damaged or
    they can't be combined.
    """
    configs = [read_config(files) for files in (*patches, *adapters)]
    if len({config.fan_in_fan_out for config in configs}) != 1:
        raise IntegrityError(
            "a patch and an adapter belong to different bases",
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
