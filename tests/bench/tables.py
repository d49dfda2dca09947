"""Generate the tables of the READMEs: what was measured, and the keys of the run file.

    python -m tests.bench.tables            # write every table anew
    python -m tests.bench.tables --check    # name the tables that differ; exit code 1

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`. Measured ones come from the
JSON in the rooms of `tests/bench/`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
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
from tests.bench.answering import quality, utility
from tests.bench.command import markdown
from tests.bench.deletion import retrained
from tests.bench.patches import fallback, sequential
from tests.bench.tofu_full import table as tofu_full
from tests.bench.training import race

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
NAMED, ALONE = "MiniLM with names", "MiniLM"

Json = Any


def recorded(name: str) -> Json:
    """Return what `tests/bench/NAME.json` holds; a name begins with its room."""
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))


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


def spread(values: Iterable[float], form: str) -> str:
    """Return a range of values, or the one that all of them are when shown.

    >>> spread([0.5, 0.75], ".0%"), spread([0.1, 0.1001], ".1%")
    ('50% to 75%', '10.0%')
    """
    ordered = sorted(values)
    low, high = (format(ordered[at], form) for at in (0, -1))
    return low if low == high else f"{low} to {high}"


def approx_methods() -> Iterator[str]:
    """Yield the table of all methods of approximate unlearning."""
    from approx.patches.patch_settings import describe_methods
    from cluster.cli.patches import defaults_in_words, needs_in_words

    lines = [
        (
            f"`{each['name']}`",
            each["family"],
            needs_in_words(each["needs"]),
            defaults_in_words(each["defaults"]),
            each["paper"],
        )
        for each in describe_methods()
    ]
    yield from markdown(("method", "family", "needs", "defaults", "paper"), lines)


def found_shards() -> Iterator[str]:
    """Yield whose shard is found, over the numbers of shards."""
    asked = {
        "asked": "as asked",
        "paraphrased": "paraphrased",
        "lower case": "paraphrased, in lower case",
    }
    lines = []
    for embedder in (NAMED, ALONE, "hashing with names", "hashing"):
        for prompts, title in asked.items():
            if prompts == "lower case" and "names" not in embedder:
                continue  # of them nothing is looked at but the words themselves
            some = [
                row
                for row in recorded("answering/routing")[embedder]["tofu"]
                if row["prompts"] == prompts
            ]
            own, left_out = (spread((row[name] for row in some), ".3f") for name in ("own", "left_out"))
            lines.append((embedder, title, own, left_out))
    header = ("embedder", "questions", "own shard first", "the same, with the asked record left out")
    yield from markdown(header, lines)


def thresholds() -> Iterator[str]:
    """Yield what `min_score: auto` does with prompts about the held and the deleted."""
    found = recorded("answering/routing")
    kinds = [
        ("TOFU, as asked", NAMED, "tofu", "asked"),
        ("TOFU, paraphrased", NAMED, "tofu", "paraphrased"),
        ("TOFU, paraphrased, in lower case", NAMED, "tofu", "lower case"),
        ("TOFU, as asked, `names: false`", ALONE, "tofu", "asked"),
        ("TOFU, paraphrased, `names: false`", ALONE, "tofu", "paraphrased"),
        ("RWKU (200 real people), as asked", NAMED, "rwku", "asked"),
        ("MUSE (news and novels), as asked", NAMED, "muse", "asked"),
    ]
    lines = []
    for title, embedder, data, prompts in kinds:
        some = [row for row in found[embedder][data] if row["prompts"] == prompts]
        shares = [spread((row[name] for row in some), ".1%") for name in ("turned_away", "sent")]
        lines.append((title, some[0]["num"], *shares))
    header = ("prompts", "number", "about the held, turned away", "about the deleted, sent to a shard")
    yield from markdown(header, lines)


def forms() -> Iterator[str]:
    """Yield the same by the form of the records."""
    some = [
        row for row in recorded("answering/routing")[NAMED]["forms"] if row["compared_with"] == "prompts"
    ]
    found = {(row["form"], row["data"], row["prompts"]): row for row in some}
    columns = {"TOFU, as asked": ("tofu", "asked"), "TOFU, paraphrased": ("tofu", "paraphrased")}
    columns["RWKU, as asked"] = ("rwku", "asked")

    def cell(row: Json | None) -> str:
        return f"{row['turned_away']:.1%} / {row['sent']:.1%}" if row else "not measured"

    every = dict.fromkeys(form for form, _, _ in found)
    lines = [(form, *(cell(found.get((form, *each))) for each in columns.values())) for form in every]
    yield from markdown(("records", *columns), lines)


Interval = tuple[float, float, float]


def changed(before: Interval, after: Interval) -> str:
    """Return a share before, the share after and the latter's interval.

    >>> changed((0.827, 0.7, 0.9), (0.981, 0.958, 0.991))
    '82.7%, 98.1% (95.8% to 99.1%)'
    """
    share, low, high = after
    return f"{before[0]:.1%}, {share:.1%} ({low:.1%} to {high:.1%})"


def hostile(source: str) -> Iterator[str]:
    """Yield whom hostile prompts about held and deleted people reach, before and after."""
    before, after = (recorded("answering/hostile")[section][source] for section in ("before", "after"))
    outcomes = {
        "held: own shard first": ("held", "right"),
        "held: refused": ("held", "refused"),
        "deleted: sent to a shard": ("deleted", "sent"),
        "of these, to the person named beside": ("deleted", "steered"),
    }
    lines = []
    for form in (each for each in after if "held" in after[each]):
        cells = [
            changed(before[form][group][name], after[form][group][name])
            if name in after[form][group]
            else ""
            for group, name in outcomes.values()
        ]
        lines.append((form, after[form]["held"]["num"], *cells))
    yield from markdown(("prompts", "number", *outcomes), lines)


def hostile_general() -> Iterator[str]:
    """Yield the shares of questions about nobody held that a shard answers, before and after."""
    found = recorded("answering/hostile")
    titles = {"tofu": "beside TOFU's authors", "rwku": "beside RWKU's people", "muse": "beside MUSE"}
    lines = []
    for form, of in found["after"]["tofu"].items():
        if "general" in of:
            cells = [
                changed(
                    *(found[section][source][form]["general"]["sent"] for section in ("before", "after"))
                )
                if form in found["after"][source]
                else ""
                for source in titles
            ]
            lines.append((form, of["general"]["num"], *cells))
    yield from markdown(("questions", "number", *titles.values()), lines)


def answering_speed() -> Iterator[str]:
    """Yield how fast shards answer together, at 1, 4 and 16 requests."""
    found = recorded("answering/answers")
    of_all, of_routed = "all_shards", "routed"
    measures: list[tuple[str, str, str, int]] = [
        ("decode: times as fast as peft's `set_adapter` loop", of_all, "loop_over_ours_decode", 1),
        ("prefill: times as fast as the loop", of_all, "loop_over_ours_prefill", 1),
        (
            "decode: as the faster of the loop and `adapter_names`",
            of_all,
            "faster_of_both_over_ours_decode",
            1,
        ),
        ("prefill: as the faster of both", of_all, "faster_of_both_over_ours_prefill", 1),
        ("an answer of 32 tokens: times as fast as the loop", of_all, "loop_over_ours_answer", 1),
        (
            "an answer by one shard (`top_k: 1`), each request another: cost over one ordinary "
            "adapter's in peft",
            of_routed,
            "top_1_spread_over_one_adapter_answer",
            2,
        ),
        ("by two shards (`top_k: 2`)", of_routed, "top_2_spread_over_one_adapter_answer", 2),
    ]

    def cell(layers: str, kind: str, name: str, digits: int) -> str:
        return ", ".join(f"{row[name]:.{digits}f}" for row in found[layers][kind])

    layers = ("all_layers", "top_third")
    lines = [
        (title, *(cell(each, kind, name, digits) for each in layers))
        for title, kind, name, digits in measures
    ]
    header = ("what, at 1, 4 and 16 requests of 48 tokens", "all layers", "top third")
    yield from markdown(header, lines)


def cold() -> Iterator[str]:
    """Yield the time of a command that asks once."""
    header = ("process", "seconds", "core-seconds", "over importing torch")
    lines = [
        (
            name,
            f"{each['seconds']:.1f}",
            f"{each['core_seconds']:.1f}",
            f"{each['over_importing_torch']:.1f}",
        )
        for name, each in recorded("answering/cold")["ways"].items()
    ]
    yield from markdown(header, lines)


def forget() -> Iterator[str]:
    """Yield what a whole deletion takes against its steps."""
    header = ("record-epochs", "seconds", "core-seconds", "of them steps", "share of the bound")
    lines = [
        (
            str(each["record_epochs"]),
            f"{each['seconds']:.1f}",
            f"{each['core_seconds']:.1f}",
            f"{each['steps_core_seconds']:.1f}",
            f"{each['share_of_bound']:.2f}",
        )
        for each in recorded("deletion/forget")["deletions"]
    ]
    yield from markdown(header, lines)


def throughput() -> Iterator[str]:
    """Yield what many clients at once get, against one after another."""
    found = recorded("answering/throughput")
    lines = []
    for each in found["settings"]:

        def mid(way: str, name: str, rounds: Json = each["rounds"]) -> float:
            return float(median(one[way][name] for one in rounds))

        ways = ("generate", "alone", "together")
        least, middle, most = each["together_over_one_by_one_s"]
        lines.append(
            (
                each["threads"],
                ", ".join(f"{mid(way, 'tokens_per_s'):.1f}" for way in ways),
                f"{middle:.1f} ({least:.1f} to {most:.1f})",
                f"{each['together_over_one_by_one_core_s'][1]:.1f}",
                f"{mid('alone', 'first_token_s_p50'):.2f} s",
                ", ".join(f"{mid('together', f'first_token_s_{p}'):.2f} s" for p in ("p50", "p95")),
            )
        )
    together = f"{found['clients']} clients"
    header = (
        "threads",
        f"tokens/s: `generate`, one client, {together}",
        f"{together} over the faster of both",
        "by core-seconds",
        "first token, one client",
        f"{together}, p50 and p95",
    )
    yield from markdown(header, lines)


def costs() -> Iterator[str]:
    """Yield what a deletion, Ray and a rollback cost."""
    found, executors, sizes = (
        recorded("deletion/costs"),
        recorded("training/executors"),
        recorded("scale/rollback")["sizes"],
    )
    deletions, here = found["deletion"]["deletions"], found["executors"]

    def each(name: str) -> str:
        return ", ".join(f"{deletion[name]:.3f}" for deletion in deletions)

    def rest(ran: Json) -> str:
        base = ran["ray_2"]["base_pss_mb"][0]
        return spread((each - base for each in ran["ray_2"]["worker_pss_mb"]), ".0f")

    lines = [
        (
            "deleting one record of slice 0, 1, 2 against training everything, in seconds, the probe of "
            "the base included",
            each("ratio"),
        ),
        ("the same in record-epochs", each("record_epoch_share")),
        ("SISA's closed form for large slices", each("closed_form")),
        ("Ray with one worker against the serial executor", f"{here['ray_1_over_serial']:.2f}"),
        ("two Ray workers against one", f"{here['speedup_of_two_workers']:.2f} times as fast"),
        (
            "two Ray workers against the serial executor, of ideal",
            f"{here['efficiency_of_two_workers']:.2f}",
        ),
        (
            "what Ray adds to a slice (`tests/bench/training/executors.json`)",
            f"{executors['overhead_per_slice_s'] * 1000:.0f} ms",
        ),
        (
            "memory (PSS) of one more worker: the base's pages",
            f"{here['base_growth_per_extra_worker']:.1%} of the base: one copy of {here['base_mb']} MB "
            "for all",
        ),
        (
            "the same, all else (libraries, gradients, activations of batches of 2)",
            f"{rest(here)} MB; {rest(executors)} MB with records half as long",
        ),
        (
            "start-up of Ray and its workers, apart from the above",
            f"{here['ray_2']['start_up_seconds']:.1f} s",
        ),
    ]
    first, *middle, last = sizes
    times = recorded("scale/rollback")["growth"]
    of_first = (
        "from a request to clean heads, 64 shards x 8 slices (`tests/bench/scale/rollback.json`): "
    )
    of_last = f": {times['records']:.0f} times as many, {times['clean_heads_p50']:.0f} times the time"
    lines += [(of_first + _records(first), _clean_heads(first))]
    lines += [(_records(each), _clean_heads(each)) for each in middle]
    lines += [(_records(last) + of_last + "; no other shard is read", _clean_heads(last))]
    yield from markdown(("what", "measured"), lines)


def evidence() -> Iterator[str]:
    """Yield what evidence adds to a deletion, and what its tree of records costs."""
    found = recorded("scale/membership")
    without, with_ = found["without_evidence"], found["with_evidence"]
    each, first, nodes = found["processor_seconds_each"], found["first_tree"], found["nodes_rewritten"]
    records, processor = f"{found['records']:,} records", "of_which_processor_seconds"
    lines = [
        (f"from a request to clean heads, {records}, without evidence", _clean_heads(without)),
        (
            f"the same with evidence: {found['clean_heads_with_over_without']} times",
            _clean_heads(with_),
        ),
        (
            "of which processor time, p50, without and with",
            ", ".join(f"{part[processor]['p50']:.2f} s" for part in (without, with_)),
        ),
        (
            "to the end (certificate signed and logged), training faked, p50, without and with",
            ", ".join(f"{part['to_the_end_seconds']['p50']:.2f} s" for part in (without, with_)),
        ),
        (
            "nodes of the tree that a deletion rewrites, p50 and most",
            f"{nodes['p50']:.0f}, {nodes['max']} of {found['stored_nodes']:,}",
        ),
        ("labels that a core computes", f"{1 / each['label']:,.0f} in a second"),
        (
            f"the first tree of {records}, with all labels, on {found['machine']['cpus']} cores",
            f"{first['seconds']:.0f} s; {first['processor_seconds']:.0f} s of processor time",
        ),
        (
            "a label's proof, and its verification, in processor time",
            ", ".join(f"{each[name] * 1000:.2f} ms" for name in ("proof", "verification")),
        ),
        ("`evidence.sqlite`", f"{found['evidence_bytes'] / 1e6:.0f} MB"),
    ]
    yield from markdown(("what", "measured"), lines)


def _records(size: Json) -> str:
    return f"{size['records']:,} records"


def _clean_heads(size: Json) -> str:
    seconds = size["clean_heads_seconds"]
    return f"{seconds['p50']:.2f} s p50, {seconds['p95']:.2f} s p95"


def simulated_fleet() -> Iterator[str]:
    """Yield what training and deletions of a billion records take, in simulated time."""
    found = recorded("scale/fleet")
    training, (*few, many) = found["first_training"], found["deletions"]
    hours = spread((24 * each["delay_days_p50"] for each in few), ".1f")
    shares = " / ".join(f"{each['retrained_share_of_full_training']:.2g}" for each in few)
    name = "shards_worth_retrained_per_request"
    lines = [
        (
            f"first training, {found['epochs']} epochs: time, with and without deaths",
            f"{training['makespan_h']:.1f} h, {training['makespan_h_without_deaths']:.1f} h",
        ),
        (
            "of all workers' time, spent on training that was kept; lost with "
            f"{training['worker_deaths']} deaths",
            f"{training['utilisation']:.1%}, {training['lost_share']:.1%}",
        ),
        (
            "requests for one record each, 10 / 100 / 1,000 a day: run daily, median delay to the end "
            "of training",
            f"{hours} h",
        ),
        (f"what they retrain in {found['days']} days, in full trainings", shares),
        (
            f"10,000 a day: waiting pays, so {many['runs']} runs in {found['days']} days; delay p50, "
            "longest; least days left to the due date",
            f"{many['delay_days_p50']:.0f} d, {many['delay_days_max']:.0f} d; {many['least_days_left']}",
        ),
        (
            f"what they retrain in {found['days']} days; for each request, in trainings of one shard "
            f"({few[0][name]:.2f} at 10 a day)",
            f"{many['retrained_share_of_full_training']:.1f}; {many[name]:.3f}",
        ),
    ]
    yield from markdown(("what", "simulated"), lines)


def forgetting() -> Iterator[str]:
    """Yield what patches with the default settings leave known."""
    lines = []
    for name in ("forgetting_tiny", "forgetting"):
        found = recorded(f"patches/{name}")
        base = "tiny base" if found["base_model"] == "tiny" else "SmolLM2-135M"
        for row in found["rows"]:
            known, others = row["still_known"], row["others_known"]
            relearnt = row["robustness"]["relearning"].get("3")
            before, after = row["metrics_before"], row["metrics_after"]
            lines.append(
                (
                    base,
                    row["method"],
                    row["retain"],
                    row["outcome"],
                    f"{known['after']} of {known['before']}",
                    f"{before['forget_probability']:.2f} to {after['forget_probability']:.2f}",
                    "-" if relearnt is None else f"{relearnt:.2f}",
                    f"{row['utility_before']:.2f} to {row['utility']:.2f}",
                    f"{others['after']} of {others['before']}",
                )
            )
    header = ("base", "method", "retain set", "outcome", "still known", "their probability")
    yield from markdown((*header, "after 3 steps on them", "utility", "others still known"), lines)


def questions() -> Iterator[str]:
    """Yield what questions to a large ledger cost, against the way before in the same run."""
    found = recorded("scale/questions")
    titles = {
        "absent_id": "an id that is not held",
        "absent_ids_1000": "1,000 of them",
        "absent_subject": "a subject that is not held",
        "absent_text_surely": "a text that is not held",
        "where_1000_ids": "`where` of 1,000 ids",
        "checking": "what a writing command compares of the requests' history",
        "dry_run_1000_ids": "`forget --dry-run` of 1,000 ids, in all slices",
        "deletion_of_one_deferred": "a deletion of one record, its training put off, files not counted",
    }
    lines = [
        (title, f"{found[name]['cpu_s']:.3f}", f"{found[name]['before_cpu_s']:.2f}")
        for name, title in titles.items()
    ]
    yield from markdown(("question", "CPU seconds", "the way before"), lines)


def growth() -> Iterator[str]:
    """Yield what does not take longer where a ledger holds more records."""
    sizes = recorded("scale/questions")["growth"]
    titles = {
        "stage_commit_s": "the commit of a stage, in a first training",
        "status_s": "`status`",
        "where_absent_s": "`where` of an id that is not held",
        "of_subject_s": "the records of a subject, as `find --subject` looks them up",
        "request_list_s": "`request list`",
    }
    lines = [(title, *(f"{its[name]:.3f}" for its in sizes.values())) for name, title in titles.items()]
    loads = {
        "records_per_s": "records added a second, in one commit, as by a first training",
        "records_per_s_in_parts": "the same, in commits of 50,000",
    }
    lines += [(title, *(f"{its[name]:,.0f}" for its in sizes.values())) for name, title in loads.items()]
    yield from markdown(("CPU seconds", *(f"{int(size):,} records" for size in sizes)), lines)


def step_table(found: Json) -> Iterator[str]:
    """Yield what a training step costs beside its matrix products."""
    lines = [
        (
            name,
            f"{row['tokens_per_s']:.0f}",
            f"{row['gflops_per_s']:.0f}",
            f"{row['peak_gflops_per_s']:.0f}",
            f"{row['of_peak']:.2f}",
        )
        for name, row in found["rows"].items()
    ]
    header = ("step", "tokens/s", "GFLOP/s", "products alone", "of them")
    yield from markdown(header, lines)


def part_table(found: Json) -> Iterator[str]:
    """Yield where a training step's time goes, in percent of the step, and the bounds of each part."""
    split = {name: row for name, row in found["rows"].items() if "parts" in row}
    names = next(iter(split.values()))["parts"]
    columns = [("of a step", *names, "sum", "products alone, of the sum")]
    for step, row in split.items():
        parts, short = row["parts"].values(), step.removeprefix("all linear, ").removesuffix(" a step")
        whole = sum(each["s"] for each in parts)
        products = sum(each["moved_s"] for each in list(parts)[:3])  # alone
        for kind, title in {"s": "now", "moved_s": "moved", "fused_s": "fused"}.items():
            took = sum(each[kind] for each in parts)
            share = row["of_peak"] if kind == "s" else products / took  # the former in turn with steps
            cells = (f"{each[kind] / whole:.1%}" for each in parts)
            columns.append((f"{short}: {title}", *cells, f"{took / whole:.0%}", f"{share:.2f}"))
    header, *lines = zip(*columns, strict=True)
    yield from markdown(header, lines)


def lanes_table(found: Json) -> Iterator[str]:
    """Yield what training shards side by side gains."""
    lines = []
    for name, by_lanes in found["rows"].items():
        layers, _, batch = name.partition(", ")
        alone = by_lanes["1"]["tokens_per_s"]
        for lanes, row in by_lanes.items():
            gain = f"{row['tokens_per_s'] / alone:.2f}"
            lines.append((layers, batch, lanes, f"{row['tokens_per_s']:.0f}", gain))
    header = ("adapted layers", "records a step", "lanes", "tokens per core-second", "to one lane")
    yield from markdown(header, lines)


def lane_products(found: Json) -> Iterator[str]:
    """Yield how fast the base's products are by their number of rows."""
    by_rows = found["products_gflops_per_s"]
    yield from markdown(("rows", *by_rows), [("GFLOP/s", *(f"{each:.0f}" for each in by_rows.values()))])


def shares() -> Iterator[str]:
    """Yield what deletions retrain, where there is one order."""
    found = recorded("deletion/retrained")
    yield from retrained.table(
        found | {"shares": [row for row in found["shares"] if row["orders"] == 1]}
    )


def methods() -> Iterator[str]:
    """Yield the references and every setting of every method of unlearning."""
    found = recorded("leaderboard/leaderboard")
    columns = {
        "p_value": "forget quality p",
        "statistic": "D",
        "model_utility": "utility",
        "probability": "forget probability",
        "rouge": "forget ROUGE-L",
        "extraction_strength": "extraction strength",
        "attack_loss": "AUC of loss",
    }
    lines = []
    for row in (*found["references"], *found["curves"]):
        rate = f"{row['learning_rate']:g}" + (f", alpha {row['alpha']:g}" if row["alpha"] else "")
        steps = sorted(set(row["steps"]))
        values = [_with_spread(row["values"][name]) for name in columns]
        share = f"{row['values']['share']['mean']:.1%}"
        taken = "-".join(map(str, steps))
        lines.append((row["name"], rate, row["num_seeds"], taken, *values, share))
    header = ("method", "rate", "seeds", "steps", *columns.values(), "operations, share of full")
    yield from markdown(header, lines)


def _with_spread(value: Json) -> str:
    """Return a mean, and half of the range over seeds where it can be seen."""
    mean, spread_ = f"{value['mean']:.2f}", f"{value['spread'] or 0:.2f}"
    return mean if spread_ == "0.00" else f"{mean} ± {spread_}"


def of(name: str, table: Callable[[Json], Iterator[str]]) -> Callable[[], Iterator[str]]:
    """Return a table of what was measured, that its benchmark prints, too."""
    return lambda: table(recorded(name))


TABLES: dict[str, dict[str, Callable[[], Iterator[str]]]] = {
    "tests/bench/answering/README.md": {
        "found-shards": found_shards,
        "thresholds": thresholds,
        "forms": forms,
        "hostile-tofu": partial(hostile, "tofu"),
        "hostile-rwku": partial(hostile, "rwku"),
        "hostile-muse": partial(hostile, "muse"),
        "hostile-general": hostile_general,
        "quality": of("answering/quality", quality.table),
        "answering-speed": answering_speed,
        "cold": cold,
        "throughput": throughput,
        "utility": of("answering/utility", utility.table),
    },
    "tests/bench/deletion/README.md": {
        "forget": forget,
        "costs": costs,
        "shares": shares,
        "depths": of("deletion/retrained", retrained.depth_table),
        "until-base": of("deletion/retrained", retrained.base_table),
        "shares-in-seconds": of("deletion/retrained", retrained.timed_table),
    },
    "tests/bench/scale/README.md": {
        "questions": questions,
        "growth": growth,
        "evidence": evidence,
        "simulated-fleet": simulated_fleet,
    },
    "tests/bench/patches/README.md": {
        "forgetting": forgetting,
        "fallback": of("patches/fallback_tiny", fallback.table),
        "sequential": of("patches/sequential", sequential.table),
    },
    "tests/bench/leaderboard/README.md": {"methods": methods},
    "tests/bench/tofu_full/README.md": {
        "tofu-full-trials": of("tofu_full/tofu_full", tofu_full.trials_table),
        "tofu-full": of("tofu_full/tofu_full", tofu_full.table),
        "tofu-full-nine": of("tofu_full/tofu_full", tofu_full.nine_table),
    },
    "tests/bench/training/README.md": {
        "steps": of("training/profile_step", step_table),
        "step-parts": of("training/profile_step", part_table),
        "lanes": of("training/lanes", lanes_table),
        "lane-products": of("training/lanes", lane_products),
        "race": of("training/race", race.table),
        "race-ratios": of("training/race", race.ratio_table),
        "race-whole": of("training/race", race.whole_table),
    },
    "sisa/config/README.md": {"keys": reference},
    "approx/README.md": {"approx-methods": approx_methods},
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
