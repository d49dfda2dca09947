"""One row of an evaluation's log: what was measured on one question.

The names of what locuslab's logs hold are theirs. Their published `eval_log_aggregated.json` holds
columns by set, `{"eval_log_forget.json": {"avg_gt_loss": {"0": 1.8, ...}, ...}, ...}`, and becomes the
same rows. A row with a value that is no number, or that lacks one, is refused.

>>> row = LogRow("retain", 0, 0.7, 3, "Ada.", 0.9, (1.0, 2.0), 1.0, "Ada.")
>>> parse_row(row.line()) == row
True
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

from sisa.core.digest import canonical_json

SCORES = (
    "num_token_said",
    *("extraction_strength", "exact_memorisation"),
    *("loss", "zlib", "min_k", "min_k_plus_plus"),
)

PUBLISHED = {
    "eval_log.json": "retain",
    "eval_real_author_wo_options.json": "real_authors",
    "eval_real_world_wo_options.json": "world_facts",
    "eval_log_forget.json": "forget",
}
ROW_COLUMNS = (
    "avg_gt_loss",
    "num_token_gt",
    "avg_paraphrased_loss",
    "average_perturb_loss",
    "rougeL_recall",
)


@dataclass(frozen=True)
class LogRow:
    """What was measured on one question. Losses are per token, in nats; None: not asked of this set.

    The last seven are absent from locuslab's logs; `num_token_said` leaves out what closes the answer.
    """

    set: str
    idx: int
    avg_gt_loss: float
    num_token_gt: int
    ground_truth: str = field(repr=False)
    avg_paraphrased_loss: float | None
    average_perturb_loss: tuple[float, ...]
    rougeL_recall: float | None
    generation: str | None = field(repr=False)
    extraction_strength: float | None = None
    exact_memorisation: float | None = None
    loss: float | None = None
    zlib: float | None = None
    min_k: float | None = None
    min_k_plus_plus: float | None = None
    num_token_said: int | None = None

    @property
    def place(self) -> tuple[str, int]:
        return self.set, self.idx

    def line(self) -> bytes:
        return canonical_json(asdict(self)) + b"\n"


def parse_row(line: bytes) -> LogRow:
    """Return the row that a line of JSON holds. Raises ValueError for anything else."""
    try:
        return _row(json.loads(line))
    except RecursionError as error:
        raise ValueError("not a row of a log") from error


def published_rows(held: Any) -> list[LogRow] | None:
    """Return the rows of locuslab's published columns, or None for JSON in another form.

    The forget set is called "forget": the file does not say which one it is. Raises ValueError for
    columns that lack a value, or hold one of another kind.
    """
    if not isinstance(held, dict) or not held or not held.keys() <= PUBLISHED.keys():
        return None
    rows = []
    for name, columns in held.items():
        try:
            for number, (_, generation, truth) in columns["generated_text"].items():
                row = {each: columns[each][number] for each in ROW_COLUMNS}
                texts = {"generation": generation, "ground_truth": truth}
                rows.append(_row({"set": PUBLISHED[name], "idx": int(number), **row, **texts}))
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError("not columns of a published log") from error
    return rows


def _row(held: Any) -> LogRow:
    try:
        kept = {name: held[name] for name in LogRow.__dataclass_fields__ if name in held}
        kept["average_perturb_loss"] = tuple(held["average_perturb_loss"])
        row = LogRow(**kept)
    except (TypeError, KeyError) as error:
        raise ValueError("not a row of a log") from error
    optional = (row.avg_paraphrased_loss, row.rougeL_recall, *(getattr(row, name) for name in SCORES))
    numbers = [
        row.avg_gt_loss,
        *row.average_perturb_loss,
        *(each for each in optional if each is not None),
    ]
    kinds = isinstance(row.set, str) and isinstance(row.idx, int) and isinstance(row.ground_truth, str)
    if not kinds or not all(map(_is_number, numbers)):
        raise ValueError("not a row of a log")
    return row


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
