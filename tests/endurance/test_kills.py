"""Kill sixteen real processes by a seed: a cheap trainer at every kind of step, and the real one.

The full run is `python -m tests.endurance.kills --kills 200 --out tests/endurance/kills.json`.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.endurance.kills import main

pytestmark = pytest.mark.slow


def killed(
    tmp_path: Path, patch: pytest.MonkeyPatch, kills: int, lora: int, *options: str
) -> dict[str, Any]:
    """Run the command in the test's own directory; return what it writes."""
    patch.setattr(tempfile, "tempdir", str(tmp_path))
    numbers = ["--kills", str(kills), "--lora", str(lora), "--seed", "7"]
    assert main([*numbers, *options, "--out", str(tmp_path / "kills.json")]) == 0
    found: dict[str, Any] = json.loads((tmp_path / "kills.json").read_text())
    assert found["failures"] == []
    assert found["kills"] >= kills
    assert "source_sha256" in found
    return found


def test_killed_processes_end_in_the_bytes_of_never_having_been_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    found = killed(tmp_path, monkeypatch, 9, 0)
    assert len(found["cheap"]["killed_at"]) >= 7
    assert "state left behind" in capfd.readouterr().out


def test_killed_processes_of_an_encrypted_model_leave_no_stray_key_or_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert killed(tmp_path, monkeypatch, 5, 0, "--encrypt")["encrypted"]


@pytest.mark.torch
def test_killed_training_of_real_adapters_ends_in_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert killed(tmp_path, monkeypatch, 2, 2)["lora"]["kills"] >= 2
