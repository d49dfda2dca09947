"""Exports: one standard PEFT directory per shard that serves an adapter, and the end of stale ones.

    export    commit a row for every directory -> write the files
    deletion  its commit marks the exports that a removed record touched (`plan.touched`)
    erasing   mark what is still as it was written -> erase the files -> drop the row

Rules: bytes are checked against the ledger; `adapter_config.json` names the base's directory, so that
`AutoPeftModelForCausalLM` loads it as it is. What is served goes out: with active patches, each adapter
is the sum of the patches and the shard's own, as one adapter on the plain base. A target that holds
anything is refused. The row comes before the files and goes after them, so that no crash leaves an
export that nobody knows. A directory that was moved or changed is left alone and its row stays, marked:
it is erased when it comes back, or given up on a person's word.

Not covered: merged adapters and models; copies that somebody made of an export.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sisa.digest import canonical_json, sha256_hex
from sisa.domain import Export
from sisa.errors import EnvironmentFault, InvalidInput, SisaError
from sisa.patch_plan import active
from sisa.ports import Change
from sisa.requests import event
from sisa.world import World, commit, patch_files

if TYPE_CHECKING:
    from sisa.parts import Parts

ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def export_adapters(world: World, parts: Parts, target: Path) -> list[Path]:
    """The directories that were written. Raises InvalidInput and IntegrityError."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InvalidInput("the target is not an empty directory", where=str(target))
    place = _absolute(target)
    now, known = world.now(), {each.key: each for each in world.ledger.checkpoints()}
    stack = active(world.ledger.patches())
    patches = patch_files(world, stack)
    made: list[Export] = []
    content: list[dict[str, bytes]] = []
    for head in world.ledger.heads():
        if head.key is None:
            continue
        found = known[head.key]
        held = world.checkpoints.load(head.key, found.manifest_sha256)
        files = _over(patches, held)
        config = json.loads(files[CONFIG])
        config["base_model_name_or_path"] = str(parts.base.directory)
        content.append({ADAPTER: files[ADAPTER], CONFIG: canonical_json(config)})
        path = f"{place}/shard-{head.shard:05d}"
        where = (path, head.shard, found.slice, found.seq)
        sha256 = sha256_hex(files[ADAPTER]) if stack else found.adapter_sha256
        keys = tuple(each.key for each in stack)
        made.append(Export(*where, head.key, sha256, now, patches=keys))
    if made:
        commit(world, Change(exports=made))
        try:
            for export, files in zip(made, content, strict=True):
                world.exports.write(export.path, files)
        except SisaError:
            _forget_unwritten(world, made)
            raise
    return [target / Path(export.path).name for export in made]


def _over(patches: Sequence[Mapping[str, bytes]], adapter: Mapping[str, bytes]) -> Mapping[str, bytes]:
    """An adapter and the patches beneath it as one."""
    if not patches:
        return adapter
    from sisa.model.patched import merge_adapters

    return merge_adapters(patches, adapter)


def _absolute(target: Path) -> str:
    """Without links, so that one that is put there later can be told. Raises InvalidInput."""
    place = str(target.resolve())
    try:
        place.encode()
    except UnicodeEncodeError:
        raise InvalidInput("the target's path is not UTF-8", next_step="export elsewhere") from None
    return place.rstrip("/")


def _forget_unwritten(world: World, made: Sequence[Export]) -> None:
    with contextlib.suppress(SisaError):  # the disk's error is being raised; the rows do no harm
        absent = [each.name for each in made if world.exports.state(each) == "gone"]
        commit(world, Change(unexported=absent))


def erase_stale(world: World) -> None:
    """Erase the exports that a deletion marked and that are still what was written."""
    stale = [each for each in world.ledger.exports() if each.state != "clean"]
    due = [
        replace(each, state="erasing")
        for each in stale
        if each.state == "erasing" or world.exports.state(each) == "held"
    ]
    if not due:
        return
    commit(world, Change(exports=due))  # from now on, what is gone was erased by us
    erased = [each for each in due if world.exports.erase(each)]
    left = [replace(each, state="tainted") for each in due if each not in erased]
    counts = Counter(each.request_id for each in erased)
    told = [
        replace(request, exports_erased=request.exports_erased + counts[request.request_id])
        for request in world.ledger.requests()
        if request.request_id in counts
    ]
    names = [each.name for each in erased]
    commit(world, Change(exports=left, unexported=names, requests=told))


def standing(world: World, export: Export) -> str:
    """ "held", "gone" or "changed"; "unreadable" where the disk does not let it be told."""
    try:
        return world.exports.state(export)
    except EnvironmentFault:
        return "unreadable"


def missing(world: World) -> list[Export]:
    """Exports that a deletion marked and that could not be found, or are not what was written."""
    return [each for each in world.ledger.exports() if each.state != "clean"]


def give_up_lost(world: World) -> tuple[str, ...]:
    """Drop the rows of stale exports that are not where they were written, on a person's word that no
    copy is left. Their paths; the requests that marked them are told."""
    lost = [each for each in missing(world) if standing(world, each) == "gone"]
    counts = Counter(each.request_id for each in lost)
    events = [
        event(request, world.now(), f"{counts[request.request_id]} lost exports were given up")
        for request in world.ledger.requests()
        if request.request_id in counts
    ]
    if lost:
        commit(world, Change(unexported=[each.name for each in lost], events=events))
    return tuple(each.path for each in lost)
