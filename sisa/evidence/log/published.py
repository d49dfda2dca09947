"""Read and check a published log, in a directory or at a URL: one's own or somebody else's.

check_log(log_reader("https://example.com/log"), vkey)     the whole log: signatures, entries, tiles
follow(known, entries, read)                               the present keys, after all hand-overs
"""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from sisa.core.digest import sha256_hex
from sisa.core.errors import EnvironmentFault, IntegrityError, InvalidInput
from sisa.evidence.log.tiles import (
    CHECKPOINT,
    MAX_ENTRY_BYTES,
    Read,
    check_tiles,
    cutting_full_tiles,
    statement_path,
)
from sisa.store.blobs import files
from sisa.verifier import merkle, note
from sisa.verifier.certificate import ENTRY_FORM, URN
from sisa.verifier.envelope import (
    PublicKeys,
    Refused,
    check_form,
    parse_canonical,
    public_keys,
    verify_envelope,
)
from sisa.verifier.note import WIDTH, Checkpoint

MAX_FILE_BYTES = WIDTH * (2 + MAX_ENTRY_BYTES)  # a full bundle
FETCH_TIMEOUT_S = 20
KEY_HANDOVER = f"{URN}key-handover:v1"
HANDOVER_FORM = {"reason": str, "keys": dict}


def check_log(
    read: Read, vkey: str, cosigners: Sequence[str] = (), seen: Sequence[bytes] = ()
) -> tuple[Checkpoint, list[bytes]]:
    """Check a whole published log; return its checkpoint and its entries. Raise Refused.

    It continues every checkpoint that was `seen`: none of their entries was rewritten, dropped or moved.
    All of these cosigners have signed the present one.
    """
    now = note.open_checkpoint(read(CHECKPOINT), vkey, cosigners=cosigners)
    entries = note.read_log(read, now)
    check_tiles(read, entries)
    hashes = [merkle.leaf_hash(each) for each in entries]
    for kept in seen:
        before = note.open_checkpoint(kept, vkey)
        if before.size > now.size or merkle.root(hashes[: before.size]) != before.root:
            raise Refused(
                "the log does not continue a checkpoint that was seen: entries were changed or dropped",
                expected=f"{before.size} entries with the root {before.root.hex()}, and more",
                got=f"{now.size} entries with the root {now.root.hex()}",
                next_step="keep both checkpoints: they contradict each other, and the log signed both",
            )
    return now, entries


def follow(known: PublicKeys, entries: Sequence[bytes], read: Read) -> PublicKeys:
    """Return the present keys, after all hand-overs in a checked log from the known keys. Raise Refused.

    `read` returns a file beside the log's by its path. The old key signs a regular hand-over, and it
    counts at its own place in the log alone: whoever steals a key that signs statements, but not the
    log's, can't hand over to a key of theirs. The hand-over of a lost or leaked key is signed by the new
    one; to whoever trusts the old one it shows nothing.

    >>> known = PublicKeys("0f" * 16, (), "", b"")
    >>> follow(known, [], str.encode) == known
    True
    """
    for index, entry in enumerate(entries):
        named = parse_canonical(entry, "an entry", ENTRY_FORM)
        if named["predicateType"] == KEY_HANDOVER and index >= known.present.since:
            envelope = read(statement_path(named["sha256"]))
            if sha256_hex(envelope) != named["sha256"]:
                raise Refused("a hand-over is not the logged one", where=f"entry {index}")
            known = _successor(known, envelope, index)
    return known


def _successor(known: PublicKeys, handover: bytes, index: int) -> PublicKeys:
    try:
        statement = verify_envelope(handover, known, index)
    except Refused as error:
        raise Refused(
            "the known key did not sign the hand-over: it was lost or leaked, or this is a forgery",
            where=f"entry {index}",
            got=error.what,
            next_step="ask the owner for the present keyid through another channel",
        ) from None
    named = check_form(statement["predicate"], "the hand-over", HANDOVER_FORM)
    new = public_keys(named["keys"])
    if new == known:  # that of the known key itself, which followed a lost one
        return known
    *before, last = known.statement_keys
    ended = (*before, replace(last, until=index + 1), replace(new.present, since=index + 1))
    if new != replace(known, statement_keys=ended):
        what = "the hand-over continues from other keys, or from another entry"
        raise Refused(what, where=f"entry {index}")
    return new


def log_reader(where: str) -> Read:
    """Return a function that reads a file of the log in a directory or at an http(s) URL.

    A file with a checkpoint alone can be read, too. Raise IntegrityError for a file that is missing or
    too large, EnvironmentFault for a disk or a network that fails.
    """
    if where.startswith(("http://", "https://")):
        return cutting_full_tiles(partial(_fetch, where.rstrip("/")))
    if "://" in where:
        raise InvalidInput("a log can't be read from there", expected="a directory, http:// or https://")
    return cutting_full_tiles(partial(_load, Path(where)))


def _load(directory: Path, path: str) -> bytes:
    if directory.is_file():
        if path != CHECKPOINT:
            raise InvalidInput(
                "a checkpoint alone does not show that the log continues another",
                where=str(directory),
                next_step="name the log's directory or URL, or what `sisa log request` prints",
            )
        directory, path = directory.parent, directory.name
    if not directory.exists():
        raise InvalidInput(
            "there is no such directory",
            where=str(directory),
            expected="a published log: a directory with a file `checkpoint`",
            next_step="name the log's directory or URL",
        )
    with files.disk_errors(directory / path):
        try:
            with (directory / path).open("rb") as file:
                return _bounded(file.read(MAX_FILE_BYTES + 1), str(directory / path))
        except (FileNotFoundError, NotADirectoryError):
            raise _withheld(str(directory / path), "is missing") from None


def _fetch(url: str, path: str) -> bytes:
    where = f"{url}/{path}"
    try:
        with urllib.request.urlopen(where, timeout=FETCH_TIMEOUT_S) as answer:  # noqa: S310 (http alone)
            data = _bounded(answer.read(MAX_FILE_BYTES + 1), where)
            if answer.length:  # `read` with a bound does not say that bytes are missing
                raise http.client.IncompleteRead(data, answer.length)
            return data
    except urllib.error.HTTPError as error:
        if error.code in (404, 410):
            raise _withheld(where, "is missing") from None
        got = f"HTTP {error.code}"
    except (OSError, ValueError, http.client.HTTPException) as error:
        got = type(error).__name__
    raise EnvironmentFault(
        "the log can't be reached", where=where, got=got, next_step="try again later, or use a copy"
    )


def _bounded(data: bytes, where: str) -> bytes:
    if len(data) > MAX_FILE_BYTES:
        raise _withheld(where, "is too large")
    return data


def _withheld(where: str, how: str) -> IntegrityError:
    step = "keep what you have read: whoever publishes the log withholds a part of it"
    return IntegrityError(f"a file of the log {how}", where=where, next_step=step)
