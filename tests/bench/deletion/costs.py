"""The cost of deleting one record (`one_record.py`), and of Ray (`executors.py`), on the same records.

    python -m tests.bench.deletion.costs --tofu DIRECTORY --out tests/bench/deletion/costs.json

Ratios are of one run on one machine.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.bench.command import BASE, TOFU, arguments, data_name, here, low_to_high, markdown, write
from tests.bench.deletion import one_record
from tests.bench.deletion.equal_shards import Bench
from tests.bench.scale.rollback import clean_heads
from tests.bench.training import executors

Json = dict[str, Any]


def run(bench: Bench) -> Json:
    """Run all benchmarks, in order."""
    return {
        **here(),
        "data": data_name(bench.tofu),
        "layout": {
            "base_model": bench.base_model,
            "shards": bench.shards,
            "slices": bench.slices,
            "records": bench.shards * bench.slices * bench.per_cell,
            "epochs": bench.epochs,
        },
        "deletion": one_record.measure(bench),
        "executors": executors.measure(bench),
    }


def table(found: Json, executors_alone: Json, rollback: Json) -> Iterator[str]:
    """Yield what a deletion, Ray and a rollback cost; the last two are other benchmarks' results."""
    deletions, ray = found["deletion"]["deletions"], found["executors"]

    def each(name: str) -> str:
        return ", ".join(f"{deletion[name]:.3f}" for deletion in deletions)

    def rest(ran: Json) -> str:
        base = ran["ray_2"]["base_pss_mb"][0]
        return low_to_high((each - base for each in ran["ray_2"]["worker_pss_mb"]), ".0f")

    lines = [
        (
            "deleting one record of slice 0, 1, 2 against training everything, in seconds, the probe of "
            "the base included",
            each("ratio"),
        ),
        ("the same in record-epochs", each("record_epoch_share")),
        ("SISA's closed form for large slices", each("closed_form")),
        ("Ray with one worker against the serial executor", f"{ray['ray_1_over_serial']:.2f}"),
        ("two Ray workers against one", f"{ray['speedup_of_two_workers']:.2f} times as fast"),
        (
            "two Ray workers against the serial executor, of ideal",
            f"{ray['efficiency_of_two_workers']:.2f}",
        ),
        (
            "what Ray adds to a slice (`tests/bench/training/executors.json`)",
            f"{executors_alone['overhead_per_slice_s'] * 1000:.0f} ms",
        ),
        (
            "memory (PSS) of one more worker: the base's pages",
            f"{ray['base_growth_per_extra_worker']:.1%} of the base: one copy of {ray['base_mb']} MB "
            "for all",
        ),
        (
            "the same, all else (libraries, gradients, activations of batches of 2)",
            f"{rest(ray)} MB; {rest(executors_alone)} MB with records half as long",
        ),
        (
            "start-up of Ray and its workers, apart from the above",
            f"{ray['ray_2']['start_up_seconds']:.1f} s",
        ),
    ]
    first, *middle, last = rollback["sizes"]
    times = rollback["growth"]
    of_first = (
        "from a request to clean heads, 64 shards x 8 slices (`tests/bench/scale/rollback.json`): "
    )
    of_last = f": {times['records']:.0f} times as many, {times['clean_heads_p50']:.0f} times the time"
    lines += [(of_first + _records(first), clean_heads(first))]
    lines += [(_records(each), clean_heads(each)) for each in middle]
    lines += [(_records(last) + of_last + "; no other shard is read", clean_heads(last))]
    yield from markdown(("what", "measured"), lines)


def _records(size: Json) -> str:
    return f"{size['records']:,} records"


def main() -> None:
    given = arguments(__doc__, out=Path("costs.json"), tofu=TOFU, base_model=BASE, per_cell=4, epochs=4)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_STATE_HOME"] = folder  # a benchmark's models leave no witness behind
        bench = Bench(
            Path(folder),
            given.base_model,
            per_cell=given.per_cell,
            epochs=given.epochs,
            tofu=given.tofu,
        )
        found = run(bench)
    write(given.out, found)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
