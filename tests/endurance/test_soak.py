"""A seeded short soak: deletions and additions with random kills, equal to training from scratch.

The full run is `python -m tests.endurance.soak --requests 500 --out tests/endurance/soak.json`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.endurance.soak import run


@pytest.mark.slow
def test_a_soak_with_random_kills_equals_training_from_scratch(tmp_path: Path) -> None:
    found = run(tmp_path, seed=6, requests=15, every=5)
    assert found["failures"] == []
    assert found["requests"] == 15
    assert found["kills"] > 0
    assert found["comparisons_with_scratch"] == 3
