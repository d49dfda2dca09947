"""How well prompts find their shard, and what becomes of those whose subject was deleted.

    python -m tests.bench.routing --tofu DIRECTORY --out routing.json

TOFU's 200 authors (invented people) lie in 8, 50 and 200 shards; records are question and answer, as an
index holds them, and prompts are questions: asked as they stand, paraphrased, and paraphrased in lower
case. For each embedder, with and without names (`sisa/model/names.py`):

    accuracy    share of prompts whose first shard is their author's (and whose first two are); with the
                asked record in the index, and without it
    orphans     questions about a deleted author, all others held: share that is still sent to a shard,
                and share of the questions about held authors that is turned away; at the nearness that
                `min_score: auto` means, which was chosen on this very data, and at one chosen on one
                half of the authors and measured on the other, both ways round

Not covered: what a model answers to an orphan that is sent to a shard.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from sisa.aggregation_config import Aggregation
from sisa.ask import NUM_ROUTING_HITS
from sisa.digest import sha256_hex
from sisa.domain import Hit
from sisa.model.embedder import resolve_embedder
from sisa.model.names import NameEmbedder
from sisa.model.route import MIN_SCORES, choose_route, nearness
from sisa.ports import Embedder, Vectors
from sisa.sisa_config import MINILM

PER_AUTHOR, TURNED_AWAY, SENT = 20, 0.02, 0.05
EMBEDDERS = {
    "hashing": ("hashing", False),
    "hashing with names": ("hashing", True),
    "MiniLM": (MINILM, False),
    "MiniLM with names": (MINILM, True),
}
SHARDS = (8, 50, 200)
TWO = Aggregation(top_k=2)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def hits_of(scores_N: Vectors, shards: Any) -> list[Hit]:
    top = np.argsort(-scores_N, kind="stable")[:NUM_ROUTING_HITS]
    return [Hit(int(at), float(scores_N[at]), int(shards[at])) for at in top]


def rows(scores_QN: Vectors, out: Any) -> Iterator[Vectors]:
    """The scores of each query, with what `out` marks taken out of the index."""
    for number in range(len(scores_QN)):
        yield np.where(out(number), -2.0, scores_QN[number])


def measured(spec: str, names: bool, folder: Path) -> dict[str, Any]:
    full = lines(folder / "full.jsonl")
    other = {
        row["question"]: row["paraphrased_question"]
        for name in ("forget10_perturbed", "retain_perturbed")
        for row in lines(folder / f"{name}.jsonl")
    }
    embedder: Embedder = resolve_embedder(spec)
    if names:
        embedder = NameEmbedder(embedder)
    records = embedder.embed([f"{row['question']}\n{row['answer']}" for row in full])
    author = np.arange(len(full)) // PER_AUTHOR
    asked = np.arange(len(full))
    changed = np.array([at for at, row in enumerate(full) if row["question"] in other])
    queries = {
        "asked": (asked, embedder.embed([row["question"] for row in full])),
        "paraphrased": (changed, embedder.embed([other[full[at]["question"]] for at in changed])),
        "lower case": (changed, embedder.embed([other[full[at]["question"]].lower() for at in changed])),
    }
    least = {
        kind: np.full(len(vectors), MIN_SCORES.get(spec, -2.0)) for kind, (_, vectors) in queries.items()
    }
    found: dict[str, Any] = {"accuracy": [], "orphans": []}
    for num_shards in SHARDS:
        place = np.array([int(sha256_hex(str(a).encode())[:12], 16) % num_shards for a in author])
        shards = author if num_shards == len(set(author)) else place
        near: dict[tuple[str, str], Any] = {}
        for name, (own, vectors) in queries.items():
            scores = (vectors @ records.T) / (vectors * vectors).sum(axis=1, keepdims=True)
            for left_out in (False, True):
                found["accuracy"].append(
                    {
                        "shards": num_shards,
                        "questions": name,
                        "record": "left out" if left_out else "held",
                        **_accuracy(scores, own, shards, left_out=left_out),
                    }
                )
            near[name, "held"] = _near(scores, shards, lambda _: False)
            near[name, "orphan"] = _near(scores, shards, lambda q, own=own: author == author[own[q]])
        found["orphans"].append(
            _orphans(num_shards, near, {n: author[o] for n, (o, _) in queries.items()}, least)
        )
    return found


def _accuracy(scores_QN: Vectors, own: Any, shards: Any, *, left_out: bool) -> dict[str, float]:
    everything, places = frozenset(shards.tolist()), np.arange(len(shards))
    routes = [
        choose_route(hits_of(row, shards), TWO, everything).shards
        for row in rows(scores_QN, lambda q: (places == own[q]) & left_out)
    ]
    pairs = list(zip(routes, shards[own], strict=True))
    return {
        "share": float(np.mean([route[0] == mine for route, mine in pairs])),
        "share_of_first_two": float(np.mean([mine in route for route, mine in pairs])),
    }


def _near(scores_QN: Vectors, shards: Any, out: Any) -> Any:
    live = set(shards.tolist())
    return np.array(
        [nearness(hits_of(row, shards), TWO.temperature, live) for row in rows(scores_QN, out)]
    )


def _orphans(
    num_shards: int, near: dict[Any, Any], authors: dict[str, Any], least: dict[str, Any]
) -> dict[str, Any]:
    """Shares at the nearness that `auto` means (`least`), where it means one, and as halves choose."""
    halves = {name: authors[name] % 2 for name in authors}
    found: dict[str, Any] = {"shards": num_shards}
    if least["asked"].max() > -2:
        at = {name: float(np.median(each)) for name, each in least.items()}
        found["auto"] = {"min_score": at, **_shares(near, dict.fromkeys(authors, ...), least)}
    crossed = []
    for half in (0, 1):
        chosen = {name: halves[name] == half for name in authors}
        rest = {name: halves[name] != half for name in authors}
        at_half = _balanced(near, chosen)
        crossed.append(_shares(near, rest, {n: np.full(len(authors[n]), at_half) for n in authors}))
    found["chosen_on_one_half"] = {name: fmean(each[name] for each in crossed) for name in crossed[0]}
    return found


def _balanced(near: dict[Any, Any], some: dict[str, Any]) -> float:
    """The nearness at which both shares are as far below their bounds as both can be."""
    kinds = {name: each for name, each in some.items() if name != "lower case"}

    def worse(at: float) -> float:
        shares = _shares(near, kinds, {n: np.full(len(near[n, "held"]), at) for n in kinds})
        sent = max(shares["orphans_sent_asked"], shares["orphans_sent_paraphrased"])
        return max(shares["held_turned_away_paraphrased"] / TURNED_AWAY, sent / SENT)

    candidates: list[float] = np.unique(near["paraphrased", "held"]).tolist()
    return min(candidates, key=worse)


def _shares(near: dict[Any, Any], some: dict[str, Any], least: dict[str, Any]) -> dict[str, float]:
    """For each kind of question the shares of some of them, against the least nearness of each."""
    found = {}
    for name, each in some.items():
        away, sent = near[name, "held"] < least[name], near[name, "orphan"] >= least[name]
        found[f"held_turned_away_{name}"] = float(away[each].mean())
        found[f"orphans_sent_{name}"] = float(sent[each].mean())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tofu", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    found = {}
    for name, (spec, names) in EMBEDDERS.items():
        found[name] = measured(spec, names, given.tofu)
        print(name, json.dumps(found[name]), flush=True)
    if given.out is not None:
        given.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
