"""The commented run file that `sisa init` writes, and the table of all keys.

Both are generated from the descriptions of the keys, so that no key is missing or explained twice.

>>> "lora_r: 8" in commented_run_file("people.jsonl", "model")
True
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_jsonable_python

from sisa.config.config import (
    PATH_FIELDS,
    Aggregation,
    DatasetSource,
    RunConfig,
    Scratch,
    json_schema,
    keys,
    value_at,
)
from sisa.config.runfile import in_words
from sisa.core.block import Block
from sisa.planning.bands import Bands

# A shard of a few dozen short records takes few optimizer steps. Small batches, a high rate and several
# passes make it learn: SmolLM2-135M gives 24 of 25 answers word for word.
FEW_RECORDS = {"micro_batch_size": 4, "learning_rate": 6e-3, "num_epochs": 8}

# Keys whose value may be a block, and the prefix of its keys.
NESTED: dict[str, tuple[str, type[Block]]] = {
    "base_model": ("base_model.scratch", Scratch),
    "datasets": ("datasets[]", DatasetSource),
    "sisa.bands": ("sisa.bands", Bands),
    "sisa.aggregation": ("sisa.aggregation", Aggregation),
}


def commented_run_file(data_file: str, output_dir: str, **chosen: Any) -> str:
    """Return a run file with a comment on every key; keys have their defaults unless `chosen`."""
    datasets = (DatasetSource(path=data_file),)
    config = RunConfig(datasets=datasets, output_dir=Path(output_dir), **chosen)
    dump = config.model_dump(mode="json")
    lines, block = ["# Run file of a deletion-ready model. `sisa train FILE` reads it."], ""
    for key, info in keys().items():
        *outer, name = key.split(".")
        if outer and outer[0] != block:
            block = outer[0]
            lines += ["", *_comment(RunConfig.model_fields[block].description, ""), f"{block}:"]
        indent = "  " if outer else ""
        lines += [*([] if outer else [""]), *_comment(info.description, indent)]
        if key == "datasets":
            lines += ["datasets:", *_source_lines(dump["datasets"][0])]
        else:
            lines.append(f"{indent}{name}: {_yaml(value_at(dump, tuple(key.split('.'))))}")
    return "\n".join(lines) + "\n"


def _source_lines(source: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for name, info in DatasetSource.model_fields.items():
        lead = "  - " if not lines else "    "
        lines.append(f"{lead}{name}: {_yaml(source[name])}  # {info.description}")
    return lines


def _comment(text: str | None, indent: str) -> list[str]:
    return [f"{indent}# {line}" for line in textwrap.wrap(text or "", 90)]


def _yaml(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=1 << 30)
    return text.removesuffix("...\n").strip()


def reference() -> Iterator[str]:
    """Yield the lines of the table of all keys, as Markdown."""
    schema = json_schema()
    definitions = schema["$defs"]
    yield "| key | type | default | meaning | a change |"
    yield "| --- | --- | --- | --- | --- |"
    for name, info in keys().items():
        *block, last = name.split(".")
        holder: Any = RunConfig.model_fields[block[0]].annotation if block else None
        within = definitions[holder.__name__] if block else schema
        extra: Any = info.json_schema_extra
        yield _row(name, info, in_words(within["properties"][last]), extra["effect"])
        if name not in NESTED:
            continue
        prefix, nested = NESTED[name]
        for inner, field in nested.model_fields.items():
            kind = in_words(definitions[nested.__name__]["properties"][inner])
            moved = nested is Scratch and inner in PATH_FIELDS
            yield _row(f"{prefix}.{inner}", field, kind, "none" if moved else extra["effect"])


def _row(name: str, info: FieldInfo, kind: str, effect: str) -> str:
    default = "(required)"
    if info.default is not PydanticUndefined:
        default = f"`{_yaml(to_jsonable_python(info.default))}`"
    return f"| `{name}` | {kind} | {default} | {info.description} | {effect} |"
