"""The number of examples of a property: a share in the suite, all of them with one option.

    python -m pytest tests/property --hypothesis-profile full

>>> num_examples(2_000) in (250, 2_000)
True
"""

from __future__ import annotations

from hypothesis import settings

FULL = "full"
SHARE = 8  # the suite tries one example in so many


def is_full() -> bool:
    """Return whether all examples are tried."""
    return settings.get_current_profile_name() == FULL


def num_examples(full: int, share: int = SHARE) -> int:
    """Return how many to try of a property whose full run tries `full`: all, or one in `share`."""
    return full if is_full() else -(-full // share)
