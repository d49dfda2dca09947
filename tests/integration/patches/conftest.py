"""Patches that the tests of real models share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models.patched import Files, random_patch


@pytest.fixture(scope="module")
def two_patches(tiny_base: Path) -> list[Files]:
    """Return two adapters that serve as patches."""
    return [random_patch(tiny_base, seed, "q_proj", "up_proj", scale=0.1) for seed in (1, 2)]
