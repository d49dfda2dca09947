"""The types of the fixtures `sisa` and `ask`, which run a command line (`conftest.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Sisa = Callable[..., tuple[int, str, str]]  # exit code, standard output, standard error
Ask = Callable[..., dict[str, Any]]  # the JSON object
