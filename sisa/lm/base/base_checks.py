"""Outcomes of checks of a base, kept between processes.

In which forms a base can be run is found out by running it, which takes as long as some training steps.
The outcome is a fact of the base and its patches, of the libraries and of the machine. So it is kept in
the user's state directory, beside the digests of cached bases, under a name that covers all of these. A
file that is missing or damaged counts as absent. A check that raises is made again the next time.

    (packs,) = kept_check("packs", (base_name, fingerprint(threads=1)), lambda: [packs(base, 512)])
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence

from sisa.config.config import state_dir
from sisa.core.digest import digest_of


def kept_check(check: str, of: Sequence[str], find: Callable[[], Sequence[bool]]) -> list[bool]:
    """Return what a check found out, by `find` unless it was kept.

    `of` names everything that the outcome depends on; with nothing, nothing is kept. Rename a check
    whose code changes and that the fingerprint does not cover.
    """
    if not of:
        return list(find())
    path = state_dir() / "cache" / "checks" / digest_of([check, *of])
    with contextlib.suppress(OSError, ValueError):
        kept = json.loads(path.read_bytes())
        if isinstance(kept, list) and kept and all(isinstance(each, bool) for each in kept):
            return kept
    found = list(find())
    with contextlib.suppress(OSError):  # it is found again
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)
        path.write_text(json.dumps(found))  # a part of it is no JSON
    return found
