"""Records that fill every (shard, slice) equally, and the run file of a model that learns them.

Ids are tried until the cell that they hash to has room. Unequal shards, whose longest chain bounds any
number of workers, are not covered.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sisa.config.config import RunConfig, SisaBlock
from sisa.config.sources import DatasetSource
from sisa.core.digest import Keyed
from sisa.core.domain import Record
from sisa.core.ports import Executor
from sisa.flows.chains import Site
from sisa.flows.wiring.executors import open_serial
from sisa.planning.layout import Assigner, Layout
from tests.bench.command import people
from tests.models.knowing_base import record as record_of

KEY = bytes(range(32))


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
        data.write_text("".join(json.dumps(row_of(record)) + "\n" for record in records))
        return RunConfig(
            base_model=self.base_model,
            datasets=(DatasetSource(path=str(data)),),
            output_dir=self.folder / name,
            num_epochs=self.epochs,
            sisa=SisaBlock(
                shards=self.shards,
                slices=self.slices,
                group_by=None,
                partition_key_file=key,
                embedder="hashing",
            ),
        )

    def records(self) -> list[Record]:
        """Return `per_cell` records for every (shard, slice)."""
        assigner = Assigner(Keyed(KEY), Layout(self.shards, self.slices))
        room = Counter({(s, r): self.per_cell for s in range(self.shards) for r in range(self.slices)})
        chosen: list[Record] = []
        rows = people(self.tofu)
        number = 0
        while len(chosen) < self.per_cell * self.shards * self.slices:
            number += 1
            row = rows[len(chosen) % len(rows)]
            record = replace(record_of(row), id=f"r{number:06d}", subject_id=None)
            place = assigner.place(record)
            if room[place]:
                room[place] -= 1
                chosen.append(record)
        return chosen


def row_of(record: Record) -> dict[str, str]:
    """Return a record as a row of JSON."""
    return {"id": record.id, **{part.role: part.text for part in record.parts}}


def warm(site: Site, options: Mapping[str, Any]) -> Executor:
    """Return the serial executor with its base loaded, so that only training is timed."""
    from sisa.lm.base.weights import load_base

    load_base(site.base)
    return open_serial(site, options)
