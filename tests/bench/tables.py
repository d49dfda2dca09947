"""Write the tables of the READMEs: what was measured, the keys of the run file, the methods.

    python -m tests.bench.tables            # write every table anew
    python -m tests.bench.tables --check    # name the tables that differ; exit code 1

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`. A measured one is
made by its benchmark's module, from the JSON beside it.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_jsonable_python

from sisa.config.config import (
    PATH_FIELDS,
    Aggregation,
    EngineSource,
    OpenDsrBlock,
    RunConfig,
    Scratch,
    Tls,
    WebhookReceiver,
    json_schema,
    keys,
)
from sisa.config.runfile import in_words
from sisa.config.sources import DatasetSource
from sisa.config.template import one_line
from sisa.core.block import Block
from sisa.planning.bands import Bands
from tests.bench.answering import answers, cold, hostile, quality, routing, throughput, utility
from tests.bench.command import low_to_high, markdown
from tests.bench.deletion import forget, retrained
from tests.bench.patches import fallback, forgetting, sequential
from tests.bench.scale import fleet, membership, questions, rollback
from tests.bench.tofu_full import table as tofu_full
from tests.bench.training import executors, lanes, profile_step, race

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BLOCK = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end of table -->)", re.S)
# Keys of the run file whose value may be a block, and the prefix of its keys.
NESTED: dict[str, tuple[str, type[Block]]] = {
    "base_model": ("base_model.scratch", Scratch),
    "datasets": ("datasets[]", DatasetSource),
    "sisa.bands": ("sisa.bands", Bands),
    "sisa.aggregation": ("sisa.aggregation", Aggregation),
    "service.engines": ("service.engines[]", EngineSource),
    "service.webhooks": ("service.webhooks[]", WebhookReceiver),
    "service.opendsr": ("service.opendsr", OpenDsrBlock),
    "service.tls": ("service.tls", Tls),
}

Json = Any


def recorded(name: str) -> Json:
    """Return what `tests/bench/NAME.json` holds; NAME is `room/benchmark`."""
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))


def endured(name: str) -> Json:
    """Return what the last endurance run of a name recorded: `tests/endurance/NAME.json`."""
    return recorded(f"../endurance/{name}")


def reference() -> Iterator[str]:
    """Yield the table of all keys of the run file."""
    schema = json_schema()
    definitions = schema["$defs"]
    cells: list[tuple[str, ...]] = []
    for name, info in keys().items():
        *block, last = name.split(".")
        holder: Any = RunConfig.model_fields[block[0]].annotation if block else None
        within = definitions[holder.__name__] if block else schema
        extra: Any = info.json_schema_extra
        cells.append(_key(name, info, in_words(within["properties"][last]), extra["effect"]))
        prefix, nested = NESTED.get(name, ("", Block))
        for inner, field in nested.model_fields.items():
            kind = in_words(definitions[nested.__name__]["properties"][inner])
            moved = nested is Scratch and inner in PATH_FIELDS
            cells.append(_key(f"{prefix}.{inner}", field, kind, "none" if moved else extra["effect"]))
    yield from markdown(("key", "type", "default", "meaning", "a change"), cells)


def _key(name: str, info: FieldInfo, kind: str, effect: str) -> tuple[str, ...]:
    default = "(required)"
    if info.default is not PydanticUndefined:
        default = f"`{one_line(to_jsonable_python(info.default))}`"
    return f"`{name}`", kind, default, str(info.description), effect


def results() -> Iterator[str]:
    """Yield the front page's table of results."""
    shares = {
        (each["name"], each["shards"], each["slices"]): each["shares"]
        for each in recorded("deletion/retrained")["shares"]
    }
    alone = shares["sequential", 50, 8]["one"]["measured"]
    last = shares["bands: the labelled in the last 4 slices", 8, 8]["one_labelled"]["measured"]
    largest = recorded("scale/rollback")["sizes"][-1]
    ratios = recorded("training/race")["ratios"]
    kills, encrypted, soak = map(endured, ("kills", "kills_encrypted", "soak"))

    def faster(ours: str) -> str:
        rows = [row for row in ratios if row["ours"] == ours and row["theirs"] == "all"]
        return low_to_high([row["times_as_fast"] for row in rows], ".1f")

    lines = [
        (
            "one author of 200 deleted: share of a training",
            f"50x8: {alone:.3f}; 8x8: {last:.3f}, if likely requesters stand in the last slices",
            "bench.deletion.retrained",
        ),
        *((*each, "bench.tofu_full") for each in tofu_full.headlines(recorded("tofu_full/tofu_full"))),
        (*fallback.headline(recorded("patches/fallback")), "bench.patches.fallback"),
        (
            f"from a request to clean heads, {largest['records']:,} records",
            f"{largest['clean_heads_seconds']['p50']:.2f} s (p50)",
            "bench.scale.rollback",
        ),
        (
            "speed of training, beside Trainer and SFTTrainer with adapters in all layers",
            f"{faster('all')} times; with adapters in the top third, {faster('top 10')} times",
            "bench.training.race",
        ),
        (
            "failures after the process was killed",
            f"{sum(len(each['failures']) for each in (kills, encrypted, soak))}, of "
            f"{kills['kills'] + encrypted['kills']} kills, and of {soak['requests']} requests with "
            f"{soak['kills']} kills",
            "endurance.full_run",
        ),
    ]
    cells = [(what, result, f"`python -m tests.{module}`") for what, result, module in lines]
    yield from markdown(("what (50x8: 50 shards of 8 slices)", "result", "made by"), cells)


def endurance() -> Iterator[str]:
    """Yield the table of the last endurance runs."""
    names = ("kills", "kills_encrypted", "soak", "fuzz", "service", "nodes", "rollout")
    plain, encrypted, soak, fuzz, service, nodes, rollout = map(endured, names)
    answers = f"{service['answers']:,} answers"
    lines = [
        ("kills --kills 200", f"{plain['kills']} kills", len(plain["failures"])),
        ("kills --kills 200 --encrypt", f"{encrypted['kills']} kills", len(encrypted["failures"])),
        (
            "soak --requests 500",
            f"{soak['requests']} requests, {soak['kills']} kills",
            len(soak["failures"]),
        ),
        ("fuzz --inputs 10000 --workers 2", f"{fuzz['inputs']:,} inputs", len(fuzz["failures"])),
        (
            "service --minutes 10 --deletions 100",
            f"{service['deletions']} deletions, {answers}, {sum(service['kills'].values())} kills",
            len(service["failures"]),
        ),
        (
            "nodes --seconds 600",
            f"{nodes['rounds']} trainings, {sum(nodes['kills'].values())} kills of nodes and workers",
            len(nodes["failures"]),
        ),
        (
            "rollout --deletions 6",
            f"{rollout['deletions']} deletions: new heads on each node after "
            f"{rollout['seconds_to_clean_heads']['median']:.1f} s (median)",
            rollout["answers_by_former_heads"],
        ),
    ]
    cells = [(f"`python -m tests.endurance.{command}`", *rest) for command, *rest in lines]
    yield from markdown(("command", "its last run", "failures"), cells)


def of(name: str, table: Callable[[Json], Iterator[str]]) -> Callable[[], Iterator[str]]:
    """Return a table of what a benchmark recorded."""
    return lambda: table(recorded(name))


TABLES: dict[str, dict[str, Callable[[], Iterator[str]]]] = {
    "README.md": {"results": results},
    "tests/bench/answering/README.md": {
        "found-shards": of("answering/routing", routing.shard_table),
        "thresholds": of("answering/routing", routing.threshold_table),
        "forms": of("answering/routing", routing.form_table),
        **{
            f"hostile-{source}": of("answering/hostile", partial(hostile.table, source=source))
            for source in ("tofu", "rwku", "muse")
        },
        "hostile-general": of("answering/hostile", hostile.general_table),
        "quality": of("answering/quality", quality.table),
        "answering-speed": of("answering/answers", answers.table),
        "cold": of("answering/cold", cold.table),
        "throughput": of("answering/throughput", throughput.table),
        "utility": of("answering/utility", utility.table),
    },
    "tests/bench/deletion/README.md": {
        "forget": of("deletion/forget", forget.table),
        "shares": of("deletion/retrained", retrained.table),
        "depths": of("deletion/retrained", retrained.depth_table),
        "until-base": of("deletion/retrained", retrained.base_table),
        "shares-in-seconds": of("deletion/retrained", retrained.timed_table),
    },
    "tests/bench/scale/README.md": {
        "rollback": of("scale/rollback", rollback.table),
        "questions": of("scale/questions", questions.table),
        "growth": of("scale/questions", questions.growth_table),
        "evidence": of("scale/membership", membership.table),
        "simulated-fleet": of("scale/fleet", fleet.table),
    },
    "tests/bench/patches/README.md": {
        "forgetting": lambda: forgetting.table(
            *(recorded(f"patches/forgetting_{on}") for on in ("smollm2", "tofu", "rwku", "tiny"))
        ),
        "search": lambda: forgetting.table(
            *(recorded(f"patches/search_{on}") for on in ("rwku", "tofu"))
        ),
        "fallback": lambda: fallback.table(
            *(recorded(f"patches/fallback{of}") for of in ("", "_smaller_beta", "_kl_minimisation"))
        ),
        "fallback-tiny": lambda: fallback.table(
            recorded("patches/fallback_tiny"), recorded("patches/fallback_tiny_kl_minimisation")
        ),
        "sequential": of("patches/sequential", sequential.table),
    },
    "tests/bench/tofu_full/README.md": {
        "tofu-full-trials": of("tofu_full/tofu_full", tofu_full.trials_table),
        "tofu-full": of("tofu_full/tofu_full", tofu_full.table),
        "tofu-full-intervals": of("tofu_full/tofu_full", tofu_full.intervals_table),
        "tofu-full-deletions": of("tofu_full/tofu_full", tofu_full.deletions_table),
        "tofu-full-nine": of("tofu_full/tofu_full", tofu_full.nine_table),
        "tofu-methods": of("tofu_full/methods", tofu_full.table),
    },
    "tests/bench/training/README.md": {
        "steps": of("training/profile_step", profile_step.step_table),
        "step-parts": of("training/profile_step", profile_step.part_table),
        "lanes": of("training/lanes", lanes.table),
        "lane-products": of("training/lanes", lanes.product_table),
        "executors": of("training/executors", executors.table),
        "race": of("training/race", race.table),
        "race-ratios": of("training/race", race.ratio_table),
        "race-whole": of("training/race", race.whole_table),
    },
    "sisa/config/KEYS.md": {"keys": reference},
    "tests/README.md": {"endurance": endurance},
}


def generated(text: str, tables: dict[str, Callable[[], Iterator[str]]]) -> str:
    """Return a page with its tables written anew. Raises ValueError where one has no place in it."""
    places = [each["name"] for each in BLOCK.finditer(text)]
    if sorted(places) != sorted(tables):
        raise ValueError(f"the page has places for {sorted(places)}, tables are {sorted(tables)}")

    def table(block: re.Match[str]) -> str:
        lines = "\n".join(tables[block["name"]]())
        return f"{block[1]}\n{lines}\n\n{block[3]}"

    return BLOCK.sub(table, text)


def stale() -> dict[str, str]:
    """Return the pages that would change, each with what it should be."""
    found = {}
    for page, tables in TABLES.items():
        text = (ROOT / page).read_text(encoding="utf-8")
        if (wanted := generated(text, tables)) != text:
            found[page] = wanted
    return found


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 if a table is stale"
    )
    check = parser.parse_args().check
    for page, text in (found := stale()).items():
        print(f"{page}: {'stale' if check else 'written anew'}")
        if not check:
            (ROOT / page).write_text(text, encoding="utf-8")
    return int(check and bool(found))


if __name__ == "__main__":
    raise SystemExit(main())
