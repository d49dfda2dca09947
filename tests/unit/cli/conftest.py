"""A command's JSON, and a copy of a small model, for the tests of this room."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.models.confessing import use_fake_resources


@pytest.fixture
def ask(
    sisa: Callable[..., tuple[int, str, str]],
) -> Callable[..., tuple[int, dict[str, Any], str]]:
    """Run a command; return its exit code, its JSON, and all that it printed."""

    def run(*arguments: Any) -> tuple[int, dict[str, Any], str]:
        code, out, err = sisa(*arguments, "--json")
        return code, json.loads(out), out + err

    return run


@pytest.fixture
def model(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of the model, whose keys go to a directory of the test's own."""
    use_fake_resources(monkeypatch)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return Path(shutil.copytree(trained, tmp_path / "model"))
