"""Run a seeded short soak: deletions and additions with random kills, equal to training from scratch.

The full run is `python -m tests.endurance.soak --requests 500 --out tests/endurance/soak.json`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.endurance.soak import main


@pytest.mark.slow
def test_a_soak_with_random_kills_equals_training_from_scratch(
    results_of: Callable[..., dict[str, Any]],
) -> None:
    found = results_of(main, requests=12, every=6, seed=6)
    assert found["requests"] == 12
    assert found["kills"] > 0
    assert found["comparisons_with_scratch"] == 2
