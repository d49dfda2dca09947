"""Run a seeded short soak of the service: deletions beside clients, with kills; and a rollout of heads.

The full run is `python -m tests.endurance.service --out tests/endurance/service.json`. The test suite
runs a share with one kill on the service of `tests/integration/service/test_service.py`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.endurance import rollout
from tests.endurance.service import main


@pytest.mark.long
@pytest.mark.usefixtures("own_ray")
def test_a_served_model_loses_nothing_and_shows_nothing_deleted(
    results_of: Callable[..., dict[str, Any]],
) -> None:
    found = results_of(main, deletions=1, minutes=0, kill_every=1, seed=1)
    assert found["deletions"] == 1
    assert found["comparisons"] > 0
    assert sum(found["kills"].values()) > 0


@pytest.mark.long
@pytest.mark.usefixtures("own_ray")
def test_replicas_on_two_nodes_serve_clean_heads_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The seconds are for a machine that does nothing else: `python -m tests.endurance.rollout`."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    out = tmp_path / "rollout.json"
    rollout.main(["--deletions", "2", "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["nodes_of_replicas"] == ["node-0", "node-1"]
    assert found["answers_by_former_heads"] == 0
    assert found["seconds_to_clean_heads"]["times"] == 2 * 2
