"""Many erasures, one after another: what the base, its patches and the shards say after each.

    python -m tests.bench.patches.sequential --out tests/bench/patches/sequential.json
    python -m tests.bench.patches.sequential --tiny --out tests/bench/patches/sequential.json

The base knows invented people (`known_people.py`). One after another they ask to be forgotten and are
deleted exactly. If the base still knows a text, a patch is made from the vault:

    sequential   each patch on top of those before; retained are the records of those who are kept
    joint        one patch for the texts of all again, from the untouched base; the same retain set
    written      each patch on top of those before; the base writes the retain set
    retrained    the same, and shards are retrained over the patches once they have drifted by MAX_DRIFT

A joint patch does not depend on those before it, so it is made after some requests only. A retain set of
held records would tie every shard to them, so that shards can't be trained over such patches.

Patches have the command's defaults. Reported are the probability of the answers of all who were
forgotten so far and of those still kept, under the base as it is served and under the served model;
utility on neutral text; patches, slices retrained, seconds. There is no pass or fail. All modes start
from the same base and the same bytes of shards.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from tests.bench.command import BASE, arguments, here, markdown, read, write
from tests.bench.patches.fallback import erase
from tests.bench.patches.known_people import TINY, Ground, Scale, Way, base_dir

MAX_DRIFT = 0.1
SHOWN = (1, 2, 5, 9, 10, 15, 19)  # requests after which a row is in the table


@dataclass(frozen=True)
class Mode:
    """A way to answer many requests: the run file's `patch_mode` and the way to make a patch."""

    patch_mode: str = "sequential"
    keep: bool = False
    max_drift: float | None = None

    def after(self, num_requests: int) -> Sequence[int]:
        """Return the numbers of requests after which there is a patch."""
        every = range(1, num_requests + 1)
        return [n for n in every if self.patch_mode == "sequential" or n in (1, 2, 5, 10, 20)]


MODES = {
    "sequential": Mode(keep=True),
    "joint": Mode("joint", keep=True),
    "written": Mode(),
    "retrained": Mode(max_drift=MAX_DRIFT),
}
SCALE = Scale(per_person=2, epochs=2)


def run(ground: Ground, mode: Mode, after: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Forget people one after another; yield a row after some requests."""
    for first, upto in pairwise((0, *after)):
        requests = [erase(ground, subject) for subject in ground.known[first:upto]]
        kept = ground.known[upto:]
        knew = [each["request_id"] for each in requests if each["probed"]["num_known"]]
        started, done = time.monotonic(), {}
        if knew:
            way = Way(keep=mode.keep and bool(kept), max_drift=mode.max_drift)
            done = ground.unlearn(way, kept, requests=knew)
        report = done.get("report", {})
        composition = report.get("composition", {}).get("shards") or {}
        yield {
            "forgotten": upto,
            "known_before": fmean(each["probed"]["num_known"] for each in requests),
            **standing(ground, ground.known[:upto], kept),
            "seconds": round(time.monotonic() - started, 1),
            **{name: report.get(name) for name in ("step", "ending", "num_beneath")},
            "shards": {key: composition.get(key) for key in ("agreement", "kl")},
            "drift": done.get("drift"),
            "slices_trained": done.get("slices_trained", 0),
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


def table(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield a Markdown table: what is known after some of the requests, by base and mode."""
    lines = []
    for name, of in found.items():
        base = "SmolLM2-135M" if "smollm2" in name else name
        for mode, rows in of["modes"].items():
            for at, row in enumerate(rows):
                if row["forgotten"] not in SHOWN or row["kept_served"] is None:
                    continue
                patches = sum(each["step"] is not None for each in rows[: at + 1])
                cells = (
                    f"{base}, {mode}",
                    row["forgotten"],
                    patches,
                    row["known"],
                    f"{row['forget_probability']:.2f}",
                    f"{row['kept_probability']:.2f}",
                    f"{row['kept_served']['probability']:.2f}",
                    f"{row['neutral_utility']:.4f}",
                )
                lines.append(cells)
    header = ("base, mode", "requests", "patches", "answers still known", "their probability")
    yield from markdown((*header, "kept: base alone", "kept: as served", "utility, neutral text"), lines)


def main() -> None:
    given = arguments(
        __doc__,
        out=Path("sequential.json"),
        base_model=BASE,
        tiny={"action": "store_true", "help": "a tiny base, whose utility means little"},
        people={"type": int, "default": 20, "help": "that the base knows"},
        modes={"nargs": "+", "choices": MODES, "default": list(MODES)},
    )
    with tempfile.TemporaryDirectory() as folder:
        root, name = Path(folder), "tiny base" if given.tiny else given.base_model
        base = base_dir(given.tiny, given.base_model, root)
        scale = replace(TINY if given.tiny else SCALE, num_known=given.people)
        ground = Ground.laid(root, base, scale)  # measure its own model first
        found = {**here(name), "taught": dict(ground.taught)}
        found["before"] = standing(ground, ground.known, [])
        whole = read(given.out)
        found["modes"] = whole.get(name, {}).get("modes", {})
        for mode in given.modes:
            (root / mode).mkdir()
            found["modes"][mode] = rows = []
            beside = ground.beside(root / mode, patch_mode=MODES[mode].patch_mode)
            for row in run(beside, MODES[mode], MODES[mode].after(scale.num_known)):
                rows.append(row)
                write(given.out, {**whole, name: found})
    print("\n".join(table({name: found})))


if __name__ == "__main__":
    main()
