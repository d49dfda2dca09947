"""The fallback end to end, by commands, on a tiny base that knows ten people: an exact deletion leaves
what the base itself knew; a patch takes it from the base, and leaves the nine others there.

The same on a real base, with numbers: `tests/bench/fallback.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import sisa
from tests.bench import fallback, sequential
from tests.bench.known_people import TINY, Ground, Way
from tests.tiny_base import make_tiny_base

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.xdist_group("fallback")]
PACE = {"learning_rate": 1e-3, "num_epochs": 120, "max_utility_drop": None}
KEPT = 0.9  # share of the others' records and of their probability that must outlast a patch
# Of what is served over it: their probability, and tokens on which shards still agree. Shards were
# trained over the base without it, and the shares vary with the processor's bits.
SERVED, AGREEING = 0.75, 0.8


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    folder = tmp_path_factory.mktemp("fallback")
    return Ground.laid(folder, make_tiny_base(folder / "base", hidden=96), TINY)


@pytest.fixture(scope="module")
def found(ground: Ground) -> dict[str, Any]:
    return fallback.run(ground, {"kept": Way(settings=PACE), "written": Way(keep=False, settings=PACE)})


def test_the_base_still_knows_what_was_deleted_exactly(found: dict[str, Any]) -> None:
    assert found["request_probed"]["num_known"] == TINY.per_person
    assert found["without_patch"]["forgotten"]["base_known"] == TINY.per_person
    assert found["without_patch"]["forgotten"]["base_probability"] > 0.9


@pytest.mark.parametrize("way", ["kept", "written"])
def test_with_a_patch_it_is_not_known_any_more(found: dict[str, Any], way: str) -> None:
    before, after = found["without_patch"]["forgotten"], found["patches"][way]["forgotten"]
    assert after["base_known"] == 0
    assert after["base_probability"] < 0.2
    assert after["served"]["probability"] < 0.5 * before["served"]["probability"]


def test_whoever_is_in_the_retain_set_stays_known(found: dict[str, Any]) -> None:
    before, after = (each["others"] for each in (found["without_patch"], found["patches"]["kept"]))
    assert after["base_known"] >= KEPT * before["base_known"] > 0
    assert after["base_probability"] >= KEPT * before["base_probability"]
    assert after["served"]["probability"] >= SERVED * before["served"]["probability"]
    assert found["patches"]["kept"]["composition"]["shards"]["agreement"] >= AGREEING


@pytest.mark.usefixtures("found")
def test_the_shards_are_exact_beneath_a_patch(ground: Ground) -> None:
    assert sisa.open_model(ground.model, executor="serial").verify(replay="all").ok


@pytest.mark.parametrize("mode", sequential.MODES)
def test_two_erasures_one_after_another(ground: Ground, tmp_path: Path, mode: str) -> None:
    again = ground.beside(tmp_path, patch_mode=mode)
    rows = list(sequential.run(again, Way(settings=PACE), (1, 2)))
    assert [row["known"] for row in rows] == [0, 0]
    assert rows[-1]["num_beneath"] == (1 if mode == "sequential" else 0)
    assert all(row["forget_probability"] < 0.2 for row in rows)
    assert all(row["kept_probability"] > 0.8 for row in rows)
