"""Keep the cells of TOFU in full in a directory: each is a JSON file of numbers, computed once.

    tried       six trials of a layout or of the ordinary LoRA, on a tenth of the records
    made        the model: trained, deleted from, unlearned; seconds, cost, digests
    asked       TOFU's questions, in a log (`approx.evaluation`)
    attacked    relearning, rounding and sampling, for some authors of the forget set

`DIR/cells/NAME.json` is whole or absent. Several processes may share DIR: locks keep two of them from
computing the same cell. All cells travel in one file (`packed`, `take_over`).

    cells = Cells(Path("out"), design, data, inputs)
    cells.once("50x4-key0-forget10.made", compute)
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sisa.core.digest import canonical_json
from sisa.core.errors import ConfigConflict
from sisa.store.blobs.files import read_whole, write_atomic, writer_lock
from tests.bench.command import Clock
from tests.bench.tofu_full.design import Data, Design, meaning

Json = dict[str, Any]


class Cells:
    """The finished cells of one design in a directory; `inputs` names all else that they depend on."""

    def __init__(
        self,
        directory: Path,
        design: Design,
        data: Data,
        inputs: Json,
        report: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Open a directory. Raise ConfigConflict for one of another design or other inputs."""
        self.directory, self.design, self.data, self.inputs = directory, design, data, inputs
        self._report = report
        path = directory / "design.json"
        if path.exists():
            self._check_same(json.loads(path.read_bytes()), str(path))
        else:
            directory.mkdir(parents=True, exist_ok=True)
            write_atomic(path, canonical_json(self._meaning))

    @property
    def _meaning(self) -> Json:
        return {"inputs": self.inputs, "design": meaning(self.design)}

    def _check_same(self, held: Json, where: str) -> None:
        if held != json.loads(canonical_json(self._meaning)):
            raise ConfigConflict(
                "these are cells of another design, base, data or device",
                where=where,
                next_step="give the same options, or another directory and file of results",
            )

    def packed(self) -> bytes:
        """Return all finished cells as one compressed file."""
        named = {path.stem: path for path in (self.directory / "cells").glob("*.json")}
        held = {name: json.loads(path.read_bytes()) for name, path in named.items()}
        return gzip.compress(canonical_json({**self._meaning, "cells": held}), mtime=0)

    def take_over(self, packed: bytes, where: str) -> None:
        """Keep the cells that this directory lacks. Raise ConfigConflict as opening does."""
        held = json.loads(gzip.decompress(packed))
        cells = held.pop("cells")
        self._check_same(held, where)
        for name in cells:
            if self.known(name) is None:
                self._keep(name, cells[name])

    def _path(self, name: str) -> Path:
        return self.directory / "cells" / f"{name}.json"

    def _keep(self, name: str, found: Json) -> None:
        self._path(name).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self._path(name), canonical_json(found) + b"\n")

    def known(self, name: str) -> Json | None:
        """Return the result of a cell, or None before it was computed."""
        path = self._path(name)
        found: Json = json.loads(read_whole(path, "cell")) if path.is_file() else {}
        return found or None

    def once(self, name: str, compute: Callable[[], Json]) -> Json:
        """Return the result of a cell, computed now or read.

        Raise Busy while another process computes it, or something that it needs.
        """
        if (found := self.known(name)) is not None:
            return found
        with self.alone(name):
            return self.known(name) or self._computed(name, compute)

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Keep other processes out of a cell, or out of a model's files. Raise Busy if one is in."""
        folder = self.directory / "locks"
        folder.mkdir(exist_ok=True)
        with writer_lock(folder / name):
            yield

    def _computed(self, name: str, compute: Callable[[], Json]) -> Json:
        clock = Clock()
        found = compute()
        total = {f"total_{unit}": value for unit, value in clock.took().items()}
        self._keep(name, {**found, **total})
        seconds, of_a_core = total.values()
        self._report(f"{name}: {seconds:.0f} s, {of_a_core:.0f} of a core")
        return {**found, **total}
