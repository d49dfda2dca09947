"""Kill nodes and workers at random while a model trains on a cluster: equal to the serial executor.

    python -m tests.endurance.nodes --seconds 600 --seed 1 --out tests/endurance/nodes.json

The cluster has a head without CPUs, which is the driver's node, and three nodes that train, all on this
machine: real LoRA on a tiny base, with the real probe of each node. After random pauses a node is
removed without warning (its processes are killed) and another joins, or a worker is killed. Round after
round the same chains train into an empty directory, whose bytes must equal those of the serial executor.

A lost head and a killed driver are covered by `tests/integration/exactness/test_restarts.py`; slow nodes
are not covered.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import psutil
from ray.cluster_utils import Cluster

from cluster.ray.executor import RayExecutor
from sisa.core.events import Event, Notice, SliceTrained
from sisa.store.blobs.local_blobs import LocalBlobs
from tests.endurance import ground as g
from tests.models.chains import real_chains, serial_bytes
from tests.models.programs.clusters import add_node, own_cluster, remove
from tests.models.scripted import bytes_of

NUM_SHARDS, NUM_NODES, PASSES = 6, 3, (40, 3)
PAUSE_S = (4.0, 16.0)  # between two kills
NODE_KILLS = 0.6  # the share of kills that take a whole node
MAX_RETRIES = 50


class Killer:
    """Kill a random node or worker when called, unless the pause is not over."""

    def __init__(
        self, cluster: Cluster, seed: int, num_nodes: int, pause_s: tuple[float, float]
    ) -> None:
        self.kills = Counter[str]()
        self._cluster, self._random, self._pause_s = cluster, random.Random(seed), pause_s
        self._names = (f"n{number}" for number in count())
        for _ in range(num_nodes):
            add_node(cluster, next(self._names))
        self._pause()

    def __call__(self) -> None:
        if time.monotonic() < self._next:
            return
        self._kill_node() if self._random.random() < NODE_KILLS else self._kill_worker()
        self._pause()

    def _pause(self) -> None:
        self._next = time.monotonic() + self._random.uniform(*self._pause_s)

    def _kill_node(self) -> None:
        nodes = sorted(self._cluster.worker_nodes, key=lambda node: str(node.unique_id))
        remove(self._cluster, self._random.choice(nodes))
        self.kills["node"] += 1
        add_node(self._cluster, next(self._names))

    def _kill_worker(self) -> None:
        here = psutil.Process().children(recursive=True)
        at_work = sorted(each.pid for each in here if each.name().startswith("ray::train_remo"))
        if at_work:
            with suppress(ProcessLookupError):
                os.kill(self._random.choice(at_work), signal.SIGKILL)
                self.kills["worker"] += 1


def run(
    folder: Path,
    seed: int,
    seconds: float,
    *,
    num_nodes: int = NUM_NODES,
    num_shards: int = NUM_SHARDS,
    passes: tuple[int, int] = PASSES,
    pause_s: tuple[float, float] = PAUSE_S,
    show: bool = False,
) -> dict[str, Any]:
    """Run rounds until so many seconds have passed and something was killed, or one is not equal."""
    site, chains = real_chains(folder, num_shards, passes)
    expected = serial_bytes(site, chains)
    notices, failures = Counter[str](), list[str]()
    rounds = trained = 0

    def report(event: Event) -> None:
        nonlocal trained
        if time.monotonic() - started < seconds or not killer.kills:
            killer()  # the last round ends undisturbed
        trained += isinstance(event, SliceTrained)
        if isinstance(event, Notice):
            notices[_kind(event.text)] += 1

    with own_cluster() as cluster:
        killer = Killer(cluster, seed, num_nodes, pause_s)
        started = time.monotonic()
        while not failures and (time.monotonic() - started < seconds or not killer.kills):
            target = folder / f"round-{rounds}"
            here = replace(site, checkpoints_at=LocalBlobs(target))
            RayExecutor(here, cluster.address, None, MAX_RETRIES).run(chains, report)
            rounds += 1
            found = bytes_of(target)
            differing = [name for name, data in expected.items() if found.get(name) != data]
            if differing or found.keys() != expected.keys():
                failures.append(f"round {rounds}: {len(differing)} files differ")
            shutil.rmtree(target)
            if show:
                print(f"round {rounds}: {dict(killer.kills)}", file=sys.stderr, flush=True)
    return {
        "seconds": round(time.monotonic() - started, 1),
        "seed": seed,
        "nodes_that_train": num_nodes,
        "rounds": rounds,
        "slices_trained": trained,
        "files_compared": rounds * len(expected),
        "kills": dict(killer.kills),
        "told": dict(notices),
        "failures": failures,
    }


def _kind(text: str) -> str:
    for kind in ("is lost", "died", "never trains", "silent"):
        if kind in text:
            return kind
    return "other"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="tests.endurance.nodes")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="sisa-nodes-") as folder:
        found = run(Path(folder), chosen.seed, chosen.seconds, show=True)
    print(f"{found['rounds']} rounds, kills {found['kills']}, {found['seconds']} s", *found["failures"])
    return g.ended(found, chosen.out)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
