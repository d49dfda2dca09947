"""Where the Ray of a command that a test starts lies, for the tests of this room."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def scratch() -> Iterator[Path]:
    """Return a temporary directory for a command's Ray, whose sockets need a short path."""
    found = Path(tempfile.mkdtemp(dir="/tmp"))
    yield found
    shutil.rmtree(found, ignore_errors=True)
