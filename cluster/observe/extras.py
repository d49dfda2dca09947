"""Report a missing library of an extra as an EnvironmentFault that names the extra."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sisa.core.errors import EnvironmentFault


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Raise EnvironmentFault if a library is missing that is imported in the block."""
    try:
        yield
    except ImportError as error:
        library = (error.name or "a library").partition(".")[0]
        raise EnvironmentFault(
            f"{library} is not installed",
            got=f"no module {error.name}",
            next_step=f"pip install 'deletion-ready-model[{name}]'",
        ) from None
