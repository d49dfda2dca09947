"""Kill sixteen real processes by a seed: a cheap trainer at every kind of step, and the real one.

The full run is `python -m tests.endurance.kills --kills 200 --out tests/endurance/kills.json`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.endurance.kills import main

pytestmark = pytest.mark.slow
Results = Callable[..., dict[str, Any]]


def test_killed_processes_end_in_the_bytes_of_never_having_been_killed(
    results_of: Results, capfd: pytest.CaptureFixture[str]
) -> None:
    found = results_of(main, kills=9, lora=0, seed=7)
    assert found["kills"] >= 9
    assert "source_sha256" in found
    assert len(found["cheap"]["killed_at"]) >= 7
    assert "state left behind" in capfd.readouterr().out


def test_killed_processes_of_an_encrypted_model_leave_no_stray_key_or_file(results_of: Results) -> None:
    found = results_of(main, "--encrypt", kills=5, lora=0, seed=7)
    assert (found["encrypted"], found["kills"] >= 5) == (True, True)


@pytest.mark.torch
def test_killed_training_of_real_adapters_ends_in_the_same_bytes(results_of: Results) -> None:
    assert results_of(main, kills=2, lora=2, seed=7)["lora"]["kills"] >= 2
