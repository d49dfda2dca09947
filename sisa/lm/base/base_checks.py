"""Outcomes of checks of a base, kept between processes.

Running a base shows which forms of the loss it allows, but takes as long as some training steps. The
outcome depends on the base and its patches, the libraries and the machine alone. So it is kept in the
user's state directory, beside the digests of cached bases, under a name that covers all of these. A
missing or damaged file counts as absent. A check that raises runs again the next time.

    (packs,) = kept_check("packs", (base_name, fingerprint(threads=1)), lambda: [packs(base, 512)])
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence

from sisa.config.paths import state_dir
from sisa.core.digest import digest_of


def kept_check(check: str, of: Sequence[str], find: Callable[[], Sequence[bool]]) -> list[bool]:
    """Return the outcome of a check: the kept one, or else that of `find`.

    `of` names everything that the outcome depends on; if it is empty, nothing is kept. Rename a check
    when its code changes, unless the fingerprint covers the change.
    """
    if not of:
        return list(find())
    path = state_dir() / "cache" / "checks" / digest_of([check, *of])
    with contextlib.suppress(OSError, ValueError):
        kept = json.loads(path.read_bytes())
        if isinstance(kept, list) and kept and all(isinstance(each, bool) for each in kept):
            return kept
    found = list(find())
    with contextlib.suppress(OSError):  # then the next process checks again
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)
        path.write_text(json.dumps(found))  # a torn file is no JSON
    return found
