"""The recorded leaderboard: rows and verdicts follow from its cells; it holds no text and no path."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from approx.leaderboard_claims import claims
from approx.leaderboard_plan import Cell, Design
from approx.leaderboard_table import Results, to_json

RECORDED = Path(__file__).with_name("leaderboard.json")
LONGEST_WORDS = 200  # of a claim; answers to TOFU's questions are not among the words


def recorded() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RECORDED.read_text(encoding="utf-8"))
    return found


def plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def test_rows_and_verdicts_follow_from_the_cells() -> None:
    body = recorded()
    results: Results = [(Cell(**each["cell"]), each) for each in body["cells"]]
    lists = ("sizes", "size_methods", "methods", "seeds")
    shape: dict[str, Any] = body["design"] | {name: tuple(body["design"][name]) for name in lists}
    design = Design(**shape)
    again = to_json(results, design, body["inputs"])
    assert plain(again) == {name: body[name] for name in again}
    assert plain([asdict(each) for each in claims(results)]) == body["claims"]


def test_every_method_was_run_under_every_seed_at_equal_cost() -> None:
    body = recorded()
    runs = [each for each in body["cells"] if each["cell"]["kind"] == "run"]
    seeds = {(each["cell"]["method"], each["cell"]["seed"]) for each in runs}
    assert len(seeds) == len(runs) == len(body["design"]["methods"]) * len(body["design"]["seeds"])
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
