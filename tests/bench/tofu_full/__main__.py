"""All of TOFU: exact deletion beside an ordinary LoRA, its references and approximate methods.

    python -m tests.bench.tofu_full --tofu DIRECTORY --out DIR
    python -m tests.bench.tofu_full --tofu locuslab/TOFU --out DIR --device cuda \\
        --base meta-llama/Llama-3.2-1B-Instruct --lora-layers all

`--authors 20` takes TOFU's last twenty authors for all there are, and `--methods all` every method.
Cells are computed one after another, the most important ones first, and kept in DIR; the same command
goes on where it was stopped. `--cells PATTERN` computes some of them, with what they need, `--list`
prints their names, and `--assemble` computes none. Several processes may run the command in one DIR, one
a core. The table, the JSON and the plot of what has been finished are written to DIR, and to `--results
PATH.json` with the plot and all cells beside it (PATH.cells.json.gz: numbers, no text). With the same
`--results` another machine goes on from those cells, and makes again only the models that it needs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from approx.methods.registry import METHODS
from sisa.config.config import MINILM
from sisa.core.errors import Busy
from sisa.lm.base.numerics import pin_threads
from sisa.lm.base.weights import resolve_base
from sisa.store.blobs.files import disk_errors
from tests.bench.command import BASE, here, write
from tests.bench.tofu_full.base import FrozenBase
from tests.bench.tofu_full.cells import Cells
from tests.bench.tofu_full.design import QUESTIONS_EACH, Design, Layout, cell_names, read_data
from tests.bench.tofu_full.measuring import compute
from tests.bench.tofu_full.models import Models
from tests.bench.tofu_full.table import assembled, draw, nine_table, table

WAIT_S = 10.0


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.tofu_full",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tofu", required=True, help="directory of TOFU's files, or a hub name")
    parser.add_argument("--out", required=True, type=Path, help="directory of cells, models and logs")
    parser.add_argument("--base", default=BASE)
    parser.add_argument("--embedder", default=MINILM)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shards", help="numbers of shards, such as 50,16")
    parser.add_argument("--key-seeds", dest="keys", type=int, help="number of partition keys")
    parser.add_argument("--cells", nargs="+", default=["*"], metavar="PATTERN")
    parser.add_argument("--list", action="store_true", help="print the names of cells")
    parser.add_argument("--assemble", action="store_true", help="compute no cell")
    parser.add_argument("--results", type=Path, help="the JSON of results; plot and cells beside it")
    for each in fields(Design):
        if each.name != "keys" and isinstance(each.default, int | float | str):
            option = "--" + each.name.replace("_", "-")
            parser.add_argument(option, type=type(each.default), help=f"default: {each.default}")
        elif isinstance(each.default, tuple) and not isinstance(each.default[0], Layout):
            of = type(each.default[0])
            option = "--" + each.name.replace("_", "-")
            parser.add_argument(option, type=of, nargs="+", help=f"default: {each.default}")
    return parser


def design_of(chosen: argparse.Namespace) -> Design:
    """Return the design with what was chosen."""
    given: dict[str, Any] = {}
    for each in fields(Design):
        value = getattr(chosen, each.name, None)
        if value is not None:
            given[each.name] = tuple(value) if isinstance(value, list) else value
    if given.get("methods") == ("all",):
        given["methods"] = tuple(METHODS)
    design = Design(**given)
    if chosen.shards:
        numbers, records = map(int, chosen.shards.split(",")), design.authors * QUESTIONS_EACH
        design = replace(design, layouts=tuple(Layout.of(n, records) for n in numbers))
    return design


def compute_all(models: Models, names: Sequence[str]) -> None:
    """Compute cells in their order; come back to those that another process holds."""
    while names:
        left = list(names)
        for name in names:
            with suppress(Busy):
                compute(models, name)
                left.remove(name)
        if left == names:
            time.sleep(WAIT_S)
        names = left


def models_of(chosen: argparse.Namespace) -> Models:
    """Open the directory of cells, and the base, with what was chosen."""
    design = design_of(chosen)
    data = read_data(chosen.tofu, design)
    pin_threads(1)
    with disk_errors(chosen.out):
        chosen.out.mkdir(parents=True, exist_ok=True)
    base = FrozenBase(resolve_base(chosen.base), design, chosen.out / "states", chosen.device)
    named = {"embedder": chosen.embedder, "device": chosen.device}
    inputs = {"base": base.digest, "data": data.digest, **named}
    cells = Cells(chosen.out, design, data, inputs, partial(print, file=sys.stderr, flush=True))
    return Models(cells, base, chosen.base, chosen.embedder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    chosen = argument_parser().parse_args(arguments)
    names = [
        each
        for each in cell_names(design_of(chosen))
        if any(fnmatch(each, pattern) for pattern in chosen.cells)
    ]
    if chosen.list:
        print("\n".join(names))
        return
    models = models_of(chosen)
    cells = models.cells
    travelling = chosen.results and chosen.results.with_suffix(".cells.json.gz")
    if travelling and travelling.exists():
        cells.take_over(travelling.read_bytes(), str(travelling))
    if not chosen.assemble:
        compute_all(models, names)
    found = {**here(chosen.base), **assembled(cells)}
    for path in filter(None, (chosen.out / "tofu_full.json", chosen.results)):
        write(path, found, indent=1)
        if found["rows"]:
            draw(found, path.with_suffix(".png"))
    if travelling:
        travelling.write_bytes(cells.packed())
    for lines in (table(found), nine_table(found)):
        print("\n".join(lines), end="\n\n")


if __name__ == "__main__":
    main()
