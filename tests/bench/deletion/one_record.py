"""Seconds of deleting one record against training everything again, with the base loaded.

Used by `costs.py`. A record of each slice is deleted in turn. Beside its seconds stand its share in
record-epochs and the closed form of SISA's section V for equal slices: a deletion in slice r of R (from
1) retrains stages r..R, each 2/(R+1) passes over its slices, of one shard out of S.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from statistics import mean
from typing import Any

from sisa import Model, train_model
from sisa.core.ports import Executor
from sisa.flows.chains import Site
from sisa.flows.wiring.executors import open_serial
from tests.bench.deletion.equal_shards import Bench


def warm(site: Site, options: Mapping[str, Any]) -> Executor:
    """Return the serial executor with its base loaded, so that only training is timed."""
    from sisa.lm.base.weights import load_base

    load_base(site.base)
    return open_serial(site, options)


def closed_form(bench: Bench, slice_: int) -> float:
    """Return the share of a full training for one deletion in a slice, without rounding."""
    stages = range(slice_ + 1, bench.slices + 1)
    return sum(2 / (bench.slices + 1) * stage / bench.slices for stage in stages) / bench.shards


def measure(bench: Bench) -> dict[str, Any]:
    """Return the ratios of one deletion in each slice to a full training, and their mean."""
    config = bench.config("deletion")
    train_model(bench.config("warm-up").model_copy(update={"num_epochs": 1}), executor=warm)
    started = time.monotonic()
    train_model(config, executor=warm)
    full_s = time.monotonic() - started
    model = Model(config.output_dir, executor=warm)
    rows = []
    for slice_ in range(bench.slices):
        chosen = next(
            each
            for each in model.where([record.id for record in bench.records()])
            if each.state == "trained" and each.slice == slice_
        )
        started = time.monotonic()
        request = model.forget([chosen.id]).request
        seconds = time.monotonic() - started
        assert request is not None
        rows.append(
            {
                "slice": slice_,
                "seconds": round(seconds, 3),
                "ratio": round(seconds / full_s, 4),
                "record_epoch_share": round(
                    request.record_epochs_retrained / request.record_epochs_full, 4
                ),
                "closed_form": round(closed_form(bench, slice_), 4),
            }
        )
    return {
        "full_training_seconds": round(full_s, 3),
        "deletions": rows,
        "mean_ratio": round(mean(each["ratio"] for each in rows), 4),
    }
