"""Keep the results of cells on disk: read what is held, make what is missing.

    DIR/cells/NAME.json       numbers alone, named by the digest of all that they depend on

A file is whole or absent, so that a run that was cut short goes on with the cell that it was at. The
caller keeps other writers out.

    results = compete(design, HeldCells(directory, design, maker.inputs, maker.make))
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from approx.leaderboard.plan import Cell, Design, Result, cell_name
from sisa.core.digest import canonical_json
from sisa.core.errors import IntegrityError
from sisa.store.blobs.files import held_names, read_whole, write_atomic

Told = Callable[[str], None]


class HeldCells:
    """Results by cell: read where they are held, else made and then held."""

    def __init__(
        self,
        directory: Path,
        design: Design,
        inputs: Mapping[str, str],
        make: Callable[[Cell, str], Result],
        told: Told = lambda _: None,
    ) -> None:
        self._directory, self._design, self._inputs = directory / "cells", design, inputs
        self._make, self._told = make, told

    def __call__(self, cell: Cell) -> Result:
        """Raises IntegrityError for a result that can't be read, and what making one raises."""
        name = cell_name(cell, self._design, self._inputs)
        path = self._directory / f"{name}.json"
        if path.name in held_names(self._directory):
            return _read_result(path)
        started = time.monotonic()
        result = self._make(cell, name)
        write_atomic(path, canonical_json(result) + b"\n")
        self._told(f"{_called(cell)}: {time.monotonic() - started:.0f} s")
        return result


def _called(cell: Cell) -> str:
    parts = [cell.kind, cell.method, f"seed {cell.seed}", f"{cell.forgotten} forgotten"]
    return ", ".join(each for each in parts if each)


def _read_result(path: Path) -> Result:
    try:
        found = json.loads(read_whole(path, "result"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise IntegrityError(
            "a held result can't be read", where=str(path), next_step="remove it; it is made again"
        )
    return found
