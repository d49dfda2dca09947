"""How many examples a property tries: a share of them in the suite, all of them by one command.

    python -m pytest tests/property --hypothesis-profile full

>>> num_examples(2_000) in (400, 2_000)
True
"""

from __future__ import annotations

from hypothesis import settings

FULL = "full"
SHARE = 5  # the suite tries one example in so many


def num_examples(full: int, share: int = SHARE) -> int:
    """Return how many to try of a property whose full run tries `full`: all, or one in `share`."""
    return full if settings.get_current_profile_name() == FULL else -(-full // share)
