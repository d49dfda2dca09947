"""Run a seeded short soak: deletions and additions with random kills, equal to training from scratch.

The full run is `python -m tests.endurance.soak --requests 500 --out tests/endurance/soak.json`.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest

from tests.endurance.soak import main


@pytest.mark.slow
def test_a_soak_with_random_kills_equals_training_from_scratch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    numbers = ["--requests", "12", "--every", "6", "--seed", "6"]
    assert main([*numbers, "--out", str(tmp_path / "soak.json")]) == 0
    found = json.loads((tmp_path / "soak.json").read_text())
    assert found["failures"] == []
    assert found["requests"] == 12
    assert found["kills"] > 0
    assert found["comparisons_with_scratch"] == 2
