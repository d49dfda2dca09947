"""The recorded leaderboard: rows follow from its cells; it holds no text and no path."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.bench.leaderboard.plan import SETTINGS, Cell, Design
from tests.bench.leaderboard.table import Results, to_json

RECORDED = Path(__file__).with_name("leaderboard.json")
LONGEST_WORDS = 100  # of a note; answers to TOFU's questions are not among the words


def recorded() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RECORDED.read_text(encoding="utf-8"))
    return found


def plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def test_rows_follow_from_the_cells() -> None:
    body = recorded()
    results: Results = [(Cell(**each["cell"]), each) for each in body["cells"]]
    lists = ("sizes", "size_methods", "methods", "seeds")
    shape: dict[str, Any] = body["design"] | {name: tuple(body["design"][name]) for name in lists}
    design = Design(**shape)
    again = to_json(results, design, body["inputs"])
    assert plain(again) == {name: body[name] for name in again}


def test_every_setting_was_run_at_equal_cost() -> None:
    body = recorded()
    runs = [each for each in body["cells"] if each["cell"]["kind"] == "run"]
    found = {tuple(each["cell"][name] for name in ("method", "learning_rate", "alpha")) for each in runs}
    settings = {
        (name, each.learning_rate, each.alpha) for name, some in SETTINGS.items() for each in some
    }
    assert found == settings
    assert {each["cell"]["seed"] for each in runs} == set(body["design"]["seeds"])
    shares = [each["compute"]["share_of_full_finetuning"] for each in runs]
    assert all(abs(share / body["design"]["budget_share"] - 1) < 0.1 for share in shares)


def texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from texts(each)


def test_numbers_alone() -> None:
    for each in texts(recorded()):
        assert len(each) <= LONGEST_WORDS
        assert not each.startswith(("/", "~", "."))
