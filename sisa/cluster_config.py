"""The block `cluster:` of the run file: where training runs.

Rules: no key reaches a bit of an adapter, so a change of one costs nothing.

Not covered: running on it (the package `cluster`).

>>> ClusterBlock(num_workers=2).max_retries
3
"""

from __future__ import annotations

from sisa.config_types import Block, Float, Int, Name, key


class ClusterBlock(Block):
    """Where training runs; reaches no bit of it."""

    address: Name | None = key(None, "none", "Address of a running Ray; null starts a local one.")
    num_workers: Int | None = key(
        None, "none", "Shards trained at once; null: CPUs // threads_per_shard.", ge=1, le=10_000
    )
    max_retries: Int = key(
        3,
        "none",
        "Restarts in a row of a shard whose worker died, without a slice done.",
        ge=0,
        le=1000,
    )
    stall_limit_s: Float | None = key(
        1800.0, "none", "Seconds of silence after which a worker is killed; null: never.", gt=0
    )
