"""The command line as the tests of this room type it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.cli import cli


@pytest.fixture
def sisa(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command; return its exit code, standard output and standard error."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        code = cli.run([str(each) for each in arguments])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run
