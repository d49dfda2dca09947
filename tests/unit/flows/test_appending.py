"""Appending: new slices at the end, whose place and training depend on nothing that comes after."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.cli.asking import located
from cluster.cli.training import taken
from sisa.core.digest import Keyed
from sisa.core.domain import Record
from sisa.core.errors import ConfigConflict, InvalidInput
from sisa.data.reader import read_records
from sisa.flows.ingest import add, train
from sisa.flows.locations import where
from sisa.flows.reconfigure import move
from sisa.flows.status import shard_statuses
from sisa.planning.bands import Bands
from sisa.planning.layout import Assigner, Layout
from sisa.planning.plan import LAYERWISE, passes
from tests.fakes.ports import FakeModel, changed, fake_model, fake_recipe, fake_record

SLICES = 3


def some(*numbers: int) -> list[Record]:
    return [fake_record(number) for number in numbers]


@pytest.fixture
def fake() -> FakeModel:
    model = fake_model(2, fake_recipe(SLICES))
    train(model.context, some(*range(20)))
    model.trained.clear()
    return model


def slices_of(fake: FakeModel, *numbers: int) -> set[int]:
    return {row.slice for row in fake.rows(*numbers)}


@given(st.integers(0, 400), st.integers(0, 50), st.sampled_from([None, 0.2]))
def test_each_generation_has_slices_of_its_own(number: int, generation: int, risk: float | None) -> None:
    layout = Layout(4, SLICES, Bands(thresholds=(0.1,)))
    assigner = Assigner(Keyed(b"1" * 32), layout)
    first = replace(fake_record(number), deletion_risk=risk)
    shard, slice_ = assigner.place(first)
    later = assigner.place(replace(first, generation=generation or None))
    assert later == (shard, generation * SLICES + slice_)
    assert layout.generation(later[1]) == generation


def test_appended_stages_make_the_passes_that_the_last_of_as_many_would() -> None:
    for slice_ in range(12):
        asked = passes("cumulative", 4, SLICES, slice_)
        assert asked == passes("cumulative", 4, max(SLICES, slice_ + 1))
    assert passes("sequential", 4, SLICES, 11) == (4, 1)


def test_nothing_that_was_trained_is_trained_again(fake: FakeModel) -> None:
    held = set(fake.checkpoints.stored)
    add(fake.context, some(*range(20, 30)), append=True)
    assert slices_of(fake, *range(20, 30)) <= {3, 4, 5}
    assert {job.slice for job in fake.trained} <= {3, 4, 5}
    assert held <= set(fake.checkpoints.stored)
    add(fake.context, some(30), append=True)
    assert slices_of(fake, 30) <= {6, 7, 8}
    state = shard_statuses(fake.context)
    assert all(each.converged and each.depth == each.num_stages > SLICES for each in state)
    assert {each.num_slices for each in state} == {max(slices_of(fake, 30)) + 1}


def test_what_was_appended_is_reported_with_its_generation(fake: FakeModel) -> None:
    first, second = (add(fake.context, some(number), append=True) for number in (20, 21))
    assert (first.generation, second.generation) == (1, 2)
    assert "appended as generation 2" in taken(second, Path("model")).text
    for again in (add(fake.context, some(21), append=True), add(fake.context, some(22))):
        assert again.generation is None
        assert "generation" not in taken(again, Path("model")).text
    places = where(fake.context, [record.id for record in some(3, 20, 21, 22)])
    assert [each.generation for each in places] == [0, 1, 2, 0]
    assert located(places).text.count("(generation ") == 2


def test_the_same_file_again_is_held_already_and_needs_no_generation(fake: FakeModel) -> None:
    add(fake.context, some(20, 21), append=True)
    fake.trained.clear()
    for append in (True, False):
        taken = add(fake.context, some(3, 20, 21), append=append)
        assert (taken.added, taken.already_held) == (0, 3)
    assert train(fake.context, some(*range(22))).already_held == 22
    assert fake.trained == []


def test_another_generation_than_the_held_one_is_another_content(fake: FakeModel) -> None:
    add(fake.context, some(20), append=True)
    with pytest.raises(InvalidInput, match="differ from the held") as refused:
        train(fake.context, [replace(record, generation=2) for record in some(20)])
    assert "rectify" in refused.value.next_step
    assert "correct the source" in refused.value.next_step


def test_an_empty_model_begins_with_generation_0() -> None:
    model = fake_model(2, fake_recipe(SLICES))
    train(model.context, [])
    add(model.context, some(1, 2), append=True)
    assert slices_of(model, 1, 2) <= {0, 1, 2}


def test_a_generation_that_a_record_carries_stands(fake: FakeModel) -> None:
    add(fake.context, [replace(record, generation=4) for record in some(20)], append=True)
    assert slices_of(fake, 20) <= {12, 13, 14}


def test_generation_0_is_none(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"id": "a", "text": "x", "generation": 0}, {"id": "b", "text": "x", "generation": 2}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [each.generation for each in read_records([file])] == [None, 2]
    plain = fake_record(1)
    assert json.loads(replace(plain, generation=2).canonical())[4:] == [None, 2]
    assert json.loads(replace(plain, deletion_risk=0.5).canonical())[4:] == [0.5]
    assert Record.from_list(json.loads(replace(plain, generation=2).canonical())).generation == 2


def test_a_layerwise_model_has_no_layers_left_for_appended_slices(fake: FakeModel) -> None:
    recipe = fake.context.recipe
    training = {**recipe.training, LAYERWISE: SLICES}
    context = changed(fake.context, unpatched_recipe=replace(recipe, training=training))
    held = set(fake.checkpoints.stored)
    carried = [replace(record, generation=1) for record in some(30)]
    with pytest.raises(ConfigConflict, match="none are left"):
        add(context, some(30), append=True)
    for refused in (add, train):
        with pytest.raises(ConfigConflict, match="none are left"):
            refused(context, carried)
    assert held == set(fake.checkpoints.stored)
    add(fake.context, some(30), append=True)
    with pytest.raises(ConfigConflict, match="none are left"):
        move(context, {"retrain"}, {})
