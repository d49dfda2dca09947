"""Random histories of a model of fakes, and crashes at its effects."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

from hypothesis import strategies as st

from sisa.core.checkpoint_files import ADAPTER_FILE
from sisa.core.domain import Record, RecordRow, Risk
from sisa.flows.context.served import model_digest
from sisa.flows.ingest import add, train
from sisa.flows.reconcile import reconcile
from sisa.flows.requests import Terms, carry_out, submit
from sisa.flows.restored_backup import catch_up
from sisa.planning.bands import Bands
from sisa.planning.plan import Schedule
from tests.crash import Crash, Fuse
from tests.fakes.ports import FakeModel, fake_model, fake_recipe, fake_record

SUBJECTS = (None, None, "ada", "bob", "eve")
RISKS: tuple[Risk, ...] = tuple((None, 0.0, 0.1, 0.9, "trial")[n % 5] for n in range(41))
BANDS = (
    None,
    Bands(thresholds=(0.5,), classes={"trial": 0.7}),
    Bands(thresholds=(0.05, 0.5), classes={"trial": 0.1}),
)


@dataclass(frozen=True)
class History:
    num_shards: int
    num_slices: int
    schedule: Schedule
    first: tuple[int, ...] = ()
    steps: tuple[tuple[str, tuple[int, ...]], ...] = ()
    bands: Bands | None = None
    orders: int = 1
    budget: int | None = None  # bytes of a shard's checkpoints


def subject_of(number: int) -> str | None:
    return SUBJECTS[number % len(SUBJECTS)]


def record(number: int) -> Record:
    """Return a record whose risk is its subject's, or its own."""
    subject = subject_of(number)
    risk = RISKS[number if subject is None else SUBJECTS.index(subject)]
    return dataclasses.replace(fake_record(number, subject), deletion_risk=risk)


@st.composite
def histories(draw: st.DrawFn) -> History:
    numbers = st.lists(st.integers(0, 40), unique=True, max_size=12).map(tuple)
    step = st.tuples(st.sampled_from(["add", "append", "forget", "subject"]), numbers)
    num_slices = draw(st.integers(1, 4))
    return History(
        num_shards=draw(st.integers(1, 4)),
        num_slices=num_slices,
        bands=draw(st.sampled_from([b for b in BANDS if b is None or b.num_bands <= num_slices])),
        orders=draw(st.sampled_from([n for n in (1, 1, 2, 3) if n <= num_slices])),
        schedule=draw(st.sampled_from(["cumulative", "sequential"])),
        first=draw(numbers),
        steps=tuple(draw(st.lists(step, max_size=5))),
    )


class Model:
    """The system under test beside the plain set of what should remain."""

    consent = ""  # of deletions, to keep the text for a patch

    def __init__(self, history: History) -> None:
        self.fake: FakeModel = like(history)
        self.remaining: set[int] = set(history.first)
        self.generations: dict[int, int] = {}
        self.deleted: set[int] = set()
        self.fake.before_run.append(self.check_nothing_unheld_is_reachable)
        self.fake.before_run.append(self.check_heads_are_deepest)
        self.filled: set[tuple[int, int]] = set()
        self.held: set[str] = set()
        train(self.fake.context, [record(number) for number in history.first])

    def record(self, number: int) -> Record:
        """Return the record as it is, with the generation in which it was appended."""
        return dataclasses.replace(record(number), generation=self.generations.get(number))

    def rows(self, numbers: set[int]) -> list[RecordRow]:
        return self.fake.rows(*sorted(numbers))

    def step(self, kind: str, numbers: tuple[int, ...]) -> None:
        self.fake.trained.clear()
        self.filled = {(file.shard, file.slice) for file in self.fake.ledger.slices()}
        self.held = {each.key for each in self.fake.ledger.checkpoints()}
        if kind in ("add", "append"):
            fresh = set(numbers) - self.deleted
            before = set(self.remaining)
            add(self.fake.context, [record(n) for n in sorted(fresh)], append=kind == "append")
            if kind == "append" and before:
                last = max(self.generations.get(number, 0) for number in before)
                self.generations |= dict.fromkeys(fresh - before, last + 1)
            self.remaining |= fresh
            touched = self.rows(fresh - before)
        else:
            gone = set(numbers) & self.remaining
            if kind == "subject":
                subjects = {subject_of(number) for number in gone} - {None}
                gone = {n for n in self.remaining if subject_of(n) in subjects}
            touched = self.rows(gone)
            if gone:
                name = f"r{len(self.deleted)}"
                terms = Terms(external_id=name, approver="a person", consent=self.consent)
                carry_out(self.fake.context, [submit(self.fake.context, touched, (), terms)])
            self.remaining -= gone
            self.deleted |= gone
        self.check_only_suffixes(touched)
        self.check_no_residue()

    def resume(self, kind: str, numbers: tuple[int, ...]) -> None:
        """Ask again after a crash: what was committed is done, the rest is done now."""
        done = {n for n in self.deleted | set(numbers) | self.remaining if not self.rows({n})}
        self.deleted |= self.remaining & done
        self.remaining -= done
        self.fake.trained.clear()
        self.step(kind, numbers)

    def check_only_suffixes(self, touched: list[RecordRow]) -> None:
        hit: dict[int, set[int]] = {}
        for row in touched:
            hit.setdefault(row.shard, set()).add(row.slice)
        after = {(file.shard, file.slice) for file in self.fake.ledger.slices()}
        for job in self.fake.trained:
            assert job.shard in hit, "an untouched shard was retrained"
            assert job.key not in self.held, "a held stage was retrained"
            before = {slice_ for shard, slice_ in self.filled if shard == job.shard}
            new = self.fake.context.recipe.other_orders and before == set(
                job.prefix
            )  # the end of another order
            gone = {each for each in hit[job.shard] if (job.shard, each) not in after}
            new = new or self.fake.context.recipe.shard_budget is not None  # or was dropped
            assert new or gone or hit[job.shard] & set(job.prefix), "an untouched prefix was retrained"
        keys = [job.key for job in self.fake.trained]
        assert len(keys) == len(set(keys)), "a stage was trained twice"

    def check_heads_are_clean(self) -> None:
        """Check that, from the commit on, served heads know only records that the ledger holds."""
        held = {record(number).id for number in range(41) if self.rows({number})}
        for head in self.fake.ledger.heads():
            if head.key is not None:
                adapter = self.fake.checkpoints.stored[head.key][ADAPTER_FILE]
                assert set(json.loads(adapter)["touched"]) <= held

    def check_heads_are_deepest(self) -> None:
        """Check that heads are the target if it is held, else as deep as any held checkpoint."""
        for head in self.fake.ledger.heads():
            held = {each.key: len(each.prefix) for each in self.fake.ledger.checkpoints(head.shard)}
            if head.key != head.target or head.key is None:
                assert head.depth == max(held.values(), default=0)
            assert head.depth == held.get(head.key or "", 0)
            assert head.key == head.target or head.target not in held

    def check_nothing_unheld_is_reachable(self) -> None:
        """Check that every trace of what the ledger does not hold is erased before training."""
        self.check_no_residue({number for number in range(41) if self.rows({number})})

    def check_no_residue(self, numbers: set[int] | None = None) -> None:
        remaining = self.remaining if numbers is None else numbers
        held = {record(number).id for number in remaining}
        for files in self.fake.checkpoints.stored.values():
            for data in files.values():
                assert set(json.loads(data)["touched"]) <= held
        for stored in self.fake.records.stored.values():
            assert {each.record.id for each in stored} <= held
        vectors = {row.vector_id for row in self.rows(remaining)}
        for index in self.fake.index.stored.values():
            assert set(index) <= vectors
        ledger = repr(self.fake.ledger.tables)
        assert not any(record(number).id in ledger for number in range(41))


def like(history: History) -> FakeModel:
    recipe = fake_recipe(
        history.num_slices,
        history.schedule,
        orders=history.orders,
        bands=history.bands,
        budget=history.budget,
    )
    return fake_model(history.num_shards, recipe, bands=history.bands)


def assert_equal(one: FakeModel, other: FakeModel) -> None:
    assert one.checkpoints.stored == other.checkpoints.stored
    assert one.records.stored == other.records.stored
    assert one.index.stored == other.index.stored
    assert one.ledger.heads() == other.ledger.heads()
    assert model_digest(one.context) == model_digest(other.context)


# Every method of a store in `Stores` that changes something; a test compares them with the ports.
EFFECTS = {
    "ledger": ("commit", "scrub"),
    "witness": ("append",),
    "records": ("write", "erase"),
    "checkpoints": ("save", "erase"),
    "index": ("build", "erase"),
    "exports": ("write", "abandon", "erase"),
    "metrics": ("append", "keep_losses"),
    "patches": ("save", "erase"),
    "vault": ("put", "erase"),
    "patch_drafts": ("erase",),
    "hidden_states": ("write", "erase"),
}
COMMITS = {"ledger": ("commit",), "witness": ("append",)}


def effects_of(fake: FakeModel, named: Mapping[str, tuple[str, ...]]) -> list[tuple[object, str]]:
    """Return named effects of a model's stores, for a fuse to guard."""
    stores = fake.context.stores
    return [(getattr(stores, part), name) for part, names in named.items() for name in names]


def wire(
    fake: FakeModel, fuse: Fuse, named: Mapping[str, tuple[str, ...]] = MappingProxyType(EFFECTS)
) -> None:
    """Put effects of a model behind a fuse, for the rest of its life."""
    for store, name in effects_of(fake, named):
        setattr(store, name, fuse.guard(getattr(store, name)))


def attempt(effect: Callable[[], None]) -> bool:
    try:
        effect()
    except Crash:
        return False
    return True


def lived_through_a_crash(history: History, at: int, after: bool) -> Model:
    """Return a history with a crash at one effect, continued as the next command does."""
    model = Model(dataclasses.replace(history, first=()))
    wire(model.fake, Fuse(at, after))
    for kind, numbers in (("add", history.first), *history.steps):
        if not attempt(partial(model.step, kind, numbers)):
            model.check_heads_are_clean()
            model.check_heads_are_deepest()
            catch_up(model.fake.context)
            reconcile(model.fake.context)
            model.resume(kind, numbers)
    model.check_no_residue()
    return model


STORES = ("records", "checkpoints", "index")


class Saved:
    """A backup of the model directory: ledger and files, not the witness."""

    def __init__(self, fake: FakeModel) -> None:
        self.tables = copy.deepcopy(fake.ledger.tables)
        self.stored = {name: copy.deepcopy(getattr(fake, name).stored) for name in STORES}

    def restore(self, fake: FakeModel) -> None:
        fake.ledger.tables = copy.deepcopy(self.tables)
        for name in STORES:
            getattr(fake, name).stored = copy.deepcopy(self.stored[name])
