"""A seeded dozen of real kills: a cheap trainer at every kind of step, and the real one on a tiny base.

The full run is `python -m tests.endurance.kills --kills 200 --out tests/endurance/kills.json`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.endurance.kills import run

SEED = 7


@pytest.mark.slow
def test_killed_processes_end_in_the_bytes_of_never_having_been_killed(tmp_path: Path) -> None:
    found = run(tmp_path, SEED, num_cheap=12, num_lora=0)
    assert found["failures"] == []
    assert found["kills"] >= 12
    assert len(found["cheap"]["killed_at"]) >= 8


@pytest.mark.slow
def test_killed_processes_of_an_encrypted_model_leave_no_key_and_no_file_too_many(
    tmp_path: Path,
) -> None:
    found = run(tmp_path, SEED, num_cheap=8, num_lora=0, encrypt=True)
    assert found["failures"] == []
    assert found["kills"] >= 8


@pytest.mark.slow
@pytest.mark.torch
def test_killed_training_of_real_adapters_ends_in_the_same_bytes(tmp_path: Path) -> None:
    found = run(tmp_path, SEED, num_cheap=0, num_lora=2)
    assert found["failures"] == []
    assert found["kills"] >= 2
