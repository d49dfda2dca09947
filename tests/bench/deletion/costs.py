"""Run the benchmarks: ratios measured in one run on one machine, printed and written as JSON.

    python -m tests.bench.deletion.costs --out costs.json

There is no pass or fail; the result has the machine and the versions beside the ratios.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from tests.bench.command import BASE, arguments, here, write
from tests.bench.deletion import one_record
from tests.bench.deletion.equal_shards import Bench, source
from tests.bench.training import executors


def run(bench: Bench) -> dict[str, Any]:
    """Run all benchmarks, in order."""
    return {
        **here(),
        "data": source(),
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


def table(found: dict[str, Any]) -> str:
    """Return the ratios in words."""
    parts = found["deletion"], found["executors"]
    lines = [
        f"deleting one record of slice {each['slice']} / training everything: {each['ratio']:.3f} "
        f"(record-epochs {each['record_epoch_share']:.3f}, closed form {each['closed_form']:.3f})"
        for each in parts[0]["deletions"]
    ]
    return "\n".join(
        [
            *lines,
            f"Ray with one worker / serial: {parts[1]['ray_1_over_serial']:.3f}",
            f"two workers over one: {parts[1]['speedup_of_two_workers']:.2f} times as fast",
            f"two workers over serial: {parts[1]['efficiency_of_two_workers']:.2f} of ideal",
            f"Ray's part of a slice: {parts[1]['overhead_per_slice_s'] * 1000:.0f} ms",
            f"PSS of one more worker: {parts[1]['extra_worker_pss_mb']} MB; of the base, which has "
            f"{parts[1]['base_mb']} MB, {parts[1]['base_growth_per_extra_worker']:.1%}",
            f"start-up of Ray and its workers: {parts[1]['ray_2']['start_up_seconds']:.1f} s",
        ]
    )


def main() -> None:
    """Run the command."""
    given = arguments(__doc__, out=Path("costs.json"), base_model=BASE, per_cell=4, epochs=4)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_STATE_HOME"] = folder  # a benchmark's models leave no witness behind
        options = {"per_cell": given.per_cell, "epochs": given.epochs}
        found = run(Bench(Path(folder), given.base_model, **options))
    write(given.out, found)
    print(table(found))


if __name__ == "__main__":
    main()
