"""The examples in the docstrings of the language model's room hold."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import sisa

pytestmark = pytest.mark.torch

ROOM = Path(sisa.__file__).parent / "lm"
MODULES = [f"{path.parent.name}.{path.stem}" for path in sorted(ROOM.glob("*/[a-z]*.py"))]


@pytest.mark.parametrize("name", MODULES)
def test_examples_hold(name: str) -> None:
    assert doctest.testmod(importlib.import_module(f"sisa.lm.{name}")).failed == 0
