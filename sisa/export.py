"""Exports: one standard PEFT directory per shard that serves an adapter.

Rules: bytes are checked against the ledger; `adapter_config.json` names the base's directory, so that
`AutoPeftModelForCausalLM` loads it as it is. A target that holds anything is refused.

Not covered: merged adapters and models; erasing exports after a deletion, which is the caller's to do.
"""

from __future__ import annotations

import json
from pathlib import Path

from sisa.digest import canonical_json
from sisa.errors import InvalidInput
from sisa.opening import Parts
from sisa.store import files
from sisa.world import World


def export_adapters(world: World, parts: Parts, target: Path) -> list[Path]:
    """The directories that were written. Raises InvalidInput and IntegrityError."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InvalidInput("the target is not an empty directory", where=str(target))
    made = []
    manifests = {each.key: each.manifest_sha256 for each in world.ledger.checkpoints()}
    for head in world.ledger.heads():
        if head.key is None:
            continue
        held = world.checkpoints.load(head.key, manifests[head.key])
        config = json.loads(held["adapter_config.json"])
        config["base_model_name_or_path"] = str(parts.base.directory)
        path = target / f"shard-{head.shard:05d}"
        files.write_directory(
            path,
            {
                "adapter_model.safetensors": held["adapter_model.safetensors"],
                "adapter_config.json": canonical_json(config),
            },
        )
        made.append(path)
    return made
