"""The loss attack: a model finds the texts likelier that it was trained on.

Formula: score = mean log-probability of the tokens (the negative of the loss).

Source: Yeom et al. (2018, arXiv 1709.01604); zjysteven/mink-plus-plus `run.py`.

In all attacks here a higher score means member. A score alone means nothing; `auc.py` compares the
scores of members and non-members. Limit: easy text looks like a member, as nothing is calibrated by
another model.

>>> loss_score([-1.0, -3.0])
-2.0
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def loss_score(token_logprobs: Sequence[float]) -> float:
    """Return the mean of log-probabilities, in nats. Raise ValueError for no tokens."""
    if len(token_logprobs) == 0:
        raise ValueError("a text without tokens")
    return float(np.mean(np.array(token_logprobs, dtype=np.float64)))
