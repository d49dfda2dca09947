"""The fallback end to end, by commands, on a tiny base that knows ten people.

An exact deletion leaves what the base itself knew. A patch removes it from the base and leaves the nine
others. `tests/bench/patches/fallback.py` does the same on a real base, with numbers. How a strength is
searched, and what a bound does, is in `test_unlearning.py`; joint patches are in
`unit/planning/test_patch_plan.py` and `property/test_patches.py`.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.bench.patches import fallback
from tests.bench.patches.known_people import TINY, Ground, Way
from tests.models.tiny_base import make_tiny_base

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.xdist_group("fallback")]
PACE = {  # one round, to its end
    **{"learning_rate": 1e-3, "num_epochs": 120, "max_steps": None, "num_rounds": 1},
    **{"max_utility_drop": None, "target_probability": 0.0},
}
KEPT = 0.9  # share of the others' records and of their probability that must outlast a patch
# Of what is served over it: their probability, and tokens on which shards still agree. Shards were
# trained over the base without it, and the shares vary with the processor's bits.
SERVED, AGREEING = 0.75, 0.8


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Delete one person whom the base knows, make a patch, and return what was measured on the way."""
    folder = tmp_path_factory.mktemp("fallback")
    ground = Ground.laid(folder, make_tiny_base(folder / "base", hidden=96), TINY)
    request = fallback.erase(ground, fallback.FORGOTTEN)
    return fallback.run(ground, request, {"kept": Way(settings=PACE)})


def test_the_base_still_knows_what_was_deleted_exactly(found: dict[str, Any]) -> None:
    assert found["request_probed"]["num_known"] == TINY.per_person
    before = found["without_patch"]["forgotten"]
    assert before["base_known"] == TINY.per_person
    assert before["base_probability"] > 0.9


def test_with_a_patch_it_is_not_known_any_more(found: dict[str, Any]) -> None:
    before, after = found["without_patch"]["forgotten"], found["patches"]["kept"]["forgotten"]
    assert after["base_known"] == 0
    assert after["base_probability"] < 0.2
    assert after["served"]["probability"] < 0.5 * before["served"]["probability"]


def test_whoever_is_in_the_retain_set_stays_known(found: dict[str, Any]) -> None:
    before, patch = found["without_patch"]["others"], found["patches"]["kept"]
    after = patch["others"]
    assert after["base_known"] >= KEPT * before["base_known"] > 0
    assert after["base_probability"] >= KEPT * before["base_probability"]
    assert after["served"]["probability"] >= SERVED * before["served"]["probability"]
    assert patch["composition"]["shards"]["agreement"] >= AGREEING
