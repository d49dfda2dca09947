"""The block `cluster:` of the run file: where training runs, and what a worker takes of a node.

Rules: nothing here reaches a bit, so a change costs nothing.

Not covered: what Ray makes of it (`cluster/ray/ray_executor.py`); a base from scratch, which trains on
CPUs.

>>> ClusterBlock(num_gpus=0.25).num_gpus
0.25
"""

from __future__ import annotations

from pydantic import field_validator

from sisa.core.config_types import Block, Float, Int, Name, conflict, key


class ClusterBlock(Block):
    """Where training runs; reaches no bit of it."""

    address: Name | None = key(None, "none", "Address of a running Ray; null starts a local one.")
    num_workers: Int | None = key(
        None, "none", "Shards trained at once; null: CPUs // threads_per_shard.", ge=1, le=10_000
    )
    num_gpus: Float | None = key(
        None, "none", "GPUs of one worker, such as 0.25; null: 1 with device cuda.", ge=0.001, le=64
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

    @field_validator("num_gpus")
    @classmethod
    def _share_or_whole(cls, value: float | None) -> float | None:
        if value is not None and value > 1 and not value.is_integer():
            raise conflict(f"expected a share of one GPU, or whole GPUs, got {value}")
        return value
