"""Whoever may read some shards alone sees the others nowhere, and no file of them is opened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sisa.core.errors import ConfigConflict, SisaError, UnknownRecord
from sisa.flows.requests import Terms
from sisa.model import Model, open_model
from tests.models.confessing import NUM_RECORDS, context_of, record
from tests.models.opened_files import opened_files

OWN = 0  # of the shards 0 and 1
IDS = [record(number).id for number in range(NUM_RECORDS)]


@pytest.fixture
def model(model: Path) -> Model:
    return open_model(model, executor="serial")


@pytest.fixture
def group(model: Model) -> Model:
    return model.within({OWN}, model.partition)


def ids_in(model: Model, shard: int) -> list[str]:
    return [each.id for each in model.where(IDS) if each.shard == shard]


def files_of_others(model: Model) -> set[str]:
    """Return the names of all slices, indexes and checkpoints of other shards."""
    with context_of(model.directory) as context:
        ledger = context.stores.ledger
        found = {each.name for each in ledger.slices() if each.shard != OWN}
        found |= {each.name for each in ledger.indexes() if each.shard != OWN}
        return found | {each.key for each in ledger.checkpoints() if each.shard != OWN}


QUESTIONS: dict[str, Callable[[Model, list[str]], object]] = {
    "where": lambda group, ids: group.where(ids),
    "text": lambda group, _: group.find(text=record(1).text, top_k=NUM_RECORDS),
    "like": lambda group, ids: group.find(like=ids[0], top_k=NUM_RECORDS),
    "routes": lambda group, _: group.routes([record(n).text for n in range(NUM_RECORDS)]),
    "plan": lambda group, ids: group.plan_forget(ids),
    "submit": lambda group, ids: group.submit(ids[:1]),
    "requests": lambda group, _: group.requests(),
    "queue": lambda group, _: group.plan_run(),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_no_file_of_another_shard_is_opened(model: Model, group: Model, name: str) -> None:
    ids, others = ids_in(model, OWN), files_of_others(model)
    with opened_files(model.directory) as opened:
        QUESTIONS[name](group, ids)
    assert {part for path in opened for part in path.parts} & others == set()


@pytest.mark.parametrize("name", ["text", "like", "routes"])
def test_the_recorder_sees_what_the_whole_model_opens(model: Model, name: str) -> None:
    ids, others = ids_in(model, OWN), files_of_others(model)
    with opened_files(model.directory) as opened:
        QUESTIONS[name](model, ids)
    assert {part for path in opened for part in path.parts} & others


def test_records_of_others_were_never_held(model: Model, group: Model) -> None:
    own, foreign = ids_in(model, OWN), ids_in(model, 1)
    assert [each.id for each in group.where(own)] == own
    assert {each.id for each in group.find(text=record(1).text, top_k=100)} == set(own)
    asks: list[Callable[[str], object]] = [
        lambda id_: group.where([id_]),
        lambda id_: group.find(like=id_),
        lambda id_: group.plan_forget([id_]),
        lambda id_: group.submit([id_]),
    ]
    for ask in asks:
        found = {str(failure(ask, each)) for each in (*foreign, "nobody")}
        assert len(found) == 1, "an id of another shard looks unlike one that was never held"
        assert isinstance(failure(ask, "nobody"), UnknownRecord)
    assert group.requests() == []


def failure(ask: Callable[[str], object], id_: str) -> SisaError:
    with pytest.raises(SisaError) as error:
        ask(id_)
    return error.value


def test_deleted_records_of_others_were_never_held_either(model: Model, group: Model) -> None:
    own, foreign = ids_in(model, OWN)[0], ids_in(model, 1)[0]
    model.forget([own])
    model.forget([foreign])
    assert [each.state for each in group.where([own])] == ["deleted"]
    with pytest.raises(UnknownRecord):
        group.where([foreign])
    assert [each.request.num_records for each in group.requests()] == [1]


def test_requests_of_others_are_neither_seen_nor_decided(model: Model, group: Model) -> None:
    own, foreign = ids_in(model, OWN), ids_in(model, 1)
    mine = group.submit(own[:1], terms=Terms(external_id="T-1")).request.request_id
    theirs = model.submit(foreign[:1], terms=Terms(external_id="T-2")).request.request_id
    both = model.submit([own[1], foreign[1]]).request.request_id
    assert [each.request.request_id for each in group.requests()] == [mine]
    assert len(model.requests()) == 3
    assert group.decide("T-1", "approved", by="anna").request.state == "approved"
    for name in (theirs, both, "T-2"):
        with pytest.raises(UnknownRecord):
            group.request(name)
        with pytest.raises(UnknownRecord):
            group.decide(name, "approved", by="anna")
        with pytest.raises(UnknownRecord):
            group.extend(name, "because")
    assert {each.request.state for each in model.requests()[1:]} == {"received"}


def test_an_external_id_has_one_meaning_in_the_whole_model(model: Model, group: Model) -> None:
    model.submit(ids_in(model, 1)[:1], terms=Terms(external_id="T-1"))
    with pytest.raises(ConfigConflict, match="external id"):
        group.submit(ids_in(model, OWN)[:1], terms=Terms(external_id="T-1"))
    assert len(model.requests()) == 1


def test_copies_in_other_shards_are_not_shown(model: Model, group: Model) -> None:
    own = model.within({0}, model.partition).submit(ids_in(model, 0)[:1])
    foreign = set(ids_in(model, 1))
    assert not foreign & {each.id for each in own.near}
    assert not foreign & set(own.copies)
    assert group.partition == model.partition


WHOLE: dict[str, Callable[[Model], object]] = {
    "status": lambda group: group.status(),
    "verify": lambda group: group.verify(),
    "replay": lambda group: group.verify(replay="all"),
    "run": lambda group: group.run(),
    "forget": lambda group: group.forget([IDS[0]]),
    "add": lambda group: group.add([record(99)]),
    "rectify": lambda group: group.rectify([record(1)]),
    "resume": lambda group: group.resume(),
    "export": lambda group: group.export("adapters"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_concerns_the_whole_model_is_refused(group: Model, model: Model, name: str) -> None:
    before = model.status()
    with pytest.raises(ConfigConflict, match="whole model"):
        WHOLE[name](group)
    assert model.status() == before


def test_shards_named_under_another_partition_show_nothing(model: Model) -> None:
    """After records move to other shards, the same shard number means other people."""
    former = model.within({OWN}, "another partition")
    for question in QUESTIONS.values():
        with pytest.raises(ConfigConflict, match="anew"):
            question(former, ids_in(model, OWN))


def test_the_partition_changes_with_what_places_records(model: Model) -> None:
    config = model.config
    named = {model.partition}
    for change in ({"shards": 3}, {"group_by": None}):
        model.config = config.model_copy(update={"sisa": config.sisa.model_copy(update=change)})
        named.add(model.partition)
    model.config = config
    model._meta = {**model._meta, "key": "another"}
    assert len(named | {model.partition}) == 4
