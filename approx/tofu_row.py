"""One line of an evaluation's log: what was measured on one question.

Rules: pure. The names of what locuslab's logs hold are theirs, so that the published logs are read as
they are. A line with a value that is no number, or lacks one, is no row.

Not covered: the file (`tofu_log.py`).

>>> row = LogRow("retain", 0, 0.7, 3, "Ada.", 0.9, (1.0, 2.0), 1.0, "Ada.")
>>> parse_row(row.line()) == row
True
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

from sisa.digest import canonical_json

SCORES = (
    *("extraction_strength", "exact_memorisation"),
    *("loss", "zlib", "min_k", "min_k_plus_plus"),
)


@dataclass(frozen=True)
class LogRow:
    """What was measured on one question. Losses are per token, in nats; None: not asked of this set.

    The last six are absent from locuslab's logs.
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

    @property
    def place(self) -> tuple[str, int]:
        return self.set, self.idx

    def line(self) -> bytes:
        return canonical_json(asdict(self)) + b"\n"


def parse_row(line: bytes) -> LogRow:
    """A row of ours or of locuslab's. Raises ValueError for anything else."""
    try:
        held = json.loads(line)
        kept = {name: held[name] for name in LogRow.__dataclass_fields__ if name in held}
        kept["average_perturb_loss"] = tuple(held["average_perturb_loss"])
        row = LogRow(**kept)
    except (TypeError, KeyError, RecursionError) as error:
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
