"""The zlib attack: the loss, against how well the text compresses.

Formula: score = mean log-probability of the tokens / bytes of the zlib-compressed UTF-8 text.
Source: Carlini et al. (2021, arXiv 2012.07805), section 5.2; zjysteven/mink-plus-plus `run.py`.

Rules: pure; a higher score says member.

Not covered: other compressors. Known limit: zlib adds about ten bytes to any text, so that short answers
are hardly told apart by it.

>>> zlib_score([-1.0, -3.0], "aaaaaaaaaaaaaaaa") == -2.0 / 11
True
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from approx.metrics.loss_attack import loss_score


def zlib_score(token_logprobs: Sequence[float], text: str) -> float:
    """Nats per token and compressed byte. Raises ValueError for no tokens."""
    return loss_score(token_logprobs) / len(zlib.compress(text.encode("utf-8")))
