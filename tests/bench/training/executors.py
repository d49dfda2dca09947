"""Ray against the serial executor on equal shards, and the memory of one more worker.

    python -m tests.bench.training.executors --tofu DIRECTORY --out tests/bench/training/executors.json

One worker should cost at most a tenth more than the serial executor, and two should be at least 0.9 of
twice as fast. Start-up (Ray, worker processes, the base in each) is reported separately: every executor
first trains the same chains once into another directory. What Ray adds to a slice is measured with
slices that cost next to nothing. Memory is the proportional set size (PSS) of the worker processes,
which counts shared pages once, and the part of it that is the base's file: one more worker should not
add to that. The rest (Python, torch, gradients, activations, optimizer) is each worker's own.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from cluster.ray.executor import RayExecutor
from cluster.ray.session import disconnect
from sisa import train_model
from sisa.core.domain import Chain
from sisa.core.events import silent
from sisa.core.ports import Executor
from sisa.flows.chains import SerialExecutor, Site
from sisa.flows.wiring.executors import open_serial
from sisa.lm.base.weights import resolve_base
from sisa.planning.plan import jobs
from sisa.store.blobs.local_blobs import LocalBlobs
from sisa.store.ledger.ledger import SqlLedger
from tests.bench.command import BASE, TOFU, arguments, data_name, low_to_high, markdown, write
from tests.bench.training.equal_shards import Bench, warm
from tests.endurance.ground import environment
from tests.fakes.keyring import PLAIN
from tests.models.scripted import NUM_SHARDS, NUM_SLICES, make_chains, make_site, open_scripted

OVERHEAD_ROUNDS = 20
MAPPING = re.compile(r"[0-9a-f]+-[0-9a-f]+ ")  # a line of smaps that begins a mapping


def measure(bench: Bench) -> dict[str, Any]:
    """Return seconds and ratios for serial, one and two workers."""
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
        records = LocalBlobs(model.directory / "records")
        return Site(records, LocalBlobs(target), base, 1, PLAIN)

    serial = _timed(partial(open_serial, options={}), site, chains)
    found: dict[str, Any] = {"serial": serial}
    for workers in (1, 2):
        timed = _timed(partial(RayExecutor, num_workers=workers), site, chains)
        found[f"ray_{workers}"] = timed | memory(base.directory)
        disconnect()
    one, two = found["ray_1"], found["ray_2"]
    base_mb = sum(file.stat().st_size for file in base.directory.glob("*.safetensors")) / 2**20
    more = sum(two["base_pss_mb"]) - sum(one["base_pss_mb"])
    found["ray_1_over_serial"] = round(one["seconds"] / serial["seconds"], 3)
    found["speedup_of_two_workers"] = round(one["seconds"] / two["seconds"], 3)
    found["efficiency_of_two_workers"] = round(serial["seconds"] / two["seconds"] / 2, 3)
    found["extra_worker_pss_mb"] = round(sum(two["worker_pss_mb"]) - sum(one["worker_pss_mb"]))
    found["base_mb"] = round(base_mb)
    found["base_growth_per_extra_worker"] = round(more / base_mb, 3)
    found["overhead_per_slice_s"] = overhead(bench.folder / "overhead")
    return found


def overhead(folder: Path) -> float:
    """Return the seconds that Ray adds to a slice, over slices that cost next to nothing."""
    site = make_site(folder)
    chains = make_chains(site)

    def seconds(run: Callable[[Site], None]) -> float:
        run(replace(site, checkpoints_at=LocalBlobs(folder / "warm")))
        started = time.monotonic()
        for number in range(OVERHEAD_ROUNDS):
            run(replace(site, checkpoints_at=LocalBlobs(folder / f"round-{number}")))
        taken = time.monotonic() - started
        for each in folder.glob("round-*"):
            shutil.rmtree(each)
        shutil.rmtree(folder / "warm")
        return taken

    serial = seconds(lambda here: SerialExecutor(*open_scripted(here)).run(chains, silent))
    on_ray = seconds(lambda here: RayExecutor(here, None, 1, 0, open_scripted).run(chains, silent))
    disconnect()
    return round((on_ray - serial) / (OVERHEAD_ROUNDS * NUM_SHARDS * NUM_SLICES), 4)


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


def memory(base_dir: Path) -> dict[str, list[int]]:
    """Return the PSS of this process's Ray workers that hold the base, and the part that is its files.

    The second number includes this process. A page mapped by many processes is counted in parts that
    add up to one.
    """
    total, shared = [], []
    here = psutil.Process()
    for process in [here, *here.children(recursive=True)]:
        pss = Counter[bool]()  # of the base's files (True), and of all else
        of_base = False
        for line in Path(f"/proc/{process.pid}/smaps").read_text().splitlines():
            if MAPPING.match(line):
                of_base = str(base_dir) in line
            elif line.startswith("Pss:"):
                pss[of_base] += int(line.split()[1])
        if pss[True]:  # the mailbox and idle workers hold no base
            shared.append(pss[True] // 1024)
            if process != here:
                total.append(pss.total() // 1024)
    return {"worker_pss_mb": total, "base_pss_mb": shared}


def table(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield what Ray costs, and another of its workers."""
    two = found["ray_2"]
    rest = low_to_high((each - two["base_pss_mb"][0] for each in two["worker_pss_mb"]), ".0f")
    growth, base_mb = found["base_growth_per_extra_worker"], found["base_mb"]
    lines = [
        ("Ray with one worker against the serial executor", f"{found['ray_1_over_serial']:.2f}"),
        ("two Ray workers against one", f"{found['speedup_of_two_workers']:.2f} times as fast"),
        (
            "two Ray workers against the serial executor, of ideal",
            f"{found['efficiency_of_two_workers']:.2f}",
        ),
        ("what Ray adds to a slice", f"{found['overhead_per_slice_s'] * 1000:.0f} ms"),
        (
            "memory (PSS) of one more worker: the base's pages",
            f"{growth:.1%} of the base: one copy of {base_mb} MB for all",
        ),
        ("the same, all else (libraries, gradients, activations of batches of 2)", f"{rest} MB"),
        (
            "start-up of Ray and its workers, apart from the above",
            f"{two['start_up_seconds']:.1f} s",
        ),
    ]
    yield from markdown(("what", "measured"), lines)


def main() -> None:
    given = arguments(__doc__, out=Path("executors.json"), tofu=TOFU, base_model=BASE, epochs=4)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_STATE_HOME"] = folder  # a benchmark's models leave no witness behind
        bench = Bench(Path(folder), given.base_model, epochs=given.epochs, tofu=given.tofu)
        before = os.getloadavg()[0]
        found = {
            **environment(),
            "base_model": given.base_model,
            "data": data_name(given.tofu),
            "slices": bench.shards * bench.slices,
            "load_before": round(before, 1),
            **measure(bench),
        }
    write(given.out, found)
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
