"""Unlearning depth score: how deep in a model's layers knowledge is gone, by activation patching.

Formula: Delta_l = mean over the answer's tokens of log p_before(token) - log p_patched(token). "Patched"
is the model before unlearning; at the positions that predict the answer, its hidden states after layer l
are replaced by those of another model. S1 takes them from a model that never saw the text, S2 from
the unlearned one. Over the layers with Delta_l^S1 > 0.05,

    score = sum_l Delta_l^S1 clip(Delta_l^S2 / Delta_l^S1, 0, 1) / sum_l Delta_l^S1

0: the unlearned model's states still give the answer everywhere. 1: they give no more of it than those
of the model that never saw it. A text without such a layer has no score. `approx/attacks/depth.py`
patches.

Source: Lee, Kim and Jo 2026, "Measuring the depth of LLM unlearning via activation patching" (arXiv
2605.24614), sections 3.2 and 3.3.

Limits: it needs the model before and one that never saw the text, of one base. It judges whether *this*
base could use the states, not whether another reader could. The paper scores hand-marked entities; a
whole answer also holds words that are easy for any model, which add to neither gap.

>>> depth_score([0.0, 1.0, 3.0], [0.0, 1.0, 0.0])
0.25
>>> depth_score([1.0, 1.0], [2.0, -1.0]), depth_score([0.01], [1.0])
(0.5, None)
"""

from __future__ import annotations

from collections.abc import Sequence

MIN_GAP = 0.05  # nats per token


def depth_score(retained_gaps: Sequence[float], unlearned_gaps: Sequence[float]) -> float | None:
    """Return the score in [0, 1] from each layer's gaps, or None without a layer that has one.

    Raise ValueError for gaps of different layers.
    """
    gaps = [pair for pair in zip(retained_gaps, unlearned_gaps, strict=True) if pair[0] > MIN_GAP]
    if not gaps:
        return None
    erased = sum(min(max(unlearned, 0.0), retained) for retained, unlearned in gaps)
    return erased / sum(retained for retained, _ in gaps)
