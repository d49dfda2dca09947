"""Ray against the serial executor on equal shards, and what one more worker costs in memory.

One worker should cost at most a tenth more than the serial executor, two should be at least 1.7 times as
fast as one. Start-up (Ray, worker processes, the base in each) is reported apart: every executor first
trains the same chains once into another directory. Memory is the proportional set size (PSS) of the
worker processes, which counts shared pages once; resident size would count the shared base in each.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from cluster.ray_executor import RayExecutor
from sisa import train_model
from sisa.domain import Chain
from sisa.events import Event
from sisa.model.base import resolve_base
from sisa.opening import open_serial
from sisa.plan import jobs
from sisa.ports import Executor
from sisa.serial import Site
from sisa.store.ledger import SqlLedger
from sisa.store.local_place import LocalPlace
from tests.bench.deletion import warm
from tests.bench.equal import Bench


def silent(_event: Event) -> None:
    """Benchmarks show their results only."""


def measure(bench: Bench) -> dict[str, Any]:
    """Seconds and ratios for serial, one and two workers."""
    config = bench.config("executors")
    model, _ = train_model(config, executor=warm, allow_deleted=True)
    base = resolve_base(config.base)
    ledger = SqlLedger(model.directory / "ledger.sqlite")
    recipe = config.recipe(base.digest)
    fingerprint = ledger.checkpoints()[0].fingerprint
    chains = []
    for shard in range(bench.shards):
        files = tuple(ledger.slices(shard))
        chains.append(Chain(shard, jobs(shard, files, recipe, fingerprint), None, files))
    ledger.close()

    def site(name: str) -> Site:
        target = bench.folder / "executors" / name
        shutil.rmtree(target, ignore_errors=True)
        records = LocalPlace(model.directory / "records")
        return Site(records, LocalPlace(target), base.directory, base.digest, 1)

    serial = _timed(lambda each: open_serial(each, {}), site, chains)
    found: dict[str, Any] = {"serial": serial}
    for workers in (1, 2):
        with RayExecutor(site("none"), num_workers=workers):
            found[f"ray_{workers}"] = _timed(
                lambda each, workers=workers: RayExecutor(each, num_workers=workers),  # type: ignore[misc]
                site,
                chains,
            )
            found[f"ray_{workers}"]["worker_pss_mb"] = worker_pss_mb()
    one, two = found["ray_1"], found["ray_2"]
    pss_one, pss_two = sum(one["worker_pss_mb"]), sum(two["worker_pss_mb"])
    base_mb = sum(file.stat().st_size for file in base.directory.glob("*.safetensors")) / 2**20
    found["ray_1_over_serial"] = round(one["seconds"] / serial["seconds"], 3)
    found["speedup_of_two_workers"] = round(one["seconds"] / two["seconds"], 3)
    found["extra_worker_pss_mb"] = round(pss_two - pss_one)
    found["base_mb"] = round(base_mb)
    return found


def _timed(
    open_executor: Callable[[Site], Executor], site: Callable[[str], Site], chains: list[Chain]
) -> dict[str, Any]:
    started = time.monotonic()
    open_executor(site("first")).run(chains, silent)
    first_s = time.monotonic() - started
    started = time.monotonic()
    open_executor(site("again")).run(chains, silent)
    seconds = time.monotonic() - started
    return {"seconds": round(seconds, 3), "start_up_seconds": round(max(0.0, first_s - seconds), 3)}


def worker_pss_mb() -> list[int]:
    """PSS of this machine's Ray workers that hold the base."""
    found = []
    for process in psutil.process_iter(["name", "cmdline"]):
        title = " ".join(process.info["cmdline"] or [])
        if "train_remotely" in title or title.startswith("ray::"):
            path = Path(f"/proc/{process.pid}/smaps_rollup")
            pss = next(line for line in path.read_text().splitlines() if line.startswith("Pss:"))
            found.append(int(pss.split()[1]) // 1024)
    return [each for each in found if each > 200]  # the mailbox and idle workers hold no base
