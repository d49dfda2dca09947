"""Follow keys from those that somebody trusts to the present ones, by the hand-overs in a log.

The old key signs a regular hand-over, and it counts at its own place in the log alone: whoever steals a
key that signs statements, but not the log's, can't hand over to a key of theirs. The hand-over of a lost
or leaked key is signed by the new one; to whoever trusts the old one it shows nothing.

>>> known = PublicKeys("0f" * 16, (), "", b"")
>>> follow(known, [], str.encode) == known
True
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import sha256

from sisa.verifier.certificate import KEY_HANDOVER
from sisa.verifier.envelope import (
    SHA256_HEX,
    PublicKeys,
    Refused,
    members,
    public_keys,
    strict_json,
    verify_envelope,
)


def follow(known: PublicKeys, entries: Sequence[bytes], read: Callable[[str], bytes]) -> PublicKeys:
    """Return the keys to which known ones were handed over, of a log that was checked. Raise Refused.

    `read` returns a file beside the log's by its path.
    """
    for index, entry in enumerate(entries):
        named = members(strict_json(entry, "a log entry"), "a log entry", _ENTRY)
        if named["predicateType"] == KEY_HANDOVER and index >= known.certificates[-1].since:
            envelope = read(f"statements/{named['sha256']}.json")
            if sha256(envelope).hexdigest() != named["sha256"]:
                raise Refused("a hand-over is not the logged one", f"entry {index}")
            known = _successor(known, envelope, index)
    return known


_ENTRY = {"predicateType": str, "sha256": SHA256_HEX}


def _successor(known: PublicKeys, handover: bytes, index: int) -> PublicKeys:
    try:
        statement = verify_envelope(handover, known, index)
    except Refused as error:
        raise Refused(
            "the known key did not sign the hand-over: it was lost or leaked, or this is a forgery",
            where=f"entry {index}",
            got=error.what,
            next_step="ask the model's owner, on another way, for the present keyid",
        ) from None
    named = members(statement["predicate"], "the hand-over", {"reason": str, "keys": dict})
    new = public_keys(named["keys"])
    if new == known:  # that of the known key itself, which followed a lost one
        return known
    *before, last = known.certificates
    ended = (*before, replace(last, until=index + 1), replace(new.certificates[-1], since=index + 1))
    if new != replace(known, certificates=ended):
        raise Refused("the hand-over goes on from other keys, or elsewhere", f"entry {index}")
    return new
