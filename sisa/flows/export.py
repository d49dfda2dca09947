"""Export the served adapters for other tools, as a version that nothing replaces.

    peft             a PEFT directory per shard that serves an adapter
    merged-adapter   one PEFT directory: the exact mean of the shards' changes, with the sum of the ranks
    merged-model     the full weights, with the mean of the changes in them

    commit a row for every shard of every directory -> write the files -> commit that they are written

Bytes are checked against the ledger. With active patches, each exported adapter is the sum of the
patches and the shard's own, as one adapter on the plain base. `adapter_config.json` names the base as
the run file does, so that it means the same on other machines; the card has the base's digest.
`AutoPeftModelForCausalLM` loads an adapter whose base is a hub name or a directory. The rows are
committed before the files are written, so that no crash leaves an unknown export. A merged form is an
average of weights, not what the shards answer together: its card says so, and gives the loss in answer
probability on records that remain.

`export_files.py` makes the files; `stale_exports.py` erases them after a deletion has touched them.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sisa.core.digest import sha256_hex
from sisa.core.domain import Export, ExportForm, HeldCheckpoint, active
from sisa.core.errors import InvalidInput, SisaError
from sisa.core.ports import Change
from sisa.flows.export_files import (
    Card,
    lora_name,
    of_adapter,
    of_merged_adapter,
    of_merged_model,
    rank_of,
)
from sisa.flows.held_answers import merged_gap
from sisa.flows.stale_exports import finish_written
from sisa.flows.wiring.context import Context, commit, model_digest, patch_files
from sisa.store.checkpoints import ADAPTER
from sisa.store.exports import CARD, MODEL

if TYPE_CHECKING:
    from sisa.flows.wiring.context import Resources

_VERSION = re.compile(r"v([0-9]{1,9})")


@dataclass(frozen=True)
class _Written:
    """Describe a directory to write, and the heads that it contains."""

    path: str
    heads: tuple[HeldCheckpoint, ...]
    files: Mapping[str, bytes]


def export_adapters(
    context: Context, resources: Resources, target: Path, form: ExportForm = "peft"
) -> list[Path]:
    """Export the served adapters, and return the written directories, in `target`/vN.

    Raise InvalidInput for a bad target, IntegrityError for damaged files.
    """
    if target.exists() and not target.is_dir():
        raise InvalidInput("the target is not a directory", where=str(target), next_step="name another")
    root, now = _absolute(target), context.now()
    written = _written(context, resources, _next_version(context, root), form, now)
    stack = tuple(each.key for each in active(context.stores.ledger.patches()))
    made = []
    for each in written:
        digest = sha256_hex(each.files[MODEL if form == "merged-model" else ADAPTER])
        made += [
            Export(each.path, h.shard, h.prefix, h.seq, h.key, digest, now, "writing", "", stack, form)
            for h in each.heads
        ]
    if made:
        commit(context, Change(exports=made))
        try:
            for each in written:
                context.stores.exports.write(each.path, each.files)
        except SisaError:
            with contextlib.suppress(SisaError):  # the disk's error is raised instead
                finish_written(context)
            raise
        commit(context, Change(exports=[replace(each, state="clean") for each in made]))
    return [target / Path(each.path).relative_to(root) for each in written]


def _absolute(target: Path) -> str:
    """Return the target's path with its links resolved, so that a link put there later is noticed.

    Raise InvalidInput if the path is not UTF-8.
    """
    root = str(target.resolve())
    try:
        root.encode()
    except UnicodeEncodeError:
        raise InvalidInput("the target's path is not UTF-8", next_step="export elsewhere") from None
    return root.rstrip("/")


def _next_version(context: Context, root: str) -> str:
    """Return the path of a version that neither the disk nor the ledger has had."""
    names = {each.name for each in Path(root).iterdir()} if Path(root).is_dir() else set()
    for each in context.stores.ledger.exports():
        if each.path.startswith(f"{root}/"):
            names.add(each.path.removeprefix(f"{root}/").partition("/")[0])
    numbers = [int(found[1]) for name in names if (found := _VERSION.fullmatch(name))]
    return f"{root}/v{max(numbers, default=0) + 1}"


def _written(
    context: Context, resources: Resources, version: str, form: ExportForm, now: str
) -> list[_Written]:
    ledger = context.stores.ledger
    known = {each.key: each for each in ledger.checkpoints()}
    heads = [known[head.key] for head in ledger.heads() if head.key is not None]
    adapters = [context.stores.checkpoints.load(each.key, each.manifest_sha256) for each in heads]
    patches = patch_files(context.stores.patches, active(ledger.patches()))
    card = _card(context, resources, form, len(patches), now)
    if not heads:
        return []
    if form != "peft":
        path = f"{version}/{form}"
        gap = merged_gap(context, resources)
        make = of_merged_model if form == "merged-model" else of_merged_adapter
        files = make(resources, patches, adapters, context.report)
        text = card.text(lora_name(path), [each.shard for each in heads], rank_of(files), gap)
        return [_Written(path, tuple(heads), {**files, CARD: text})]
    found = []
    for head, adapter in zip(heads, adapters, strict=True):
        path = f"{version}/shard-{head.shard:05d}"
        files = of_adapter(resources, patches, adapter)
        text = card.text(lora_name(path), [head.shard], rank_of(files))
        found.append(_Written(path, (head,), {**files, CARD: text}))
    return found


def _card(context: Context, resources: Resources, form: ExportForm, num_patches: int, now: str) -> Card:
    ledger = context.stores.ledger
    return Card(
        form=form,
        base=resources.config.base_name,
        base_digest=context.settings.base,
        model_digest=model_digest(context),
        num_records=sum(ledger.counts().values()),
        num_deleted=ledger.num_tombstones(),
        roots=tuple((each.shard, each.slice, each.root) for each in ledger.slices()),
        num_patches=num_patches,
        made_at=now,
        dtype=resources.config.dtype,
    )
