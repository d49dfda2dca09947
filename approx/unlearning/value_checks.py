"""Checks of hyper-parameters and settings: each yields the problems of the values that do not fit.

>>> list(above_zero(beta=0.1, gamma=-1.0))
[Problem(where='gamma', what='-1.0, expected a number above 0')]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

from sisa.core.errors import InvalidInput, Problem


def given(**values: Any) -> dict[str, Any]:
    """Return the values that are not None, of settings that may be left out."""
    return {name: value for name, value in values.items() if value is not None}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _unfit(values: Mapping[str, Any], fits: Callable[[Any], bool], expected: str) -> Iterator[Problem]:
    for name, value in values.items():
        if not fits(value):
            yield Problem(name, f"{value!r}, expected {expected}")


def above_zero(**values: float) -> Iterator[Problem]:
    """Yield a problem for each value that is not a finite number above 0."""
    return _unfit(values, lambda value: _is_number(value) and value > 0, "a number above 0")


def at_least_zero(**values: float) -> Iterator[Problem]:
    """Yield a problem for each value that is not a finite number of at least 0."""
    return _unfit(values, lambda value: _is_number(value) and value >= 0, "a number of at least 0")


def whole_numbers(low: float = -math.inf, high: float = math.inf, **values: object) -> Iterator[Problem]:
    """Yield a problem for each value that is not a whole number from `low` to `high`."""
    span = f" from {low}" * (low > -math.inf) + f" to {high}" * (high < math.inf)

    def fits(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high

    return _unfit(values, fits, f"a whole number{span}")


def booleans(**values: object) -> Iterator[Problem]:
    """Yield a problem for each value that is neither true nor false."""
    return _unfit(values, lambda value: isinstance(value, bool), "true or false")


def one_of(allowed: tuple[str, ...], **values: str) -> Iterator[Problem]:
    """Yield a problem for each value that is not among the allowed ones."""
    return _unfit(values, allowed.__contains__, f"one of {', '.join(allowed)}")


def check_values(what: str, *found: Iterable[Problem]) -> None:
    """Raise InvalidInput with all problems, if there are any."""
    problems = list(chain(*found))
    if problems:
        raise InvalidInput(
            f"{what} can't be used with these values",
            where=", ".join(each.where for each in problems),
            next_step="correct the values",
            problems=problems,
        )
