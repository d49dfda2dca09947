"""Kill a node while chains train on a cluster: equal to the serial executor.

The full run is `python -m tests.endurance.nodes --seconds 600 --out tests/endurance/nodes.json`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.endurance.nodes import run


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("own_ray")
def test_random_kills_of_nodes_change_no_byte(tmp_path: Path) -> None:
    # One kill, as soon as something trains; its round is finished.
    at_once = (0.0, 0.0)
    found = run(tmp_path, 3, 0, num_nodes=2, num_shards=2, passes=(10, 3), pause_s=at_once)
    assert found["failures"] == []
    assert found["kills"] == {"node": 1}
    assert found["rounds"] > 0
