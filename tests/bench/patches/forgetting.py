"""Whether a patch made with the defaults forgets: counts for methods and retain sets, on one base.

    python -m tests.bench.patches.forgetting --tiny --out tests/bench/patches/forgetting_tiny.json
    python -m tests.bench.patches.forgetting --data data --people-of rwku --people 5 \\
        --retain written --out tests/bench/patches/forgetting_rwku.json

A search for a method's defaults adds `--method simnpo --set forget_weight=1` and a file of its own.

A base is fine-tuned in full to know some people by heart: invented ones, TOFU's authors or RWKU's
people. A patch with the defaults of `sisa approx unlearn` should remove one of them: rounds end when the
probe knows none of the records and their probability has halved, or when the bound on utility stops
them. The result has the report and what the base then knows of the others, who are in the retain set
`given` and not in `written`. It is written after every patch, and the same command continues it, on
another machine, too; several commands with other methods or settings may fill one file.

There is no pass or fail here; `tests/integration/patches/test_fallback.py` asserts the laws on a tiny
base.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from approx.evaluation.probe import BaseProbe
from approx.methods.registry import METHODS
from approx.patches.patch_settings import PROCEDURE, Adapter, settings_of
from cluster.cli.patches import assignments
from sisa.core.domain import Record
from sisa.data.samples import make_people
from sisa.flows.wiring.progress import progress
from tests.bench.answering import routing
from tests.bench.command import BASE, arguments, here, markdown, read, write
from tests.bench.patches.known_people import SET, TINY, Scale, base_dir, method_in_words
from tests.models.knowing_base import record, teach
from tests.models.patch_bench import Bench

RETAIN = ("written", "given")
PEOPLE_OF = {"tofu": routing.tofu, "rwku": routing.rwku}
SEQUENCE_LEN = 256  # no record is longer
REPORTED = (
    *("outcome", "still_known", "ending", "why", "step", "num_steps", "learning_rate_kept", "alpha"),
    *("utility_before", "utility", "sets", "metrics_before", "metrics_after", "robustness"),
)


def forget(
    folder: Path,
    base: Path,
    people: Sequence[Record],
    method: str,
    retain: str,
    adapter: Adapter,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Forget the first of some people, and return the outcome for them and for the others."""
    bench = Bench(folder, base)
    gone = [each for each in people if each.subject_id == people[0].subject_id]
    others = [each for each in people if each not in gone]
    asked = settings_of(method, settings, adapter, seed=3, sequence_len=SEQUENCE_LEN)
    with progress() as shown:
        made = bench.maker.make(bench.order(asked, gone, others if retain == "given" else None), shown)
    patches = [] if made.saved is None else [bench.files(made)]
    known = {
        name: BaseProbe(bench.site.base, 1, SEQUENCE_LEN, stack)(others)
        for name, stack in (("before", ()), ("after", patches))
    }
    cost = made.report["compute"]
    return {
        "method": method,
        "retain": retain,
        "settings": dict(settings),
        **{name: made.report[name] for name in REPORTED},
        "flops_estimated": cost["flops_estimated"],
        "seconds": round(cost["seconds"], 1),
        "others_known": {name: each.num_known for name, each in known.items()},
        "others_probed": known["before"].num_probed,
        "others_strength": {name: each.extraction_strength for name, each in known.items()},
    }


def rows_of(given: argparse.Namespace, per_person: int) -> list[dict[str, str]]:
    """Return the first questions about the first people of a data set, or about invented ones."""
    if given.data is None:
        return make_people(given.people, per_person)
    by_person: dict[int, list[routing.Asked]] = {}
    for each in PEOPLE_OF[given.people_of](given.data):
        by_person.setdefault(each.subject, []).append(each)
    return [
        {
            "id": f"p{person}-q{number}",
            "subject_id": f"p{person}",
            "prompt": each.question,
            "completion": f" {each.answer}",
        }
        for person in range(given.people)
        for number, each in enumerate(by_person[person][:per_person])
    ]


def run(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Teach a base, make the patches that the result lacks, and write it after each of them."""
    settings = assignments(given.set or ())
    scale, adapter = (TINY, Adapter(4, 8)) if given.tiny else (Scale(), Adapter())
    people = list(map(record, rows_of(given, scale.per_person)))
    knowing, base = folder / "knowing", base_dir(given.tiny, given.base_model, folder)
    taught = teach(base, people, to=knowing, steps=scale.steps, learning_rate=scale.learning_rate)
    print("taught", taught, flush=True)
    design = {"base_model": "tiny" if given.tiny else given.base_model, "people": given.people}
    design |= {"people_of": given.people_of if given.data else "invented", "procedure": PROCEDURE}

    def rows() -> list[Any]:
        return list(read(given.out, design).get("rows", []))

    for method, retain in product(given.method or sorted(METHODS), given.retain or RETAIN):
        made = {"method": method, "retain": retain, "settings": settings}
        if not any(made.items() <= row.items() for row in rows()):
            place = folder / f"{method}-{retain}"
            row = forget(place, knowing, people, method, retain, adapter, settings)
            write(given.out, {**design, "rows": [*rows(), {**row, **here(), "taught": taught}]})
            print(method, retain, row["outcome"], row["still_known"], flush=True)
    return {**design, "rows": rows()}


def _relearnt(row: Mapping[str, Any]) -> float:
    """Return the probability of what was forgotten after three steps of training on it.

    Where no patch was made, it is that of the base.
    """
    if row["robustness"] is None:
        return float(row["metrics_before"]["forget_probability"])
    return float(row["robustness"]["relearning"]["3"])


def _cell(row: Mapping[str, Any]) -> str:
    if row["robustness"] is None:
        return "no patch"
    known, others = row["still_known"], row["others_known"]
    probability = row["metrics_after"]["forget_probability"]
    left = f"{known['after']} of {known['before']}; {probability:.2f}, {_relearnt(row):.2f}"
    left = f"**{left}**" if row["outcome"] == "forgotten" else left
    return f"{left}; {others['after']} of {others['before']}"


def table(*of_bases: Mapping[str, Any]) -> Iterator[str]:
    """Yield what patches leave: a row per method and its settings, a column per base and retain set.

    The method of which least comes back, in the mean over the columns that all have, stands first.
    """
    rows: dict[str, dict[str, Mapping[str, Any]]] = {}
    columns: dict[str, None] = {}
    for found in of_bases:
        base = "tiny base" if found["base_model"] == "tiny" else "SmolLM2-135M"
        for row in found["rows"]:
            column = f"{base}, {found['people_of']}, {row['retain']}"
            rows.setdefault(method_in_words(row["method"], row["settings"]), {})[column] = row
            columns[column] = None
    shared = [each for each in columns if all(each in of for of in rows.values())]

    def comes_back(of: Mapping[str, Mapping[str, Any]]) -> float:
        return fmean(_relearnt(of[each]) for each in shared or of)

    lines = [
        (method, *(_cell(of[each]) if each in of else "-" for each in columns))
        for method, of in sorted(rows.items(), key=lambda each: comes_back(each[1]))
    ]
    yield from markdown(("method", *columns), lines)


def main() -> None:
    given = arguments(
        __doc__,
        out=Path("forgetting.json"),
        base_model=BASE,
        tiny={"action": "store_true"},
        method={"action": "append"},
        retain={"action": "append", "choices": RETAIN},
        data={"type": Path, "help": "a directory with tofu/ and rwku/; without it, people are invented"},
        people_of={"choices": list(PEOPLE_OF), "default": "tofu", "help": "of --data"},
        people=10,
        set=SET,
    )
    with tempfile.TemporaryDirectory() as folder:
        print("\n".join(table(run(given, Path(folder)))))


if __name__ == "__main__":
    main()
