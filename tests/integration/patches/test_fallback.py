"""The fallback end to end, by commands, on a tiny base that knows ten people.

An exact deletion leaves what the base itself knew. A patch removes it from the base and leaves the nine
others. `tests/bench/patches/fallback.py` does the same on a real base, with numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import sisa
from tests.bench.patches import fallback, sequential
from tests.bench.patches.known_people import TINY, Ground, Way
from tests.models.tiny_base import make_tiny_base

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.xdist_group("fallback")]
PACE = {  # one round, to its end
    **{"learning_rate": 1e-3, "num_epochs": 120, "max_steps": None, "num_rounds": 1},
    **{"max_utility_drop": None, "target_probability": 0.0},
}
SHORT = {**PACE, "num_epochs": 70}  # enough where nothing is asked of those who are kept
FAST = {**PACE, "learning_rate": 2e-3, "num_epochs": 60}  # fewer of those who are kept stay known
KEPT = 0.9  # share of the others' records and of their probability that must outlast a patch
# Of what is served over it: their probability, and tokens on which shards still agree. Shards were
# trained over the base without it, and the shares vary with the processor's bits.
SERVED, AGREEING = 0.75, 0.8


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    folder = tmp_path_factory.mktemp("fallback")
    return Ground.laid(folder, make_tiny_base(folder / "base", hidden=96), TINY)


@dataclass(frozen=True)
class Erased:
    """A model from which one person was deleted whom the base knows, for tests to copy."""

    ground: Ground
    request: dict[str, Any]


@pytest.fixture(scope="module")
def erased(ground: Ground, tmp_path_factory: pytest.TempPathFactory) -> Erased:
    copy = ground.copied(tmp_path_factory.mktemp("erased"))
    return Erased(copy, fallback.erase(copy, fallback.FORGOTTEN))


@dataclass(frozen=True)
class Patched:
    """The model after a patch, for tests to copy, and what was measured on the way."""

    ground: Ground
    found: dict[str, Any]

    @classmethod
    def by(cls, erased: Erased, folder: Path, name: str, way: Way, **settings: Any) -> Patched:
        ground = erased.ground.copied(folder, **settings)
        return cls(ground, fallback.run(ground, erased.request, {name: way}))


@pytest.fixture(scope="module")
def kept(erased: Erased, tmp_path_factory: pytest.TempPathFactory) -> Patched:
    """Return a patch that keeps the others' records; its text stays in the vault for a joint one."""
    folder = tmp_path_factory.mktemp("kept")
    return Patched.by(erased, folder, "kept", Way(settings=PACE), patch_mode="joint")


def test_the_base_still_knows_what_was_deleted_exactly(kept: Patched) -> None:
    assert kept.found["request_probed"]["num_known"] == TINY.per_person
    before = kept.found["without_patch"]["forgotten"]
    assert before["base_known"] == TINY.per_person
    assert before["base_probability"] > 0.9


def test_with_a_patch_it_is_not_known_any_more(kept: Patched) -> None:
    found = kept.found
    before, after = found["without_patch"]["forgotten"], found["patches"]["kept"]["forgotten"]
    assert after["base_known"] == 0
    assert after["base_probability"] < 0.2
    assert after["served"]["probability"] < 0.5 * before["served"]["probability"]


def test_whoever_is_in_the_retain_set_stays_known(kept: Patched) -> None:
    patch = kept.found["patches"]["kept"]
    before, after = kept.found["without_patch"]["others"], patch["others"]
    assert after["base_known"] >= KEPT * before["base_known"] > 0
    assert after["base_probability"] >= KEPT * before["base_probability"]
    assert after["served"]["probability"] >= SERVED * before["served"]["probability"]
    assert patch["composition"]["shards"]["agreement"] >= AGREEING


def test_the_defaults_search_until_nothing_is_known(erased: Erased, tmp_path: Path) -> None:
    """Within a bound that leaves room for it: a tiny base has one set of weights for all it says."""
    again = erased.ground.copied(tmp_path)
    others = [each for each in again.known if each != fallback.FORGOTTEN]
    way = Way(settings={"max_utility_drop": 0.4})
    done = again.unlearn(way, others, requests=[erased.request["request_id"]])
    report = done["report"]
    assert report["still_known"] == {"before": 2, "after": 0, "of": 2}
    assert report["outcome"] == "forgotten"
    assert done["sets_kept"] > 0  # a retain set of the model's records keeps both
    assert report["utility"] >= report["utility_before"] - 0.4
    assert report["sets"]["num_neighbours"] > 0
    assert again.probed(fallback.FORGOTTEN)["num_known"] == 0


def test_a_bound_that_leaves_no_room_is_told_and_the_text_stays(erased: Erased, tmp_path: Path) -> None:
    again = erased.ground.copied(tmp_path)
    requests = [erased.request["request_id"]]
    tight = Way("gradient_ascent", keep=False, settings={"max_utility_drop": 0.0, "num_rounds": 2})
    done = again.unlearn(tight, [], requests=requests)
    assert (done["report"]["outcome"], done["sets_erased"]) == ("held back by the bound", 0)
    assert done["report"]["still_known"]["after"] > 0
    (held,) = again.sisa("approx", "patches")["vault"]
    assert held["held"]
    done = again.unlearn(Way(keep=False, settings=SHORT), [], requests=requests)
    assert (done["report"]["outcome"], done["sets_erased"]) == ("forgotten", 1)


def test_the_shards_are_exact_beneath_a_patch(kept: Patched) -> None:
    assert sisa.open_model(kept.ground.model, executor="serial").verify(replay="all", apart=False).ok


def test_a_second_erasure_makes_one_patch_of_both(kept: Patched, tmp_path: Path) -> None:
    """`test_patch_making.py` makes a patch upon another one."""
    mode = sequential.MODES["joint"]
    again = kept.ground.copied(tmp_path, patch_mode=mode.patch_mode)
    (row,) = sequential.run(again, mode, Way(settings=FAST), (2,), done_before=1)
    assert row["known"] == 0
    assert row["forget_probability"] < 0.2
    assert row["num_beneath"] == 0
    assert row["kept_probability"] > 0.8
