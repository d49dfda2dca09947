"""The laws of patches over random histories, with fakes.

Histories have additions, deletions with and without consent, requests for patches, reverts, releases,
shards over patches, failing patchers, damaged texts and crashes anywhere. After each step the served
patches are one stack, each made upon exactly those below it, and no other files are held; the vault
holds what `patch_plan.needed` returns; a deleted text is only where a consent put it; every byte of the
shards equals training from scratch over the same patched base.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sisa.core.checkpoint_files import ADAPTER_FILE
from sisa.core.digest import sha256_hex
from sisa.core.domain import RecordRow
from sisa.core.errors import ConfigConflict, InvalidInput, SisaError
from sisa.core.patches import Patch, PatchMode, VaultSet, active, wanted
from sisa.flows.context.context import Context, trained_over
from sisa.flows.ingest import train
from sisa.flows.patches import patching, vault_sets
from sisa.flows.patches.patching import Wish, make_wanted, shards_over, want
from sisa.flows.reconcile import reconcile
from sisa.flows.restored_backup import catch_up
from sisa.planning.patch_plan import needed
from tests.crash import Crash, Fuse
from tests.examples import num_examples
from tests.fakes.ports import fake_model, with_config
from tests.property.histories import History, Model, record, wire

NUM_HISTORIES, NUM_CRASHES = num_examples(500), num_examples(400)
NUMBERS = range(5)
KINDS = (
    *("add", "forget", "consent", "forget", "wish", "wish", "wish", "request"),
    *("revert", "all", "release", "over", "over", "mode"),
)
TROUBLE = ("fails", "nothing", "unfinished", "rot")
RECORDS = {"add": "add", "forget": "forget", "consent": "forget"}
TEXTS = {record(number).text: number for number in range(41)}


@dataclass(frozen=True)
class Step:
    """A step about `numbers`; `retain` are those of a wish's retain set, None for a written one."""

    kind: str
    numbers: tuple[int, ...]
    retain: tuple[int, ...] | None = None


@st.composite
def steps_of(draw: st.DrawFn, kinds: tuple[str, ...]) -> tuple[Step, ...]:
    numbers = st.lists(st.sampled_from(NUMBERS), unique=True, min_size=1, max_size=3).map(tuple)
    step = st.builds(Step, st.sampled_from(kinds), numbers, st.none() | numbers)
    return tuple(draw(st.lists(step, min_size=2, max_size=12)))


MODES = st.sampled_from(["sequential", "joint"])


class Patched(Model):
    """A model with patches beside plain sets of what may be where."""

    def __init__(self, first: tuple[int, ...], mode: PatchMode) -> None:
        super().__init__(History(2, 2, "cumulative", (), ()))
        self.fake.context = with_config(self.fake.context, patch_mode=mode)
        self.trained_over = trained_over(self.fake.ledger)
        self.given: dict[str, set[int]] = {}  # numbers of the records in each set that there ever was
        super().step("add", first)

    def note_puts(self) -> None:
        put = self.fake.vault.put

        def noted(name: str, records: Any) -> tuple[str, int]:
            self.given[name] = {TEXTS[each.text] for each in records}
            return put(name, records)

        self.fake.vault.put = noted  # type: ignore[method-assign]

    @property
    def context(self) -> Context:
        return self.fake.context

    def patches(self) -> list[Patch]:
        return self.fake.ledger.patches()

    def check_only_suffixes(self, touched: list[RecordRow]) -> None:
        """Check that suffixes alone are retrained, and all shards once they are not over a patch."""
        if trained_over(self.fake.ledger) == self.trained_over:
            super().check_only_suffixes(touched)

    def go(self, step: Step) -> None:
        """Carry out a step; deletions raise nothing, whatever happens to patches."""
        context = self.context
        self.trained_over = trained_over(self.fake.ledger)
        if step.kind in RECORDS:
            self.consent = "asked" if step.kind == "consent" else ""
            super().step(RECORDS[step.kind], step.numbers)
        elif step.kind in ("wish", "request"):
            self.wish(context, step)
        elif step.kind in ("revert", "all"):
            with contextlib.suppress(InvalidInput):  # nothing to revert
                patching.revert_patches(context, everything=step.kind == "all")
        elif step.kind == "release":
            patching.release_sets(context, self.some_set(step))
        elif step.kind == "over":
            with contextlib.suppress(ConfigConflict):  # records of the model in a retain set
                shards_over(context, active(self.patches()))
                reconcile(context)
        elif step.kind == "mode":
            mode: PatchMode = (
                "joint" if context.settings.config.patch_mode == "sequential" else "sequential"
            )
            self.fake.context = with_config(context, patch_mode=mode)
            reconcile(self.fake.context)
        elif step.kind == "rot":
            self.fake.vault.erase([each.name for each in self.some_set(step)])
        else:
            self.fake.patcher.ends.append(step.kind)  # type: ignore[arg-type]

    def some_set(self, step: Step) -> list[VaultSet]:
        held = [each for each in self.fake.ledger.vault() if each.held]
        return held[step.numbers[0] % len(held) :][:1] if held else []

    def wish(self, context: Context, step: Step) -> None:
        requests = [each for each in context.stores.ledger.requests() if each.vaulted][:1]
        if step.kind == "request" and not requests:
            return
        retain = None
        if (
            step.retain is not None
        ):  # never of what was deleted: that would be a consent to have it again
            retain = [record(n) for n in step.retain if n not in self.deleted] or None
        forget = [record(n) for n in step.numbers] if step.kind == "wish" else ()
        wish = Wish({"method": "npo"}, forget, retain, "asked")
        with contextlib.suppress(ConfigConflict):  # another is wanted
            want(context, wish, requests if step.kind == "request" else ())
        make_wanted(context)

    def standing(self) -> object:
        """Return what a step about patches changes at its commit."""
        sets = [(each.name, each.held) for each in self.fake.ledger.vault()]
        return [(each.key, each.version, each.state) for each in self.patches()], sets

    def recover(self, step: Step, before: object) -> None:
        """Run the next commands after a crash: finish what was committed, ask again for the rest."""
        catch_up(self.context)
        reconcile(self.context)
        self.check_stack()
        self.check_vault(whole=True)
        if step.kind in RECORDS:
            super().resume(RECORDS[step.kind], step.numbers)
        elif step.kind != "mode" and (step.kind == "over" or self.standing() == before):
            self.go(step)
        make_wanted(self.context)

    def check(self, *, whole: bool = True) -> None:
        """Check all laws; with `whole`, no file is damaged and no error interrupted a step."""
        self.check_no_residue()
        self.check_stack()
        self.check_vault(whole=whole)
        self.check_texts()

    def check_stack(self) -> None:
        stack = active(self.patches())
        for place, patch in enumerate(stack):
            assert patch.job.beneath == tuple(each.key for each in stack[:place])
            body = json.loads(self.fake.patches.stored[patch.key][ADAPTER_FILE])
            below = [self.fake.patches.stored[key][ADAPTER_FILE] for key in patch.job.beneath]
            assert body["beneath"] == [sha256_hex(data) for data in below]
            assert body["job"] == patch.key
        assert self.fake.patches.held() == {each.key for each in stack}.union(
            trained_over(self.fake.ledger)
        )
        assert self.fake.patch_drafts.held() <= {each.key for each in wanted(self.patches())}

    def check_vault(self, *, whole: bool) -> None:
        ledger, context = self.fake.ledger, self.context
        held = {each.name for each in ledger.vault() if each.held}
        keep = needed(
            self.patches(),
            context.settings.config.patch_mode,
            ledger.vault(),
            vault_sets.deletable(context),
        )
        assert held <= keep
        assert self.fake.vault.held() <= held
        if whole:
            assert self.fake.vault.held() == held
        for request in ledger.requests():
            assert not request.vaulted or request.vaulted in {each.name for each in ledger.vault()}

    def check_texts(self) -> None:
        """Check that texts of deleted records are only in sets to forget and in patches that forget
        them.
        """
        roles = {each.name: each.role for each in self.fake.ledger.vault()}
        for name, records in self.fake.vault.stored.items():
            if roles[name] == "retain":
                assert self.deleted.isdisjoint(TEXTS[each.text] for each in records)
        forgets = {each.key: set(each.job.forget) for each in self.patches()}
        for key, files in self.fake.patches.stored.items():
            body = json.loads(files[ADAPTER_FILE])
            job = next(each.job for each in self.patches() if each.key == key)
            names = set().union(*(forgets[each] for each in (key, *job.beneath)))
            given = set().union(*(self.given[name] for name in names))
            assert {TEXTS[text] for text in body["touched"]} & self.deleted <= given

    def check_bytes(self) -> None:
        """Check every byte of the shards, over the patches over which they are trained."""
        scratch = fake_model(2, self.context.recipe)
        train(scratch.context, [record(number) for number in sorted(self.remaining)])
        assert self.fake.checkpoints.stored == scratch.checkpoints.stored
        assert self.fake.records.stored == scratch.records.stored
        assert self.fake.index.stored == scratch.index.stored
        assert self.fake.ledger.heads() == scratch.ledger.heads()


SETTINGS = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
FIRST = st.sets(st.sampled_from(NUMBERS), max_size=4).map(lambda found: tuple(sorted(found)))


@pytest.mark.slow
@settings(SETTINGS, max_examples=NUM_HISTORIES)
@given(steps_of(KINDS), MODES, FIRST)
def test_any_history_keeps_the_laws(
    steps: tuple[Step, ...], mode: PatchMode, first: tuple[int, ...]
) -> None:
    model = Patched(first, mode)
    model.note_puts()
    for step in steps:
        model.go(step)
        model.check()
        model.check_bytes()
        assert not wanted(model.patches())


@pytest.mark.slow
@settings(SETTINGS, max_examples=NUM_HISTORIES)
@given(steps_of((*KINDS, *TROUBLE)), MODES, FIRST)
def test_no_trouble_with_patches_stops_a_deletion(
    steps: tuple[Step, ...], mode: PatchMode, first: tuple[int, ...]
) -> None:
    model = Patched(first, mode)
    model.note_puts()
    for step in steps:
        with contextlib.nullcontext() if step.kind in RECORDS else contextlib.suppress(SisaError):
            model.go(step)
        reconcile(model.context)
        model.check(whole=False)
        model.check_bytes()


@pytest.mark.slow
@settings(SETTINGS, max_examples=NUM_CRASHES)
@given(steps_of(KINDS), MODES, FIRST, st.integers(1, 60), st.booleans())
def test_a_crash_at_any_effect_ends_the_same(
    steps: tuple[Step, ...], mode: PatchMode, first: tuple[int, ...], at: int, after: bool
) -> None:
    model, twin = Patched(first, mode), Patched(first, mode)
    wire(model.fake, Fuse(at, after))
    for each in (model, twin):
        each.note_puts()
    for step in steps:
        before = model.standing()
        try:
            model.go(step)
        except Crash:
            model.recover(step, before)
        twin.go(step)
        model.check()
    model.check_bytes()
    assert [each.key for each in active(model.patches())] == [e.key for e in active(twin.patches())]
    assert model.fake.vault.stored == twin.fake.vault.stored
    assert model.fake.patches.stored == twin.fake.patches.stored
    assert model.fake.checkpoints.stored == twin.fake.checkpoints.stored
