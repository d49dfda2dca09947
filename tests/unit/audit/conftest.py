"""The command line as the tests of this room type it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from cluster.cli import cli


@pytest.fixture
def sisa(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict[str, Any], str]]:
    """Run a command; return its exit code, its JSON, and all that it printed."""

    def run(*arguments: Any) -> tuple[int, dict[str, Any], str]:
        code = cli.run([*map(str, arguments), "--json"])
        out, err = capfd.readouterr()
        return code, json.loads(out), out + err

    return run
