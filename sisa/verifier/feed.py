"""Check a feed of revoked adapters, and whether weights that somebody holds are among them.

A feed is a signed statement whose predicate names adapters by the SHA-256 of their weights:

    {"model", "sequence", "published", "next_update", "reinstated": [ADAPTER, ...],
     "revoked": {ADAPTER: {"certificate", "date"}, ...}}

The certificate is "" while its deletion is under way. `reinstated` adapters were revoked, and were made
again from records that were given again. The signature shows whose a feed is; `check_present` refuses
one that is out of date or behind what was seen before.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sisa.verifier.certificate import REVOCATIONS
from sisa.verifier.envelope import PublicKeys, Refused, check_form, verify_envelope

WEIGHTS, OPTIMIZER = ".safetensors", "optimizer.safetensors"
Feed = dict[str, Any]
NONE_SEEN: Feed = {"sequence": 0, "published": "", "revoked": {}}
TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"  # in UTC: earlier times are lesser texts
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")


def verify_feed(data: bytes, keys: PublicKeys) -> Feed:
    """Return a feed that the model's present key signed, whatever its time. Raise Refused."""
    statement = verify_envelope(data, keys)
    if (kind := statement["predicateType"]) != REVOCATIONS:
        raise Refused("this is no feed", REVOCATIONS, kind[:80])
    form = {"model": keys.model, "sequence": int, "revoked": dict, "reinstated": [str]}
    form |= {"published": _TIME, "next_update": _TIME}
    feed: Feed = check_form(statement["predicate"], "the feed", form)
    for each in feed["revoked"].values():
        check_form(each, "a revocation", {"certificate": str, "date": str})
    return feed


def check_present(feed: Feed, now: datetime, seen: Feed = NONE_SEEN) -> None:
    """Raise Refused unless a feed is valid now, and continues one that was seen before."""
    step = "get the newest feed"
    if (at := now.astimezone(UTC).strftime(TIME_FORMAT)) > (end := feed["next_update"]):
        raise Refused("the feed is out of date", f"a time until {end}", at, next_step=step)
    older = (feed["sequence"], feed["published"]) < (seen["sequence"], seen["published"])
    lost = len(seen["revoked"].keys() - {*feed["revoked"], *feed["reinstated"]})
    if older or lost:
        expected = f"number {seen['sequence']} or later"
        got = f"number {feed['sequence']}, {lost} revocations missing"
        raise Refused("the feed is behind one seen before", expected, got, next_step=step)


def check_adapter(held: Path, feed: Feed) -> tuple[dict[str, str], list[str]]:
    """Return the SHA-256 of each adapter or merged model by its path, and the paths of other files.

    What is revoked is found under any name.
    """
    found = dict(hashed(held))
    weights = {path for path in found if path.endswith(WEIGHTS) and not path.endswith(OPTIMIZER)}
    judged = {path: each for path, each in found.items() if path in weights or each in feed["revoked"]}
    if not judged:
        raise Refused("there are no weights to check", f"files *{WEIGHTS}", where=str(held))
    return judged, [path for path in found if path not in judged]


def hashed(held: Path) -> Iterator[tuple[str, str]]:
    """Yield path and SHA-256 of each file in a directory, or of one file."""
    if held.is_symlink() and held.is_dir():
        raise Refused("a link to a directory is not followed: check its target", where=str(held))
    for each in sorted(held.iterdir()) if held.is_dir() else ():
        yield from hashed(each)
    if held.is_file():
        with held.open("rb") as file:
            yield str(held), hashlib.file_digest(file, "sha256").hexdigest()
