"""A copy of a small model, for the tests of this room."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.models.confessing import use_fake_resources


@pytest.fixture
def model(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of the model, whose keys go to a directory of the test's own."""
    use_fake_resources(monkeypatch)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return Path(shutil.copytree(trained, tmp_path / "model"))
