"""Fake a store of metrics in memory."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from sisa.core.errors import IntegrityError
from sisa.store.metrics import is_line, is_run, without_losses


class FakeMetrics:
    """A MetricsStore whose lines can be inspected."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def append(self, line: Mapping[str, Any]) -> None:
        if not is_run(str(line["run"])):
            raise IntegrityError("that is not the name of a run")
        self.lines.append(dict(line))

    def runs(self) -> list[str]:
        return sorted({each["run"] for each in self.lines})

    def read(self, run: str) -> list[dict[str, Any]]:
        found = [each for each in self.lines if each["run"] == run]
        if not found or not all(map(is_line, found)):
            raise IntegrityError("metrics are missing, or not in the form that is written")
        return found

    def keep_losses(self, stages: Collection[str]) -> None:
        self.lines = [without_losses(each, stages) for each in self.lines]
