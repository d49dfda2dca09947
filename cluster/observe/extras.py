"""Import the libraries of extras when they are needed.

A missing library raises an EnvironmentFault that names the extra.

>>> library("json", "tools").__name__
'json'
"""

from __future__ import annotations

import importlib
from typing import Any

from sisa.core.errors import EnvironmentFault


def library(name: str, extra: str) -> Any:
    """Import a module that belongs to an extra. Raise EnvironmentFault if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise not_installed(name, extra, error) from None


def not_installed(name: str, extra: str, error: ImportError) -> EnvironmentFault:
    """Return the error for a library that is missing, or that lacks a library itself."""
    return EnvironmentFault(
        f"{name.partition('.')[0]} is not installed",
        got=f"no module {error.name}",
        next_step=f"pip install 'deletion-ready-model[{extra}]'",
    )
