"""The fallback end to end: deleted exactly, still known to the base, then forgotten by a patch.

    python -m tests.bench.patches.fallback --out fallback.json

A base knows ten invented people by heart (`known_people.py`), and shards over it are trained on them
and on others. One of the ten asks to be forgotten and consents to a patch: after `sisa request submit`
and `sisa run` the base alone still produces the answers. `sisa approx unlearn` then makes a patch for
each kind of retain set: the base's own answers to neutral prompts, or, by a second consent, the records
of the nine others. `sisa approx revert` removes a patch before the next one.

There is no pass or fail here; `tests/integration/patches/test_fallback.py` asserts the laws on a tiny
base. The criterion for known texts was fixed before the first run (`approx/evaluation/probe.py`).
Several people are covered by `sequential.py`.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sisa.lm.base.weights import resolve_base
from tests.bench.command import BASE, arguments, here, write
from tests.bench.patches.known_people import CONSENT, Ground, Scale, Way

FORGOTTEN = "p001"


BENCH = {
    "written by the base": Way(keep=False),
    "records of the others": Way(),
}


def erase(ground: Ground, subject: str) -> dict[str, Any]:
    """Submit a request with consent and run it; return the request as the ledger keeps it."""
    who = ("--subject", subject, "--approver", "dpo", "--consent", CONSENT)
    submitted = ground.sisa("request", "submit", *who)
    done = ground.sisa("run", "--executor", "serial")["requests"]
    (found,) = [each for each in done if each["request_id"] == submitted["request_id"]]
    return dict(found)


def measured(ground: Ground) -> dict[str, Any]:
    """Return what the base alone and the served model say of the one and of the nine others."""
    asked, found = ground.asked(), {}
    for name, people in (("forgotten", ground.known[:1]), ("others", ground.known[1:])):
        rows, probed = ground.rows(*people), ground.probed(*people)
        found[name] = {
            "base_known": probed["num_known"],
            "base_probed": probed["num_probed"],
            "base_continuation": probed["continuation"],
            "base_extraction_strength": probed["extraction_strength"],
            "base_probability": round(asked.base(rows), 4),
            "served": asked.served(rows).to_json(),
        }
    return {**found, "neutral_utility": round(asked.neutral(), 4)}


def run(ground: Ground, request: Mapping[str, Any], ways: Mapping[str, Way]) -> dict[str, Any]:
    """Make a patch in each way for the person whom a request erased.

    The first patch is made from the vault's text, which is then erased, and the others from text given
    again.
    """
    others = [each for each in ground.known if each != FORGOTTEN]
    before = measured(ground)
    found = {}
    for number, (name, way) in enumerate(ways.items()):
        started = time.monotonic()
        if number == 0:
            made = ground.unlearn(way, others, requests=[request["request_id"]])
        else:
            ground.sisa("approx", "revert")
            made = ground.unlearn(way, others, forget=[FORGOTTEN])
        report = made["report"]
        found[name] = {
            **way.to_json(),
            "seconds": round(time.monotonic() - started, 1),
            **{key: report.get(key) for key in ("ending", "step", "sets", "composition")},
            **measured(ground),
        }
    return {
        "taught": dict(ground.taught),
        "request_probed": request["probed"],
        "without_patch": before,
        "patches": found,
    }


def main() -> None:
    """Run the command."""
    given = arguments(__doc__, out=Path("fallback.json"), base_model=BASE)
    with tempfile.TemporaryDirectory() as folder:
        ground = Ground.laid(Path(folder), resolve_base(given.base_model).directory, Scale())
        found = {**here(given.base_model), **run(ground, erase(ground, FORGOTTEN), BENCH)}
    write(given.out, found)
    for name, each in {"no patch": found["without_patch"], **found["patches"]}.items():
        print(f"{name}: {each['forgotten']}, others {each['others']}")


if __name__ == "__main__":
    main()
