"""Run all long checks in full, one after another, each with its table of states and its JSON.

    python -m tests.endurance.full_run --out tests/endurance

200 kills of a plain model and 200 of an encrypted one, 500 requests of the soak, 10,000 inputs of the
fuzz: about twenty minutes on two cores. `--share 0.01` runs a hundredth of each. The exit status is 1 if
any check failed; a failure does not stop the other checks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.endurance import fuzz, kills, soak

Check = tuple[str, Callable[[Sequence[str]], int], tuple[str, ...], int]
CHECKS: tuple[Check, ...] = (
    ("kills", kills.main, ("--kills",), 200),
    ("kills_encrypted", kills.main, ("--encrypt", "--kills"), 200),
    ("soak", soak.main, ("--requests",), 500),
    ("fuzz", fuzz.main, ("--workers", "2", "--inputs"), 10_000),
)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="tests.endurance.full_run")
    parser.add_argument("--out", type=Path, default=Path("tests/endurance"))
    parser.add_argument("--share", type=float, default=1.0, help="of the full numbers")
    chosen = parser.parse_args(arguments)
    chosen.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for name, check, options, number in CHECKS:
        print(f"== {name}", flush=True)
        count = str(max(1, round(number * chosen.share)))
        if check([*options, count, "--out", str(chosen.out / f"{name}.json")]):
            failed.append(name)
    print("all held" if not failed else f"FAILED: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
