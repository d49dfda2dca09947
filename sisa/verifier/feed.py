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

WEIGHTS = ".safetensors"
Feed = dict[str, Any]
TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"  # in UTC: earlier times are lesser texts
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")


def verify_feed(data: bytes, keys: PublicKeys) -> Feed:
    """Return a feed that the model's present key signed, whatever its time. Raise Refused."""
    statement = verify_envelope(data, keys)
    if (kind := statement["predicateType"]) != REVOCATIONS:
        raise Refused("this is no feed", expected=REVOCATIONS, got=kind[:80])
    form = {"model": keys.model, "sequence": int, "revoked": dict, "reinstated": [str]}
    form |= {"published": _TIME, "next_update": _TIME}
    feed: Feed = check_form(statement["predicate"], "the feed", form)
    for each in feed["revoked"].values():
        check_form(each, "a revocation", {"certificate": str, "date": str})
    return feed


def check_present(feed: Feed, now: datetime, since: int = 0, seen: Feed | None = None) -> None:
    """Raise Refused unless a feed is valid now, is number `since` or later, and continues one seen."""
    step = "get the newest feed"
    if (at := now.astimezone(UTC).strftime(TIME_FORMAT)) > (end := feed["next_update"]):
        raise Refused("the feed is out of date", "", f"a time until {end}", at, step)
    older, lost, least = feed["sequence"] < since, 0, since
    if seen:
        older |= (feed["sequence"], feed["published"]) < (seen["sequence"], seen["published"])
        lost = len(seen["revoked"].keys() - {*feed["revoked"], *feed["reinstated"]})
        least = max(since, seen["sequence"])
    if older or lost:
        got = f"number {feed['sequence']}, {lost} revocations missing"
        raise Refused("the feed is behind one seen before", "", f"number {least} or later", got, step)


def check_adapter(held: Path, feed: Feed) -> dict[str, str]:
    """Return the SHA-256 of each weights file in a directory, and of revoked weights by any name."""
    found = [each for each in hashed(held) if each[1] in feed["revoked"] or each[0].endswith(WEIGHTS)]
    if not found:
        raise Refused("there are no weights to check", str(held), f"files *{WEIGHTS}")
    return dict(found)


def hashed(held: Path) -> Iterator[tuple[str, str]]:
    """Yield path and SHA-256 of each file in a directory, or of one file."""
    if held.is_symlink() and held.is_dir():
        raise Refused("a link to a directory is not followed", str(held), next_step="check its target")
    for each in sorted(held.iterdir()) if held.is_dir() else ():
        yield from hashed(each)
    if held.is_file():
        with held.open("rb") as file:
            yield str(held), hashlib.file_digest(file, "sha256").hexdigest()
