"""Feeds of revocations: they name every adapter that a deleted record touched, and no other.

The fake trainer's weights name the records that touched them, so that what a copy knows is read from its
bytes, not from the plan.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from sisa.core.checkpoint_files import ADAPTER_FILE
from sisa.core.digest import Keyed, sha256_hex
from sisa.core.domain import Export
from sisa.core.ledger_meta import TRAINED_ANEW
from sisa.core.patches import active
from sisa.core.ports import Change
from sisa.evidence.open_evidence import OpenEvidence
from sisa.evidence.revocations import feed_of
from sisa.flows.context.commit import commit
from sisa.flows.export import export_adapters
from sisa.flows.patches.patching import Wish, make_wanted, shards_over, want
from sisa.flows.reconcile import reconcile
from sisa.flows.reconfigure import reset
from sisa.planning.layout import Assigner, Layout
from sisa.verifier.envelope import STATEMENT_TYPE, Refused
from sisa.verifier.feed import TIME_FORMAT, check_present, verify_feed
from tests.fakes.ports import SECRET, changed, fake_record
from tests.models.certified import Certified, certified, check_statement

END = datetime(2026, 1, 8, tzinfo=UTC)


@pytest.fixture
def model(tmp_path: Path) -> Certified:
    return certified(tmp_path)


def copies(model: Certified, name: str) -> dict[str, bytes]:
    """Export the model, and return copies of the weights, which no deletion reaches, by their digest."""
    held = model.fake.exports.stored
    before = set(held)
    export_adapters(model.fake.context, Path("no-such-folder") / name)
    weights = [held[path][ADAPTER_FILE] for path in held.keys() - before]
    return {sha256_hex(each): each for each in weights}


def held(model: Certified) -> dict[str, bytes]:
    """Return copies of the weights of all checkpoints that the model holds."""
    weights = [files[ADAPTER_FILE] for files in model.fake.checkpoints.stored.values()]
    return {sha256_hex(each): each for each in weights}


def statement(model: Certified) -> dict[str, Any]:
    return feed_of(OpenEvidence(model.fake.context, model.hook, model.keys, model.log))


def feed(model: Certified) -> dict[str, Any]:
    """Return the predicate of a feed, signed and verified."""
    return verify_feed(model.keys.sign(statement(model)), model.keys.public)


def knows(weights: bytes, number: int) -> bool:
    return fake_record(number).id in json.loads(weights)["touched"]


def test_a_deletion_revokes_the_copies_that_it_touched(model: Certified) -> None:
    assert feed(model)["revoked"] == {}
    taken = copies(model, "a")
    model.forget(3)
    published = feed(model)
    touched = {name for name, weights in taken.items() if knows(weights, 3)}
    assert touched == taken.keys() & published["revoked"].keys()
    (certificate,) = [each for each in model.logged if each.about]
    by = {"certificate": certificate.sha256, "date": "2026-01-01"}
    assert [published["revoked"][each] for each in touched] == [by]
    assert (published["sequence"], published["next_update"]) == (
        model.log.size,
        END.strftime(TIME_FORMAT),
    )
    stated = {"_type": STATEMENT_TYPE, **statement(model)}
    check_statement(stated)
    assert stated["subject"][0]["digest"] == {"sha256": model.log.checkpoint.root.hex()}


def test_copies_are_revoked_before_the_certificate_is_issued(model: Certified) -> None:
    taken, before = copies(model, "a"), feed(model)
    model.forget(next(each for each in range(12) if model.fake.rows(each)[0].slice == 0), defer=True)
    during = feed(model)
    assert {each["certificate"] for each in during["revoked"].values()} == {""}
    assert not taken.keys().isdisjoint(during["revoked"])
    reconcile(model.fake.context)
    after = feed(model)
    assert after["revoked"].keys() == during["revoked"].keys()
    assert {len(each["certificate"]) for each in after["revoked"].values()} == {64}
    for older, newer in ((before, during), (during, after)):
        check_present(newer, END, older)
    with pytest.raises(Refused, match="behind one seen before"):
        check_present(before, END, seen=during)


def test_of_two_deletions_the_first_that_revoked_a_copy_is_named(model: Certified) -> None:
    one, other = 3, next(each for each in range(12) if each != 3 and together(model, each, 3))
    taken = copies(model, "a")
    first, _ = model.forget(one, defer=True), model.forget(other)
    (revoked,) = {name for name, weights in taken.items() if knows(weights, one)}
    certificates = {each.about: each.sha256 for each in model.logged}
    assert feed(model)["revoked"][revoked]["certificate"] == certificates[first.request_id]


def together(model: Certified, one: int, other: int) -> bool:
    (shard,) = {each.shard for each in model.fake.rows(one)}
    return {each.shard for each in model.fake.rows(other)} == {shard}


def test_an_adapter_that_was_made_again_from_the_same_records_is_reinstated(model: Certified) -> None:
    taken = copies(model, "a")
    model.forget(3)
    before = feed(model)
    model.add(3, again=True)
    (back,) = taken.keys() & before["revoked"].keys()
    assert {each.adapter_sha256 for each in model.fake.ledger.checkpoints()} >= {back}
    after = feed(model)
    assert back in after["reinstated"]
    assert back not in after["revoked"]
    check_present(after, END, seen=before)
    model.forget(3)
    assert back in feed(model)["revoked"]


@pytest.mark.parametrize("seed", range(4))
def test_over_a_history_copies_are_revoked_if_and_only_if_they_knew_a_deleted_record(
    tmp_path: Path, seed: int
) -> None:
    """Copies of exports, and of checkpoints that were retired long before the deletion."""
    drawn, model = random.Random(seed), certified(tmp_path, 15)
    taken, live, deleted, seen = held(model), set(range(15)), set[int](), feed(model)
    for step in range(8):
        if step % 3 == 2:
            new = {100 + 2 * step, 101 + 2 * step}
            model.add(*sorted(new))
            live |= new
        else:
            gone = set(drawn.sample(sorted(live), 2))
            model.forget(*gone, defer=drawn.random() < 0.5)
            live, deleted = live - gone, deleted | gone
        present = feed(model)
        guilty = {name for name, each in taken.items() if any(knows(each, n) for n in deleted)}
        assert taken.keys() & present["revoked"].keys() == guilty
        check_present(present, END, seen=seen)
        seen, taken = present, taken | held(model)
        if step % 4 == 0:
            taken |= copies(model, f"step-{step}")


@pytest.mark.parametrize("crash", [True, False])
def test_copies_of_a_former_layout_are_revoked_by_any_record_of_that_time(
    model: Certified, crash: bool
) -> None:
    """What was where is no longer known. A crash leaves out the reconciliation after the move."""
    old = held(model)
    context = changed(model.fake.context, assigner=Assigner(Keyed(SECRET), Layout(2, 3)))
    model.fake.context = context
    reset(context, {TRAINED_ANEW: "2026-01-02"})
    if not crash:
        reconcile(context)
        model.add(99)
        model.forget(99)
        assert old.keys().isdisjoint(feed(model)["revoked"])
    model.forget(3)
    assert old.keys() <= feed(model)["revoked"].keys()


def test_a_feed_names_digests_of_weights_and_nobody(model: Certified) -> None:
    taken = copies(model, "a")
    held = {each.adapter_sha256 for each in model.fake.ledger.checkpoints()}
    rows = model.fake.rows(1, 2)
    ids = [fake_record(each).id for each in (1, 2)]
    model.forget(1, 2, reason="secret words", external_id="T-17")
    text = json.dumps(statement(model))
    assert statement(model)["predicate"]["revoked"].keys() <= held | taken.keys()
    digests = {value for row in rows for value in (row.id_digest, row.text_digest, row.subject_digest)}
    guesses = {hashlib.sha256(each.encode()).hexdigest() for each in ids}
    assert not any(each in text for each in (*ids, *filter(None, digests), *guesses, "secret", "T-17"))


def test_what_stands_on_a_patch_that_a_record_touched_is_revoked(model: Certified) -> None:
    """The patch was made with the record in its retain set; its export is of another shard."""
    want(model.fake.context, Wish({"method": "npo"}, [fake_record(50)], [fake_record(3)], "asked"))
    patch = make_wanted(model.fake.context).patch
    assert patch is not None
    copy = Export("/out", 99, (0,), 0, "key", "cc" * 32, "2026-01-01", patches=(patch.key,))
    other = replace(copy, path="/other", adapter_sha256="dd" * 32, patches=())
    commit(model.fake.context, Change(exports=[copy, other]))
    model.forget(4)
    assert {"cc" * 32, patch.adapter_sha256}.isdisjoint(feed(model)["revoked"])
    model.forget(3)
    assert {"cc" * 32, patch.adapter_sha256} <= feed(model)["revoked"].keys()
    assert "dd" * 32 not in feed(model)["revoked"]


def test_shards_that_were_trained_over_such_a_patch_are_revoked(model: Certified) -> None:
    """Its retain set held a text that became a record later."""
    context = model.fake.context
    want(context, Wish({"method": "npo"}, [fake_record(50)], [fake_record(51)], "asked"))
    make_wanted(context)
    shards_over(context, active(model.fake.ledger.patches()))
    reconcile(context)
    model.add(51)
    held = {each.adapter_sha256 for each in model.fake.ledger.checkpoints()}
    model.forget(51)
    assert held <= feed(model)["revoked"].keys()
