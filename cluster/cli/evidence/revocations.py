"""Inform holders of copies which adapters are revoked: `sisa revocations`, `sisa check-adapter`."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cluster.cli.command import PATH, command, command_group, model_option, opened
from cluster.cli.evidence.published import logged_statements, public_keys_option, read_public_keys
from cluster.cli.input_files import read_bytes
from cluster.render.result import EXIT_ACT, Result, counted, shortened
from sisa.core.errors import InvalidInput

if TYPE_CHECKING:
    from sisa.verifier.envelope import PublicKeys


revocations = command_group("revocations", "Inform holders of copies which adapters are revoked.")


@command("publish", "-m model", group=revocations)
@model_option
@click.option(
    "-o",
    "--output",
    "target",
    type=PATH,
    help="File to write; by default revocations.json beside the log.",
)
@click.option("--days", default=7, type=click.IntRange(1, 366), help="Days after which it is refused.")
def publish_feed(directory: Path, target: Path | None, days: int) -> Result:
    """Sign the feed of all adapters that deletions revoked."""
    from sisa.evidence.revocations import publish

    with opened(directory) as model:
        found = publish(model, target, days)
    lines = [
        f"feed      {found.feed}",
        f"number    {found.sequence}, valid until {found.next_update}",
        f"revoked   {counted(found.revoked, 'adapter')}, {found.pending} of them by deletions that are "
        "not certified yet",
    ]
    return Result(asdict(found), lines)


@command("check-adapter", "adapters/v1/shard-00000 --feed revocations.json --key keys.json")
@click.argument("held", metavar="DIRECTORY", type=PATH)
@click.option("--feed", "feed_file", required=True, type=PATH, help="The newest feed of revocations.")
@public_keys_option
@click.option(
    "--not-older-than",
    "seen",
    metavar="NUMBER|FEED",
    help="Number of a feed, or a feed that you kept: refuse one that is behind it.",
)
@click.option("--log", metavar="DIR|URL", help="The published log: the feed must be complete.")
def check_held(held: Path, feed_file: Path, key_file: Path, seen: str | None, log: str | None) -> Result:
    """Check offline whether copies of adapters must go. Exit with 7 if a deletion revoked one."""
    from sisa.evidence.keys.model_signature import signed_weights
    from sisa.verifier.feed import NONE_SEEN, check_adapter, check_present, verify_feed

    if not held.exists():
        raise InvalidInput(
            "there is nothing to check", where=str(held), expected="a directory or a file"
        )
    keys = read_public_keys(key_file)
    feed = verify_feed(read_bytes(feed_file), keys)
    if seen is None:
        kept = NONE_SEEN
    elif seen.isdecimal():
        kept = NONE_SEEN | {"sequence": int(seen)}
    else:
        kept = verify_feed(read_bytes(Path(seen)), keys)
    check_present(feed, datetime.now(UTC), kept)
    if log is not None:
        _check_complete(feed, log, keys)
    files, skipped = check_adapter(held.resolve() if held.is_dir() else held, feed)
    revoked = {
        path: feed["revoked"][sha256] for path, sha256 in files.items() if sha256 in feed["revoked"]
    }
    signed = [] if revoked else signed_weights(files, keys.exports)
    return checked(feed, files, revoked, signed, skipped)


def _check_complete(feed: dict[str, Any], log: str, keys: PublicKeys) -> None:
    """Raise Refused if a certificate in a published log revokes an adapter that the feed lacks."""
    from sisa.verifier.certificate import CERTIFICATES
    from sisa.verifier.envelope import Refused

    num_entries, statements = logged_statements(log, keys)
    known = {*feed["revoked"], *map(str, feed["reinstated"])}
    for certificate, statement in statements:
        if statement["predicateType"] not in CERTIFICATES:
            continue
        revokes = statement["predicate"].get("revokes")
        if not isinstance(revokes, list) or not known.issuperset(map(str, revokes)):
            raise Refused(
                "the feed does not name what a certificate in the log revokes",
                where=f"certificate {certificate}",
                expected=f"a feed of {num_entries} entries, without gaps",
                got=f"a feed of {feed['sequence']} entries",
                next_step="get the newest feed; if this is it, keep it and the log: they contradict",
            )


def checked(
    feed: dict[str, Any],
    files: dict[str, str],
    revoked: dict[str, dict[str, str]],
    signed: list[str],
    skipped: list[str],
) -> Result:
    """Render which adapters were revoked, which of the others are as exported, and what was skipped."""
    lines, rows = [], []
    for path, sha256 in files.items():
        by = revoked.get(path)
        if by is None:
            lines.append(
                f"not revoked  {path}" + (", as exported (model.sig)" if path in signed else "")
            )
        else:
            certificate = f"certificate {by['certificate']}"
            named = certificate if by["certificate"] else "a deletion that is not certified yet"
            lines.append(f"REVOKED      {path}: by {named} on {by['date']}: delete it, and copies of it")
        row = {"path": path, "sha256": sha256, "revoked": by is not None, "signed": path in signed}
        rows.append(row | {name: by[name] if by else None for name in ("certificate", "date")})
    if skipped:
        lines.append(f"skipped      no adapter, so not judged: {shortened(skipped)}")
    facts = {name: feed[name] for name in ("model", "sequence", "published", "next_update")}
    number, until = counted(len(feed["revoked"]), "adapter"), f"valid until {feed['next_update']}"
    lines.append(f"feed {feed['sequence']} of {feed['published']}, {until}: {number} revoked")
    return Result(
        {"revoked": bool(revoked), "files": rows, "skipped": skipped, **facts},
        lines,
        EXIT_ACT if revoked else 0,
    )
