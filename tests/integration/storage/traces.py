"""What would reveal that a model has held records."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sisa.data.samples import distinctive_word
from sisa.lm.routing.embedder import HashingEmbedder
from sisa.lm.routing.names import NameEmbedder
from tests.models.tiny_model import Row


def traces(rows: Sequence[Row], subject: bool = False) -> list[str]:
    """Return everything that would reveal these records."""
    found = [str(row[key]).strip() for row in rows for key in ("id", "prompt", "completion")]
    found += [distinctive_word(row["completion"]) for row in rows]
    return found + [str(row["subject_id"]) for row in rows if subject]


def vector(row: Row) -> bytes:
    text = f"{row['prompt']}\n{row['completion']}"
    data: bytes = NameEmbedder(HashingEmbedder()).embed([text])[0].astype(np.float32).tobytes()
    return data
