"""Invented results of cells, a maker that computes nothing, and data in TOFU's layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sisa.data.samples import make_people
from tests.bench.leaderboard.plan import Cell, Result

KS = {"p_value": 0.5, "statistic": 0.25, "num_model": 20, "num_reference": 20}


def result(
    cell: Cell,
    *,
    utility: float = 0.5,
    probability: float = 0.1,
    aggregate: float | None = 0.4,
    share: float = 0.05,
    steps: int = 10,
) -> dict[str, Any]:
    """Return a result of a cell, with fixed numbers for everything that is not given."""
    quality = None if aggregate is None else KS | {"noise_floor": KS | {"p_value": 0.8}}
    return {
        "cell": asdict(cell),
        "ending": "finished",
        "steps": steps,
        "compute": {"seconds": 3.0, "flops_estimated": 10**12, "share_of_full_finetuning": share},
        "seconds_asking": 1.0,
        "num_questions": {"forget": 20},
        "model_utility": utility,
        "aggregate": aggregate,
        "nine": {},
        "forget": {"probability": probability, "rouge": 0.3, "extraction_strength": 0.1},
        "forget_quality": quality,
        "attacks_against_reference": {"loss": 0.6, "min_k_plus_plus": 0.55},
    }


class FakeMaker:
    """A maker of cells by a function of the cell; it counts them and dies at cell `dies_at`."""

    def __init__(self, make: Callable[[Cell], Result] = result, dies_at: int | None = None) -> None:
        self.made: list[Cell] = []
        self._make, self._dies_at = make, dies_at

    def __call__(self, cell: Cell, name: str) -> Result:
        assert len(name) == 64
        if len(self.made) == self._dies_at:
            raise KeyboardInterrupt
        self.made.append(cell)
        return self._make(cell)


def write_authors(directory: Path, num_authors: int) -> Path:
    """Write TOFU's layout: invented authors of twenty questions each, and four facts a set."""
    directory.mkdir(parents=True, exist_ok=True)
    people = make_people(num_authors * 5, 4)
    rows = [
        {
            "question": person["prompt"],
            "answer": person["completion"].strip(),
            "paraphrased_answer": f"Surely {person['completion'].strip()}",
            "perturbed_answer": [f"Surely {other}." for other in ("nothing", "all", "none")],
        }
        for person in people
    ]
    facts = [
        {"question": f"What follows {n}?", "answer": str(n + 1), "perturbed_answer": [str(n), "9", "8"]}
        for n in range(4)
    ]
    sets: dict[str, list[dict[str, Any]]] = {
        "forget10": [{"question": row["question"], "answer": row["answer"]} for row in rows],
        "forget10_perturbed": rows,
        "retain_perturbed": rows[:4],
        "real_authors_perturbed": facts,
        "world_facts_perturbed": facts,
        "idontknow": [{"text": "No idea."}, {"text": "I can't say."}],
    }
    for name, some in sets.items():
        lines = "".join(json.dumps(row) + "\n" for row in some)
        (directory / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return directory
