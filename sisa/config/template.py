"""The commented run file that `sisa init` writes, made from the descriptions of the keys.

>>> "lora_r: 8" in commented_run_file("people.jsonl", "model")
True
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import yaml

from sisa.config.config import RunConfig, keys, value_at
from sisa.config.sources import DatasetSource

# A shard of a few dozen short records takes few optimizer steps. Small batches, a high rate and several
# passes make it learn: SmolLM2-135M gives 24 of 25 answers word for word.
FEW_RECORDS = {"micro_batch_size": 4, "learning_rate": 6e-3, "num_epochs": 8}


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
            lines.append(f"{indent}{name}: {one_line(value_at(dump, tuple(key.split('.'))))}")
    return "\n".join(lines) + "\n"


def _source_lines(source: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for name, info in DatasetSource.model_fields.items():
        lead = "  - " if not lines else "    "
        lines.append(f"{lead}{name}: {one_line(source[name])}  # {info.description}")
    return lines


def _comment(text: str | None, indent: str) -> list[str]:
    return [f"{indent}# {line}" for line in textwrap.wrap(text or "", 90)]


def one_line(value: Any) -> str:
    """Return a value as YAML in one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=1 << 30)
    return text.removesuffix("...\n").strip()
