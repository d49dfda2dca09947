"""Measure how soon all replicas on all nodes serve new heads after a commit.

    python -m tests.endurance.rollout --nodes 2 --deletions 10 --out tests/endurance/rollout.json

A Ray cluster has a head without CPUs and nodes with one each, all on this machine, so that a replica of
`sisa serve` fills a node. The model's ledger is on a PostgreSQL server. `sisa forget --defer` deletes a
person, and `sisa run` trains what that touched: heads are rolled back, then they advance. From each of
these commits on, questions are asked until each replica has answered by the new heads. An answer shows
its heads by the log-probabilities of its tokens, and the service's metrics show which replica gave it.

The time runs from the last look at the ledger that found the old heads, so it is too long rather than
too short, and includes the answers, several at once. How long they take without a commit stands beside.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import openai
import psutil
import requests
from prometheus_client.parser import text_string_to_metric_families

from sisa.data.samples import make_people
from sisa.model import Model, open_model
from tests.endurance import ground as g
from tests.endurance.service import SERVE_REPLICA, Numbers, Service, ask, train
from tests.fakes.postgres_server import running_postgres
from tests.models.programs.clusters import add_node, own_cluster
from tests.models.scripted import NODE
from tests.models.tiny_base import make_tiny_base

SHARDS, SPARE, AT_ONCE = 2, 6, 4
BUSY = 5  # exit code of a command that another writer keeps out
PATIENCE_S, LOOK_S, WITHIN_S = 60.0, 0.002, 1.0


@dataclass
class Rollout:
    """A served model, and what its replicas answered since the last commit."""

    service: Service
    model: Model
    num_asked: int = 0  # after a commit
    outdated: int = 0  # of these, answered by former heads
    alone: list[float] = field(default_factory=list)  # seconds of answers before a command

    def __post_init__(self) -> None:
        self.client = openai.OpenAI(base_url=f"{self.service.url}/v1", api_key=self.service.token)
        self.pool = ThreadPoolExecutor(AT_ONCE)

    def ask(self, prompt: str) -> list[Numbers]:
        """Return what shows who gave each of some answers at once."""
        given = self.pool.map(lambda _: ask(self.client, prompt).numbers, range(AT_ONCE))
        return list(given)

    def answered(self) -> dict[str, float]:
        """Return how many answers each replica has given."""
        bearer = {"Authorization": f"Bearer {self.service.token}"}
        page = requests.get(f"{self.service.url}/metrics", headers=bearer, timeout=PATIENCE_S).text
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(page):
            for each in family.samples:
                if each.name == "sisa_answers_total":
                    replica = each.labels["replica"]
                    found[replica] = found.get(replica, 0) + each.value
        return found

    def seconds(self, prompt: str, *command: str) -> list[float]:
        """Run a command that commits new heads.

        Return how long after its commit each replica first answered a prompt by them.
        """
        began = time.monotonic()
        (old,) = {*self.ask(prompt)}
        self.alone.append(time.monotonic() - began)
        counted, found = self.answered(), dict[str, float]()
        arguments = [sys.executable, "-m", "sisa", *command, "--executor", "serial", "--json"]
        arguments[4:4] = ["-m", str(self.service.directory)]
        with subprocess.Popen(arguments, stdout=subprocess.DEVNULL) as process:
            since = self._committed(process)
            while since is not None and len(found) < self.service.num_replicas:
                numbers, at = self.ask(prompt), time.monotonic() - since
                g.expect(at < PATIENCE_S, f"only replicas {[*found]} serve the new heads")
                self.outdated += numbers.count(old)
                self.num_asked += len(numbers)
                before, counted = counted, self.answered()
                given = [each for each in counted if counted[each] > before.get(each, 0)]
                found = {**dict.fromkeys(given if old not in numbers else (), at), **found}
        g.expect(process.returncode in (0, BUSY), f"{command[0]} failed")
        return list(found.values())

    def _committed(self, process: subprocess.Popen[bytes]) -> float | None:
        """Wait for new heads; return when the old ones were seen last, or None if there are none.

        The service's runner, which also trains what was deferred, may make the command give way.
        """
        with self.model._ledger() as ledger:
            before, began = ledger.heads(), time.monotonic()
            since = at = began
            while process.poll() in (None, BUSY) and at < began + PATIENCE_S:
                since, at = at, time.monotonic()
                if ledger.heads() != before:
                    return since
                time.sleep(LOOK_S)
        return None


def nodes_of_replicas() -> list[str]:
    """Return the nodes on which replicas run."""
    found = []
    for each in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if " ".join(each.cmdline()).startswith(SERVE_REPLICA):
                found.append(each.environ()[NODE])
    return sorted(found)


def run(folder: Path, ledger: str, num_nodes: int, num_deletions: int) -> dict[str, Any]:
    """Delete people one after another; return how soon that reached all replicas."""
    rows, base = make_people(num_deletions + SPARE, 2), make_tiny_base(folder / "base")
    clean, trained = list[float](), list[float]()
    with own_cluster() as cluster:
        for number in range(num_nodes):
            add_node(cluster, f"node-{number}")
        train(folder, base, rows, SHARDS, ledger=ledger, cluster={"address": cluster.address})
        service = Service(folder, num_replicas=num_nodes)
        service.start()
        try:
            nodes, model = nodes_of_replicas(), open_model(service.directory, executor="serial")
            rollout = Rollout(service, model)
            shard_of = {row["subject_id"]: model.where([row["id"]])[0].shard for row in rows}
            for who in list(shard_of)[:num_deletions]:
                shard = shard_of.pop(who)
                other = next(each for each, of in reversed(shard_of.items()) if of == shard)
                prompt = next(row["prompt"] for row in rows if row["subject_id"] == other)
                clean += rollout.seconds(prompt, "forget", "--subject", who, "--defer")
                trained += rollout.seconds(prompt, "run")
        finally:
            service.stop()
    return {
        "nodes_of_replicas": nodes,
        "deletions": num_deletions,
        "seconds_to_clean_heads": _spread(clean),
        "seconds_to_trained_heads": _spread(trained),
        "seconds_without_a_commit": _spread(rollout.alone),
        "answers_after_commits": rollout.num_asked,
        "answers_by_former_heads": rollout.outdated,
    }


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    middle, most = (round(each(seconds or [0.0]), 3) for each in (median, max))
    return {"times": len(seconds), "median": middle, "most": most}


def main(arguments: Sequence[str]) -> int:
    """Measure and write what was found."""
    parser = argparse.ArgumentParser(prog="tests.endurance.rollout")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--deletions", type=int, default=10)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args(arguments)
    with running_postgres() as server, tempfile.TemporaryDirectory() as folder:
        found = run(Path(folder), server.new_url(), chosen.nodes, chosen.deletions)
    print(found)
    if chosen.out:
        g.write_json(chosen.out, {**g.environment(), "ledger": "postgresql", **found})
    slowest = max(found[f"seconds_to_{each}_heads"]["most"] for each in ("clean", "trained"))
    late = slowest > WITHIN_S + found["seconds_without_a_commit"]["most"]
    return 1 if found["answers_by_former_heads"] or late else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
