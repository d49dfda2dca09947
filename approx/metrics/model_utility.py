"""Model utility: what a model still knows that it should know, and its aggregate with forget quality.

Formula: the harmonic mean of nine numbers: probability, ROUGE-L recall and truth ratio (max(0, 1 - R))
on the retain set, on real authors and on world facts. On the last two, probability is the share among
the wrong options. The aggregate is the harmonic mean of forget quality and utility.

Source: TOFU (Maini et al. 2024), section 2.2.1; locuslab/tofu `get_model_utility`; the aggregate as in
open-unlearning (Dorna et al. 2025).

Limits: the smallest term rules the harmonic mean, and one zero makes it zero. Real authors and world
facts have only 100 and 117 questions. A forget quality is a p-value, so the aggregate is close to 0 for
any model that the test rejects, however useful.

>>> harmonic_mean([1.0, 0.5])
0.6666666666666666
>>> model_utility(dict.fromkeys(NINE, 0.25))
0.25
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import hmean

UTILITY_SETS = ("retain", "real_authors", "world_facts")
MEASURES = ("probability", "rouge", "truth_ratio")
NINE = tuple(f"{measure} {name}" for name in UTILITY_SETS for measure in MEASURES)


def harmonic_mean(values: Sequence[float]) -> float:
    """Return the harmonic mean, 0 if a value is 0. Raise ValueError for none, negatives or NaN."""
    found = np.array(values, dtype=np.float64)
    if not len(found) or not bool((found >= 0).all()):
        raise ValueError("a harmonic mean needs numbers from 0")
    return float(hmean(found)) if bool((found > 0).all()) else 0.0


def model_utility(values: Mapping[str, float]) -> float:
    """Return the harmonic mean of the nine in `NINE`, in [0, 1]. Raise ValueError for other names."""
    if set(values) != set(NINE):
        raise ValueError("model utility needs exactly nine numbers")
    return harmonic_mean([values[name] for name in NINE])


def aggregate(forget_quality: float, utility: float) -> float:
    """Return the harmonic mean of forget quality (a p-value) and model utility."""
    return harmonic_mean([forget_quality, utility])
