"""The zlib attack: the loss relative to how well the text compresses.

Formula: score = mean log-probability of the tokens / bytes of the zlib-compressed UTF-8 text. A higher
score means member.

Source: Carlini et al. (2021, arXiv 2012.07805), section 5.2; zjysteven/mink-plus-plus `run.py`.

Limit: zlib adds about ten bytes to any text, so it hardly distinguishes short answers.

>>> zlib_score([-1.0, -3.0], "aaaaaaaaaaaaaaaa") == -2.0 / 11
True
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from approx.metrics.loss_attack import loss_score


def zlib_score(token_logprobs: Sequence[float], text: str) -> float:
    """Return nats per token and compressed byte. Raise ValueError for no tokens."""
    return loss_score(token_logprobs) / len(zlib.compress(text.encode("utf-8")))
