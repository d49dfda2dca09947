"""Requests for patches, patches, reverts, releases and deletions that touch them, case by case."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from sisa import unlearn
from sisa.core.checkpoint_files import ADAPTER_FILE
from sisa.core.domain import Export
from sisa.core.errors import (
    ConfigConflict,
    EnvironmentFault,
    IntegrityError,
    InvalidInput,
    UnknownRecord,
)
from sisa.core.events import Event, Notice
from sisa.core.patches import WRITTEN, Patch, active, wanted
from sisa.core.ports import Change
from sisa.core.requests import Probed, Request
from sisa.flows.answers.probability import chosen_rows
from sisa.flows.context.commit import commit
from sisa.flows.context.context import trained_over
from sisa.flows.context.served import model_digest
from sisa.flows.ingest import add, train
from sisa.flows.locations import where
from sisa.flows.patches import patching, vault_sets
from sisa.flows.patches.composition import AnswerChange, Composition
from sisa.flows.patches.on_deletion import give_up
from sisa.flows.patches.patching import Unlearnt, Wish, make_wanted, shards_over, want
from sisa.flows.reconcile import reconcile
from sisa.flows.requests import Terms, forget_at_once, new_request
from sisa.store.metrics import MIN_RECORDS
from tests.fakes.ports import FakeModel, changed, fake_model, fake_record, fake_trained, with_config

SETTINGS = {"method": "npo"}
HELD = range(6)
FREE = 20  # the first number of a record that was never held


class Notices(list[str]):
    """Notices that were reported."""

    def __call__(self, event: Event) -> None:
        if isinstance(event, Notice):
            self.append(event.text)


@pytest.fixture
def notices() -> Notices:
    return Notices()


@pytest.fixture
def fake(notices: Notices) -> FakeModel:
    found = fake_model(2)
    found.context = changed(found.context, report=notices)
    train(found.context, [fake_record(number) for number in HELD])
    return found


def wish_of(forget: Sequence[int], retain: Sequence[int] | None = None, consent: str = "asked") -> Wish:
    kept = None if retain is None else [fake_record(number) for number in retain]
    return Wish(SETTINGS, [fake_record(number) for number in forget], kept, consent)


def made(fake: FakeModel, forget: Sequence[int], retain: Sequence[int] | None = None) -> Patch:
    want(fake.context, wish_of(forget, retain))
    done = make_wanted(fake.context)
    assert done.patch is not None
    return done.patch


def delete(fake: FakeModel, *numbers: int, consent: str = "") -> Request:
    assert len(fake.rows(*numbers)) == len(numbers)
    return fake.forget(*numbers, consent=consent)


def touched(fake: FakeModel) -> set[str]:
    """Return the texts that the files of patches confess."""
    bodies = [json.loads(files[ADAPTER_FILE]) for files in fake.patches.stored.values()]
    return {text for body in bodies for text in body["touched"]}


def stack(fake: FakeModel) -> list[Patch]:
    return active(fake.ledger.patches())


def text(number: int) -> str:
    return fake_record(number).text


def test_a_wish_becomes_a_patch_and_its_texts_go(fake: FakeModel) -> None:
    before = model_digest(fake.context)
    patch = made(fake, [FREE])
    assert stack(fake) == [patch]
    assert (patch.version, patch.made_at, patch.report) == (1, fake.context.now(), {"steps": 2})
    assert fake.patches.held() == {patch.key}
    assert touched(fake) == {text(FREE)}
    assert (fake.vault.stored, fake.patch_drafts.stored) == ({}, {})
    assert [each.held for each in fake.ledger.vault()] == [False]
    assert model_digest(fake.context) != before
    patching.revert_patches(fake.context)
    assert model_digest(fake.context) == before
    assert (fake.patches.held(), fake.ledger.vault()) == (frozenset(), [])
    assert [each.state for each in fake.ledger.patches()] == ["reverted"]


def test_a_patch_after_the_other_lies_upon_it(fake: FakeModel) -> None:
    one, two = made(fake, [FREE]), made(fake, [FREE + 1])
    assert two.job.beneath == (one.key,)
    assert [each.key for each in patching.revert_patches(fake.context)] == [two.key]
    assert stack(fake) == [one]
    made(fake, [FREE + 2])
    assert len(patching.revert_patches(fake.context, everything=True)) == 2
    with pytest.raises(InvalidInput, match="no patch to revert"):
        patching.revert_patches(fake.context)


def test_a_joint_patch_supersedes_the_former(fake: FakeModel) -> None:
    fake.context = with_config(fake.context, patch_mode="joint")
    one, two = made(fake, [FREE]), made(fake, [FREE + 1])
    assert (two.job.beneath, len(two.job.forget)) == ((), 2)
    assert [each.state for each in fake.ledger.patches()] == ["superseded", "active"]
    assert fake.patches.held() == {two.key} != {one.key}
    assert len(fake.vault.stored) == 2
    assert want(fake.context, wish_of([FREE])).key == two.key  # all of it is forgotten already
    fake.context = with_config(fake.context, patch_mode="sequential")
    reconcile(fake.context)
    assert fake.vault.stored == {}


def test_a_wish_is_refused_before_anything_is_kept(fake: FakeModel) -> None:
    for wish in (wish_of([FREE], consent=" "), wish_of([]), Wish({}, [fake_record(FREE)], None, "yes")):
        with pytest.raises(InvalidInput):
            want(fake.context, wish)
    assert (fake.vault.stored, fake.ledger.patches(), fake.ledger.vault()) == ({}, [], [])


def test_one_wish_at_a_time(fake: FakeModel) -> None:
    first = want(fake.context, wish_of([FREE]))
    assert want(fake.context, wish_of([FREE])) == first
    with pytest.raises(ConfigConflict, match="another patch is wanted"):
        want(fake.context, wish_of([FREE + 1]))
    assert fake.vault.stored.keys() == set(first.job.sets)  # not that of the refused wish
    assert make_wanted(fake.context).patch == stack(fake)[0]
    assert fake.vault.stored == {}


def test_a_text_that_the_shards_hold_is_reported(fake: FakeModel, notices: Notices) -> None:
    made(fake, [0, FREE])
    assert any("1 of these texts are records of the model" in each for each in notices)


def test_an_unfinished_run_is_gone_on_with(fake: FakeModel) -> None:
    want(fake.context, wish_of([FREE]))
    fake.patcher.ends = ["unfinished"]
    done = make_wanted(fake.context, max_seconds=1.0)
    assert (done.patch, done.unfinished, done.kept_sets) == (None, True, 1)
    assert fake.patcher.orders[-1].max_seconds == 1.0
    reconcile(fake.context)
    assert len(fake.patch_drafts.stored) == len(fake.vault.stored) == 1
    assert make_wanted(fake.context).patch == stack(fake)[0]
    assert fake.patch_drafts.stored == {}


def test_a_machine_that_fails_leaves_the_wish(fake: FakeModel) -> None:
    want(fake.context, wish_of([FREE]))
    fake.patcher.ends = ["fails"]
    with pytest.raises(EnvironmentFault):
        make_wanted(fake.context)
    assert len(wanted(fake.ledger.patches())) == len(fake.vault.stored) == 1
    patching.revert_patches(fake.context)
    assert (fake.vault.stored, fake.patch_drafts.stored, stack(fake)) == ({}, {}, [])


def test_nothing_good_is_no_patch(fake: FakeModel) -> None:
    want(fake.context, wish_of([FREE]))
    fake.patcher.ends = ["nothing"]
    assert make_wanted(fake.context) == Unlearnt(None, False, {"steps": 0}, 1, 0)
    (dropped,) = fake.ledger.patches()
    assert (dropped.state, dropped.report) == ("dropped", {"steps": 0})
    assert fake.vault.stored == {}
    assert made(fake, [FREE]).version == 2  # the same key again


@pytest.mark.parametrize("revert", [False, True])
def test_a_text_that_is_still_known_stays_until_a_patch_forgets_it(
    fake: FakeModel, revert: bool
) -> None:
    request = delete(fake, 0, consent="asked")
    want(fake.context, Wish(SETTINGS, [], None, ""), [request])
    fake.patcher.ends = ["known", "forgotten"]
    assert make_wanted(fake.context).kept_sets == 1
    reconcile(fake.context)
    assert [[each.text for each in found] for found in fake.vault.stored.values()] == [[text(0)]]
    if revert:
        patching.revert_patches(fake.context)
    want(fake.context, Wish({**SETTINGS, "again": 1}), [fake.ledger.requests()[0]])
    done = make_wanted(fake.context)
    assert (done.erased_sets, done.kept_sets) == (1, 0)
    assert fake.vault.stored == {}
    assert len(stack(fake)) == (1 if revert else 2)


def test_a_text_that_is_still_known_can_be_released(fake: FakeModel) -> None:
    want(fake.context, wish_of([FREE]))
    fake.patcher.ends = ["known"]
    make_wanted(fake.context)
    patching.release_sets(fake.context, vault_sets.chosen(fake.context, list(fake.vault.stored), []))
    assert (fake.vault.stored, len(stack(fake))) == ({}, 1)


def test_a_deletion_with_consent_keeps_its_text_for_a_patch(fake: FakeModel) -> None:
    request = delete(fake, 0, consent="asked")
    assert [[each.text for each in found] for found in fake.vault.stored.values()] == [[text(0)]]
    assert request.vaulted in fake.vault.stored
    want(fake.context, Wish(SETTINGS), [request])
    assert make_wanted(fake.context).patch is not None
    assert (fake.vault.stored, touched(fake)) == ({}, {text(0)})
    (place,) = where(fake.context, [fake_record(0).id])
    assert (place.state, [each.version for each in place.patches], place.vault) == ("deleted", [1], ())


def test_a_text_that_a_wish_needs_stays_though_the_base_does_not_know_it(fake: FakeModel) -> None:
    """The record's text and the wish's are one set."""
    patch = want(fake.context, wish_of([0]))
    fake.context = changed(fake.context, probe=lambda records: Probed(len(records), len(records)))
    assert delete(fake, 0, consent="asked by letter").vaulted == patch.job.forget[0]
    done = make_wanted(fake.context).patch
    assert done is not None
    assert (done.key, fake.vault.stored) == (patch.key, {})


def test_a_deletion_without_consent_keeps_nothing(fake: FakeModel) -> None:
    request = delete(fake, 0)
    assert (fake.vault.stored, fake.ledger.vault(), request.vaulted) == ({}, [], "")
    with pytest.raises(ConfigConflict, match="not in the vault"):
        want(fake.context, Wish(SETTINGS), [request])


def test_where_knows_a_text_that_was_never_a_record(fake: FakeModel) -> None:
    want(fake.context, wish_of([FREE]))
    (place,) = where(fake.context, [fake_record(FREE).id])
    assert (place.state, len(place.vault)) == ("patch", 1)
    assert [each.state for each in place.patches] == ["wanted"]
    with pytest.raises(UnknownRecord):
        where(fake.context, ["never heard of"])
    with pytest.raises(UnknownRecord) as refused:
        where(fake.context, [fake_record(FREE).id, "never heard of", fake_record(0).id])
    assert [each.where for each in refused.value.problems] == ["id 2 of 3"]


def test_a_released_text_is_gone_and_the_wish_with_it(fake: FakeModel) -> None:
    request = delete(fake, 0, consent="asked")
    want(fake.context, wish_of([FREE]))
    for name, ids in (("nothing", ()), ("", ("none",))):
        with pytest.raises(UnknownRecord):
            vault_sets.chosen(fake.context, [name] if name else [], ids)
    found = vault_sets.chosen(fake.context, [], [request.request_id])
    patching.release_sets(fake.context, found)
    assert fake.ledger.requests()[0].vaulted == ""
    assert [[each.text for each in one] for one in fake.vault.stored.values()] == [[text(FREE)]]
    patching.release_sets(fake.context, vault_sets.chosen(fake.context, list(fake.vault.stored), []))
    assert (fake.vault.stored, wanted(fake.ledger.patches())) == ({}, [])


def test_a_deletion_drops_the_patch_and_makes_it_again(fake: FakeModel, notices: Notices) -> None:
    below, old = made(fake, [FREE]), made(fake, [FREE + 1], retain=[0, 1])
    assert text(0) in touched(fake)
    delete(fake, 0)
    kept, new = stack(fake)
    assert (kept, new.job.retain != old.job.retain) == (below, True)
    assert touched(fake) == {text(FREE), text(FREE + 1), text(1)}
    assert {each.text for found in fake.vault.stored.values() for each in found} == {
        text(FREE + 1),
        text(1),
    }  # record 1 may be deleted, too
    delete(fake, 1)
    assert stack(fake)[1].job.retain == WRITTEN
    assert (fake.vault.stored, touched(fake)) == ({}, {text(FREE), text(FREE + 1)})
    assert sum("making the patches again" in each for each in notices) == 2


def test_a_deletion_never_fails_for_a_patchs_sake(fake: FakeModel, notices: Notices) -> None:
    made(fake, [FREE], retain=[0, 1])
    fake.patcher.ends = ["fails"]
    assert delete(fake, 0).state == "completed"
    assert (stack(fake), touched(fake)) == ([], set())
    assert any("could not be made again (EnvironmentFault)" in each for each in notices)
    make_wanted(fake.context)
    assert touched(fake) == {text(FREE), text(1)}


def test_what_can_not_be_made_again_is_dropped_for_good(fake: FakeModel, notices: Notices) -> None:
    """The retain set that was filtered for it is not kept, either."""
    patch = made(fake, [FREE], retain=[0, 1])
    fake.vault.erase(patch.job.forget)
    commit(
        fake.context,
        Change(vault=[replace(e, held=False) for e in fake.ledger.vault() if e.role == "forget"]),
    )
    delete(fake, 0)
    assert (stack(fake), wanted(fake.ledger.patches())) == ([], [])
    assert (fake.vault.stored, fake.ledger.vault()) == ({}, [])
    assert any("dropped for good" in each for each in notices)


def test_a_set_that_can_not_be_read_stops_no_deletion(fake: FakeModel) -> None:
    patch = made(fake, [FREE], retain=[0, 1])
    fake.vault.erase([patch.job.retain])
    assert delete(fake, 0).state == "completed"
    assert (stack(fake), fake.vault.stored) == ([], {})


def test_shards_over_a_patch_go_with_it(fake: FakeModel) -> None:
    """Its retain set held a text that became a record later."""
    made(fake, [FREE], retain=[FREE + 1])
    shards_over(fake.context, stack(fake))
    reconcile(fake.context)
    add(fake.context, [fake_record(FREE + 1)])
    before = fake.checkpoints.held()
    fake.before_run.append(lambda: seen.append(fake.checkpoints.held() & before))
    seen: list[frozenset[str]] = []
    delete(fake, FREE + 1)
    assert seen == [frozenset()]  # before anything is trained anew
    assert trained_over(fake.ledger) == ()
    plain = fake_trained(HELD, 2)
    assert fake.checkpoints.stored == plain.checkpoints.stored
    assert text(FREE + 1) not in touched(fake)


def test_so_do_shards_over_a_patch_that_is_served_no_more(fake: FakeModel) -> None:
    made(fake, [FREE], retain=[FREE + 1])
    shards_over(fake.context, stack(fake))
    reconcile(fake.context)
    patching.revert_patches(fake.context)
    assert text(FREE + 1) in touched(fake)
    add(fake.context, [fake_record(FREE + 1)])
    delete(fake, FREE + 1)
    assert (trained_over(fake.ledger), touched(fake)) == ((), set())
    assert all(head.converged for head in fake.ledger.heads())


def test_shards_are_not_trained_over_what_a_deletion_may_drop(fake: FakeModel) -> None:
    made(fake, [FREE], retain=[0])
    with pytest.raises(ConfigConflict, match="would retrain every shard"):
        shards_over(fake.context, stack(fake))


def test_an_export_of_a_patch_that_was_reverted_goes_all_the_same(fake: FakeModel) -> None:
    patch = made(fake, [FREE], retain=[FREE + 1])
    add(fake.context, [fake_record(FREE + 1)])
    (row,) = fake.rows(FREE + 1)
    other = next(head for head in fake.ledger.heads() if head.shard != row.shard)
    assert other.key is not None
    export = Export("/out", other.shard, (0, 1, 2), 1, other.key, "sha", "then", patches=(patch.key,))
    commit(fake.context, Change(exports=[export]))
    patching.revert_patches(fake.context)
    delete(fake, FREE + 1)
    (found,) = fake.ledger.exports()
    assert found.state == "tainted"


def test_what_is_damaged_is_given_up_and_wanted_again_if_it_can_be(fake: FakeModel) -> None:
    fake.context = with_config(fake.context, patch_mode="joint")
    patch = made(fake, [FREE])
    shards_over(fake.context, stack(fake))
    reconcile(fake.context)
    fake.patches.stored[patch.key][ADAPTER_FILE] = b"{}"
    give_up(fake.context, [patch.key])
    reconcile(fake.context)
    assert (stack(fake), trained_over(fake.ledger), fake.patches.held()) == ([], (), frozenset())
    assert make_wanted(fake.context).patch == replace(patch, version=2)
    fake.vault.erase(patch.job.forget)
    give_up(fake.context, patch.job.forget)
    assert [each.held for each in fake.ledger.vault()] == [False]
    assert stack(fake) == [replace(patch, version=2)]


def test_what_no_commit_knows_is_swept(fake: FakeModel) -> None:
    patch = made(fake, [FREE])
    other = replace(patch.job, forget=("other",))
    fake.patches.save(other, {ADAPTER_FILE: b"{}"})
    fake.vault.put("left", [fake_record(FREE)])
    fake.patch_drafts.stored["left"] = b""
    reconcile(fake.context)
    assert fake.patches.held() == {patch.key}
    assert (fake.vault.stored, fake.patch_drafts.stored) == ({}, {})


def test_what_a_patch_does_to_the_shards_is_in_its_report(fake: FakeModel) -> None:
    seen: list[tuple[int, int]] = []

    def measure(before: Sequence[Patch], after: Sequence[Patch]) -> dict[str, int]:
        seen.append((len(before), len(after)))
        return {"kl": 0}

    made(fake, [FREE])
    want(fake.context, wish_of([FREE + 1]))
    done = make_wanted(fake.context, measure=measure)
    assert seen == [(1, 2)]
    assert done.patch == stack(fake)[1]
    assert done.report == {"steps": 2, "composition": {"kl": 0}}


def test_drift_is_measured_again_if_a_writer_disturbs_it(
    fake: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(fake, [FREE])
    found = iter([None, Composition(1, None, AnswerChange(1, 0.5, 0.5, agreement=0.75, kl=0.0), {})])

    def measure(*_: object) -> Composition:
        if (each := next(found)) is None:
            commit(fake.context, Change())
            raise IntegrityError("a checkpoint has just been replaced")
        return each

    monkeypatch.setattr(unlearn, "measure", measure)
    model: Any = SimpleNamespace(seq=fake.ledger.seq, context=lambda: nullcontext(fake.context))
    assert unlearn.drift(model) == 0.25


def test_nothing_of_a_text_is_in_the_ledger(fake: FakeModel) -> None:
    made(fake, [FREE], retain=[FREE + 1])
    delete(fake, 0, consent="asked")
    found = repr(fake.ledger.tables)
    for number in (0, FREE, FREE + 1):
        assert text(number) not in found
        assert fake_record(number).id not in found


def test_a_report_forgets_what_was_measured_on_a_deleted_record(fake: FakeModel) -> None:
    """A shard's mean before the deletion, with the one after it, reveals the record between them."""
    effect = {"num_records": 5, "answer_probability_before": 0.5}
    measured = {
        "num_records": 10,
        "base": effect,
        "shards": effect,
        "by_shard": {"0": effect, "1": effect},
    }
    want(fake.context, wish_of([FREE]))
    make_wanted(fake.context, measure=lambda *_: measured)
    (row,) = fake.rows(0)
    delete(fake, 0)
    (patch,) = stack(fake)
    left = {str(1 - row.shard): effect}
    composition = {"num_records": 10, "base": None, "shards": None, "by_shard": left}
    assert patch.report == {"steps": 2, "composition": composition}


def test_no_effect_on_few_records_is_kept() -> None:
    few, enough = (AnswerChange(n, 0.5, 0.5, 1.0, 0.0) for n in (MIN_RECORDS - 1, MIN_RECORDS))
    composition = Composition(9, enough, enough, {0: few, 1: enough}).to_json()
    assert (composition["by_shard"]["0"], composition["by_shard"]["1"]["num_records"]) == (
        None,
        MIN_RECORDS,
    )
    assert Composition(4, few, few, {0: few}).to_json()["base"] is None


def test_only_records_that_a_served_model_was_trained_on_are_asked(fake: FakeModel) -> None:
    """Where training was put off, heads serve fewer slices than they hold records of."""
    context = fake.context
    last = max(
        (row for shard in (0, 1) for row in context.stores.ledger.rows(shard)), key=lambda r: r.slice
    )
    forget_at_once(context, new_request(context, [last], (), Terms(approver="me")), defer=True)
    heads = {head.shard: head.key for head in context.stores.ledger.heads()}
    prefixes = {
        each.shard: each.prefix
        for each in context.stores.ledger.checkpoints()
        if each.key in heads.values()
    }
    asked = chosen_rows(context, 1000)
    rows = [row for shard in prefixes for row in context.stores.ledger.rows(shard)]
    trained = {row.id_digest for row in rows if row.slice in prefixes[row.shard]}
    assert {row.id_digest for row in asked} == trained
    assert len(trained) < len(rows)
