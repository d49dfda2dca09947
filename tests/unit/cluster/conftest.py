"""The command line as the tests of this room type it, and a small model to type it for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import cli
from tests.models.confessing import build, use_fake_resources


@pytest.fixture
def sisa(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command; return its exit code, standard output and standard error."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        code = cli.run([str(each) for each in arguments])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def ask(
    sisa: Callable[..., tuple[int, str, str]],
) -> Callable[..., tuple[int, dict[str, Any], str]]:
    """Run a command; return its exit code, its JSON, and all that it printed."""

    def run(*arguments: Any) -> tuple[int, dict[str, Any], str]:
        code, out, err = sisa(*arguments, "--json")
        return code, json.loads(out), out + err

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model of fakes that the tests of a file share, and change in copies."""
    folder = tmp_path_factory.mktemp("trained")
    build(folder / "model")
    return folder / "model"


@pytest.fixture
def model(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of the model, whose keys go to a directory of the test's own."""
    use_fake_resources(monkeypatch)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return Path(shutil.copytree(trained, tmp_path / "model"))
