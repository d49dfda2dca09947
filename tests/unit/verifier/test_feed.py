"""Feeds of revoked adapters: what they say of held files, and what is refused."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from sisa.verifier.certificate import EXACT, REVOCATIONS
from sisa.verifier.envelope import PublicKeys, Refused
from sisa.verifier.feed import NONE_SEEN, check_adapter, check_present, verify_feed
from tests.fakes.operator import MODEL, OTHER_MODEL, Operator

NOW, EARLIER = "2026-11-02T12:00:00Z", "2026-11-01T12:00:00Z"
LATER, END, AFTER = "2026-11-03T12:00:00Z", "2026-11-09T12:00:00Z", "2026-11-09T12:00:01Z"
WEIGHTS, KEPT = b"an adapter that saw a deleted record", b"an adapter that did not"
REVOCATION = {"certificate": "c" * 64, "date": "2026-11-01"}


KEY, REPLACED, STRANGER = (Operator(seed=n) for n in (1, 2, 3))


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def at(time: str) -> datetime:
    return datetime.fromisoformat(time)


def public_keys(key: Operator = KEY, model: str = MODEL) -> PublicKeys:
    former, present = replace(REPLACED.keys.present, until=5), replace(key.keys.present, since=5)
    return PublicKeys(model, (former, present), "", b"")


def signed(predicate: dict[str, Any], key: Operator = KEY, kind: str = REVOCATIONS) -> bytes:
    """Return the envelope of a feed, like that of `feed_of` but for what is given."""
    whole = {"model": MODEL, "sequence": 7, "published": NOW, "next_update": END, "reinstated": []}
    sha256 = key.log(kind, {**whole, "revoked": {digest(WEIGHTS): REVOCATION}, **predicate})
    return key.files[f"statements/{sha256}.json"]


def feed_of(**predicate: Any) -> dict[str, Any]:
    return verify_feed(signed(predicate), public_keys())


def test_a_holder_learns_which_weights_must_go(tmp_path: Path) -> None:
    feed = feed_of()
    check_present(feed, at(NOW))
    for name, data in (("b/adapter_model.safetensors", KEPT), ("a/model.safetensors", WEIGHTS)):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(data)
    (tmp_path / "README.md").write_text("no weights")
    weights, other = tmp_path / "a/model.safetensors", tmp_path / "b/adapter_model.safetensors"
    judged = {str(weights): digest(WEIGHTS), str(other): digest(KEPT)}
    assert check_adapter(tmp_path, feed) == (judged, [str(tmp_path / "README.md")])
    assert feed["revoked"] == {digest(WEIGHTS): REVOCATION}


def test_a_revoked_file_is_found_under_another_name(tmp_path: Path) -> None:
    (tmp_path / "renamed.bin").write_bytes(WEIGHTS)
    (tmp_path / "README.md").write_text("no weights")
    found = {str(tmp_path / "renamed.bin"): digest(WEIGHTS)}
    assert check_adapter(tmp_path, feed_of()) == (found, [str(tmp_path / "README.md")])
    assert check_adapter(tmp_path / "renamed.bin", feed_of()) == (found, [])


def test_an_optimizer_state_is_not_called_clean(tmp_path: Path) -> None:
    """It may have seen what the adapter beside it saw, and no feed names it."""
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        (tmp_path / name).write_bytes(KEPT)
    judged, skipped = check_adapter(tmp_path, feed_of())
    assert [Path(each).name for each in (*judged, *skipped)] == [
        *("adapter_model.safetensors", "optimizer.safetensors")
    ]
    with pytest.raises(Refused, match="no weights"):
        check_adapter(tmp_path / "optimizer.safetensors", feed_of())


def test_links_to_files_are_followed_and_nothing_is_left_out_unsaid(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    (blobs / "0a").write_bytes(WEIGHTS)
    (snapshot / "model.safetensors").symlink_to(blobs / "0a")  # as a hub's cache keeps it
    found = {str(snapshot / "model.safetensors"): digest(WEIGHTS)}
    assert check_adapter(snapshot, feed_of()) == (found, [])
    (snapshot / "more").symlink_to(blobs)
    with pytest.raises(Refused, match="link to a directory"):
        check_adapter(snapshot, feed_of())
    os.mkfifo(blobs / "pipe.safetensors")  # opening it would wait for a writer
    with pytest.raises(Refused, match="no weights"):
        check_adapter(blobs / "pipe.safetensors", feed_of())


def test_what_holds_no_weights_is_not_called_clean(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.bin").write_bytes(KEPT)
    for place in (tmp_path, tmp_path / "absent"):
        with pytest.raises(Refused, match="no weights"):
            check_adapter(place, feed_of())


def test_a_feed_that_is_out_of_date_is_refused() -> None:
    check_present(feed_of(), at(END))
    with pytest.raises(Refused, match="out of date") as refused:
        check_present(feed_of(), at(AFTER))
    assert END in refused.value.expected
    assert "get the newest feed" in refused.value.next_step


def test_an_older_feed_is_refused() -> None:
    older, present = feed_of(), feed_of(sequence=8, published=LATER)
    check_present(present, at(NOW), NONE_SEEN | {"sequence": 8})
    check_present(present, at(NOW), seen=older)
    check_present(present, at(NOW), seen=present)
    refused: list[Callable[[], None]] = [
        lambda: check_present(older, at(NOW), seen=present),
        lambda: check_present(older, at(NOW), NONE_SEEN | {"sequence": 8}),
        lambda: check_present(feed_of(published=EARLIER), at(NOW), seen=older),
    ]
    for check in refused:
        with pytest.raises(Refused, match="behind one seen before"):
            check()


def test_a_later_feed_that_drops_a_revocation_is_refused() -> None:
    dropped = feed_of(sequence=9, revoked={})
    check_present(dropped, at(NOW))  # alone, nothing shows it
    with pytest.raises(Refused, match="behind one seen before") as refused:
        check_present(dropped, at(NOW), seen=feed_of())
    assert "1 revocations missing" in refused.value.got
    check_present(feed_of(sequence=9, revoked={}, reinstated=[digest(WEIGHTS)]), at(NOW), seen=feed_of())


@pytest.mark.parametrize(
    ("feed", "keys", "why"),
    [
        (signed({}, STRANGER), public_keys(), "none of the public keys signed it"),
        (signed({}, REPLACED), public_keys(), "did not hold then"),
        (signed({}), public_keys(STRANGER), "none of the public keys signed it"),
        (signed({"model": OTHER_MODEL}), public_keys(), "the feed has another form or version"),
        (signed({}), public_keys(model=OTHER_MODEL), "the feed has another form or version"),
        (signed({}, kind=EXACT), public_keys(), "no feed"),
        (signed({}, kind=REVOCATIONS.replace("v1", "v2")), public_keys(), "no feed"),
        (signed({"more": 1}), public_keys(), "another form"),
        (signed({"sequence": "7"}), public_keys(), "another form"),
        (signed({"published": "yesterday"}), public_keys(), "another form"),
        (signed({"next_update": "2026-11-09"}), public_keys(), "another form"),
        (signed({"revoked": {"x": "y"}}), public_keys(), "a revocation has another form"),
        (b"", public_keys(), "not strict JSON"),
    ],
)
def test_what_is_no_feed_of_the_model_is_refused(feed: bytes, keys: PublicKeys, why: str) -> None:
    with pytest.raises(Refused, match=why):
        verify_feed(feed, keys)
