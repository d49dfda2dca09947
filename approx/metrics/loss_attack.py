"""The loss attack: what a model was trained on, it finds likelier.

Formula: score = mean log-probability of the tokens (the negative of the loss).
Source: Yeom et al. (2018, arXiv 1709.01604); zjysteven/mink-plus-plus `run.py`.

Rules: pure. As of all attacks here, a higher score says member. A score alone says nothing: `auc.py`
compares those of members and non-members.

Not covered: calibration by another model. Known limit: easy text looks like a member.

>>> loss_score([-1.0, -3.0])
-2.0
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def loss_score(token_logprobs: Sequence[float]) -> float:
    """The mean of log-probabilities, in nats. Raises ValueError for no tokens."""
    if len(token_logprobs) == 0:
        raise ValueError("a text without tokens")
    return float(np.mean(np.array(token_logprobs, dtype=np.float64)))
