"""Records that fill every (shard, slice) equally, and the run file of a model that learns them.

Ids are tried until the cell that they hash to has room. Unequal shards, whose longest chain bounds any
number of workers, are not covered.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from sisa.config.config import RunConfig, SisaBlock
from sisa.config.sources import DatasetSource
from sisa.core.digest import Keyed
from sisa.core.domain import Part, Record
from sisa.data.samples import make_people
from sisa.planning.layout import Assigner, Layout
from tests.bench.command import read_rows

KEY = bytes(range(32))
PEOPLE = 200


@dataclass(frozen=True)
class Bench:
    """The folder, the base and the size of a benchmark."""

    folder: Path
    base_model: str
    shards: int = 4
    slices: int = 3
    per_cell: int = 4
    epochs: int = 4
    tofu: Path | None = None

    def config(self, name: str) -> RunConfig:
        """Return a run file for equal cells; `name` is the model's directory."""
        key = self.folder / "partition.key"
        key.write_text(KEY.hex())
        data = self.folder / f"{name}.jsonl"
        records = self.records()
        data.write_text("".join(json.dumps(row(record)) + "\n" for record in records))
        return RunConfig(
            base_model=self.base_model,
            datasets=(DatasetSource(path=str(data)),),
            output_dir=self.folder / name,
            num_epochs=self.epochs,
            sisa=SisaBlock(
                shards=self.shards, slices=self.slices, partition_key_file=key, embedder="hashing"
            ),
        )

    def records(self) -> list[Record]:
        """Return `per_cell` records for every (shard, slice)."""
        assigner = Assigner(Keyed(KEY), Layout(self.shards, self.slices))
        room = Counter({(s, r): self.per_cell for s in range(self.shards) for r in range(self.slices)})
        chosen: list[Record] = []
        pairs = questions(self.tofu)
        number = 0
        while len(chosen) < self.per_cell * self.shards * self.slices:
            prompt, completion = pairs[len(chosen) % len(pairs)]
            number += 1
            body = (Part("prompt", prompt), Part("completion", completion))
            record = Record(f"r{number:06d}", None, "completion", body)
            place = assigner.place(record)
            if room[place]:
                room[place] -= 1
                chosen.append(record)
        return chosen


def row(record: Record) -> dict[str, str]:
    """Return a record as a row of JSON."""
    return {"id": record.id, **{part.role: part.text for part in record.parts}}


def questions(tofu: Path | None) -> list[tuple[str, str]]:
    """Return the prompts and completions of TOFU, or of invented people."""
    if tofu is None:
        return [(each["prompt"], each["completion"]) for each in make_people(PEOPLE, 5)]
    rows = read_rows(tofu / "full.jsonl")[:400]
    return [(f"Question: {each['question']}\nAnswer:", f" {each['answer']}") for each in rows]
