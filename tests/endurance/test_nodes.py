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
    # A second is over before the first kill, so there is one, and its round is finished.
    found = run(tmp_path, seed=3, seconds=1, num_nodes=2, num_shards=2)
    assert found["failures"] == []
    assert found["kills"] == {"node": 1}
    assert found["rounds"] > 0
