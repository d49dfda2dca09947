"""The fallback end to end: deleted exactly, still known to the base, then forgotten by a patch.

    python -m tests.bench.patches.fallback --out tests/bench/patches/fallback.json

A base knows ten invented people by heart (`known_people.py`), and shards over it are trained on them
and on others. One of the ten asks to be forgotten and consents to a patch: after `sisa request submit`
and `sisa run` the base alone still produces the answers. `sisa approx unlearn` then makes a patch with
its defaults for each kind of retain set: answers that the base writes, or, by a second consent, the
records of the nine others. `sisa approx revert` removes a patch before the next one.

The base, the served model and attacks on it are measured before and after each patch. Each seed has
other people and another seed of the patch. The result is written after every seed, and the same command
continues it, on another machine, too. `--method` and `--set` choose another method or other settings;
give them a file of their own, since a file holds one of each and another begins it anew.

There is no pass or fail here; `tests/integration/patches/test_fallback.py` asserts the laws on a tiny
base. The criterion for known texts was fixed before the first run (`approx/evaluation/probe.py`).
Several people are covered by `sequential.py`.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.cli.patches import METHOD, assignments
from sisa.data.samples import to_jsonl
from tests.bench.command import BASE, arguments, here, markdown, read, with_spread, write
from tests.bench.patches.known_people import (
    CONSENT,
    SET,
    TINY,
    Ground,
    Scale,
    Way,
    base_dir,
    method_in_words,
)

FORGOTTEN = "p001"
SEEDS = (7, 8, 9)
WAYS = {"written by the base": Way(keep=False), "records of the others": Way()}
WORDED = ("rewording", "prefix_injection", "jailbreak")
ATTACKS = ("leak_at_k", *WORDED)  # that prompts alone can make
REPORTED = ("outcome", "still_known", "step", "learning_rate_kept", "utility_before", "utility")


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


def attacked(ground: Ground) -> dict[str, dict[str, float]]:
    """Return what attacks by prompts bring back of the one from the served model, by attack."""
    data, taught = ground.folder / "attacked.jsonl", ground.folder / "taught.jsonl"
    for path, people in ((data, ground.known[:1]), (taught, ground.known[1:2])):
        rows = ground.rows(*people)
        asked = [{"question": row["prompt"], "answer": row["completion"].strip()} for row in rows]
        path.write_text(to_jsonl(asked))
    files = ("--data", data, "--taught", taught, "--template", "{question} {answer}")
    chosen = [word for name in ATTACKS for word in ("--attack", name)]
    with tempfile.TemporaryDirectory() as logs:
        done = ground.sisa("eval", "attacks", *files, "--out", logs, "--executor", "serial", *chosen)
    return {name: each["means"] for name, each in done["models"][0]["curves"].items()}


def run(
    ground: Ground,
    request: Mapping[str, Any],
    ways: Mapping[str, Way],
    measure: Callable[[Ground], dict[str, Any]] = measured,
) -> dict[str, Any]:
    """Make a patch in each way for the person whom a request erased.

    The first patch is made from the vault's text, which is then erased, and the others from text given
    again.
    """
    others = [each for each in ground.known if each != FORGOTTEN]
    before = measure(ground)
    found = {}
    for number, (name, way) in enumerate(ways.items()):
        started = time.process_time()
        if number == 0:
            made = ground.unlearn(way, others, requests=[request["request_id"]])
        else:
            ground.sisa("approx", "revert")
            made = ground.unlearn(way, others, forget=[FORGOTTEN])
        report = made["report"]
        found[name] = {
            **way.to_json(),
            "core_seconds": round(time.process_time() - started, 1),
            **{key: report.get(key) for key in (*REPORTED, "sets", "composition", "robustness")},
            **measure(ground),
        }
    return {
        "taught": dict(ground.taught),
        "request_probed": request["probed"],
        "without_patch": before,
        "patches": found,
    }


def with_attacks(ground: Ground) -> dict[str, Any]:
    """Return all measures, and what the attacks bring back."""
    return {**measured(ground), "attacked": attacked(ground)}


def _known(at: Mapping[str, Any]) -> float:
    return float(at["base_known"] / at["base_probed"])


def _most_likely(attacked: Mapping[str, Mapping[str, float]]) -> float:
    """Return the largest mean probability of an answer over other wordings, prefixes and wrappings."""
    curves = (curve for name, curve in attacked.items() if name in WORDED)
    return max(mean for curve in curves for mean in curve.values())


COLUMNS: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "still known": lambda at: _known(at["forgotten"]),
    "base": lambda at: at["forgotten"]["base_probability"],
    "served": lambda at: at["forgotten"]["served"]["probability"],
    "best wording or wrapping": lambda at: _most_likely(at["attacked"]),
    "best of 8 samples": lambda at: at["attacked"]["leak_at_k"]["8"],
    "others known": lambda at: _known(at["others"]),
    "others, base": lambda at: at["others"]["base_probability"],
    "others, served": lambda at: at["others"]["served"]["probability"],
}
OF_A_PATCH: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "relearnt, 3 steps": lambda at: at["robustness"]["relearning"]["3"],
    "never known, 3 steps": lambda at: at["robustness"]["control"]["3"],
    "core-seconds": lambda at: at["core_seconds"],
}


def table(*of_methods: Mapping[str, Any]) -> Iterator[str]:
    """Yield a Markdown table: means over seeds, ± half of their range, without and with each patch."""
    first = list(of_methods[0]["seeds"].values())
    lines = [_line("-", "no patch", [each["without_patch"] for each in first], COLUMNS)]
    for found in of_methods:
        runs = [each["patches"] for each in found["seeds"].values()]
        method = method_in_words(found["method"], found["settings"])
        for name in found["retain"]:
            lines.append(_line(method, name, [each[name] for each in runs], COLUMNS | OF_A_PATCH))
    yield from markdown(("method", "retain set", "seeds", *COLUMNS, *OF_A_PATCH), lines)


def _line(
    method: str,
    retain: str,
    of_seeds: Sequence[Mapping[str, Any]],
    columns: Mapping[str, Callable[[Mapping[str, Any]], float]],
) -> tuple[Any, ...]:
    cells = [
        with_spread([value(at) for at in of_seeds], ".0f" if title == "core-seconds" else ".2f")
        for title, value in columns.items()
    ]
    return method, retain, len(of_seeds), *cells, *["-"] * (len(COLUMNS | OF_A_PATCH) - len(cells))


def headline(found: Mapping[str, Any]) -> tuple[str, str]:
    """Return what a patch with the base's own retain set leaves, in words, over all seeds."""
    runs = list(found["seeds"].values())
    before = [each["without_patch"]["forgotten"] for each in runs]
    after = [each["patches"]["written by the base"] for each in runs]
    gone = [at["forgotten"] for at in after]
    asked = [at["others"]["base_probed"] for at in after]
    kept = [at["others"]["base_known"] for at in after]
    return (
        "answers about a deleted person that the base still knows, after a patch (approximate)",
        f"{sum(at['base_known'] for at in gone)} of {sum(at['base_known'] for at in before)}; "
        f"{sum(kept)} of {sum(asked)} about others are left ({len(runs)} seeds)",
    )


def main() -> None:
    given = arguments(
        __doc__,
        out=Path("fallback.json"),
        base_model=BASE,
        tiny={"action": "store_true", "help": "a tiny base, whose utility means little"},
        seeds={"nargs": "+", "type": int, "default": list(SEEDS)},
        method=METHOD,
        retain={"nargs": "+", "choices": WAYS, "default": list(WAYS)},
        set=SET,
    )
    settings = assignments(given.set or ())
    design = {"base_model": "tiny" if given.tiny else given.base_model, "method": given.method}
    design |= {"settings": settings, "retain": given.retain}
    found = {**here(), **design, "seeds": read(given.out, design).get("seeds", {})}
    for seed in given.seeds:
        if str(seed) in found["seeds"]:
            continue
        with tempfile.TemporaryDirectory() as folder:
            scale = replace(TINY if given.tiny else Scale(), seed=seed)
            base = base_dir(given.tiny, given.base_model, Path(folder))
            ground = Ground.laid(Path(folder), base, scale)
            ways = {
                name: replace(WAYS[name], method=given.method, settings={**settings, "seed": seed})
                for name in given.retain
            }
            found["seeds"][str(seed)] = run(ground, erase(ground, FORGOTTEN), ways, with_attacks)
        write(given.out, found)
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
