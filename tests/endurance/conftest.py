"""Run a check of this room with a small number, and provide the box of the fuzz."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.endurance.fuzz import Box, product


@pytest.fixture
def results_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Run the `main` of a check in the test's own directory; return the results that it writes."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def run(main: Callable[[Sequence[str]], int], *flags: str, **numbers: int) -> dict[str, Any]:
        words = [f"--{name.replace('_', '-')}={number}" for name, number in numbers.items()]
        assert main([*flags, *words, "--out", str(tmp_path / "found.json")]) == 0
        found: dict[str, Any] = json.loads((tmp_path / "found.json").read_text())
        assert found["failures"] == []
        return found

    return run


@pytest.fixture(scope="module")
def _box(tmp_path_factory: pytest.TempPathFactory) -> Box:
    box = Box(tmp_path_factory.mktemp("box"))
    with pytest.MonkeyPatch.context() as patch, product():
        patch.chdir(box.folder)
        patch.setenv("XDG_STATE_HOME", str(box.path / "home"))  # reset with the rest
        box.make()
    return box


@pytest.fixture
def box(_box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Box]:
    """Return a model of 22 records in the working directory, as it was made."""
    monkeypatch.chdir(_box.folder)
    monkeypatch.setenv("XDG_STATE_HOME", str(_box.path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where a sweep finds no Ray of other tests
    with product():
        _box.reset()
        yield _box
