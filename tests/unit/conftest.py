"""The command line, and a small trained model, for the tests of several rooms."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import cli
from tests.models.confessing import build, use_fake_resources
from tests.unit.commands import Ask, Sisa


@pytest.fixture
def sisa(capfd: pytest.CaptureFixture[str]) -> Sisa:
    """Run a command; return its exit code, standard output and standard error."""

    def run(*arguments: Any) -> tuple[int, str, str]:
        code = cli.run([str(each) for each in arguments])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def ask(sisa: Sisa) -> Ask:
    """Run a command, check its exit code (0 unless `code` is given), and return its one JSON object."""

    def run(*arguments: Any, code: int = 0) -> dict[str, Any]:
        found, out, err = sisa(*arguments, "--json")
        assert found == code, (out, err)
        parsed = json.loads(out)
        assert isinstance(parsed, dict)
        return parsed

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model of fakes that the tests of a file share, and change in copies."""
    folder = tmp_path_factory.mktemp("trained")
    build(folder / "model")
    return folder / "model"


@pytest.fixture
def bare(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of `trained` that fakes train; its keys go to `state` beside it."""
    use_fake_resources(monkeypatch)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return Path(shutil.copytree(trained, tmp_path / "model"))


@pytest.fixture
def model(bare: Path) -> Path:
    """Return the model of a test; files of tests add keys and the like to it."""
    return bare
