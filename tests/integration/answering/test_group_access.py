"""A question of whoever may read some shards alone: no other shard's adapter is loaded or run for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import sisa
from sisa.core.errors import InvalidInput
from sisa.flows.answers.ask import Answer
from sisa.store.checkpoints import FileCheckpoints
from tests.models.opened_files import opened_files
from tests.models.tiny_model import PEOPLE, Tiny, change_run, ids_of

pytestmark = pytest.mark.torch

OWN = 0
PROMPTS: list[Any] = [row["prompt"] for row in PEOPLE]
PROMPTS += ["What is the capital of France?", [{"role": "user", "content": PEOPLE[0]["prompt"]}]]


@contextmanager
def loaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Collect the keys of the checkpoints that a store loads."""
    keys: list[str] = []
    load = FileCheckpoints.load

    def recording(store: FileCheckpoints, key: str, manifest: str) -> dict[str, bytes]:
        keys.append(key)
        return load(store, key, manifest)

    with monkeypatch.context() as patch:
        patch.setattr(FileCheckpoints, "load", recording)
        yield keys


@pytest.mark.parametrize(
    "aggregation",
    [
        "routed",
        {"method": "routed", "top_k": 3, "min_score": 1.9, "below": "mean_prob"},
        "mean_prob",
        "merged",
    ],
    ids=["routed", "below", "mean_prob", "merged"],
)
def test_an_outsiders_question_touches_no_other_adapter(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, aggregation: Any
) -> None:
    change_run(tiny.run_file, sisa__aggregation=aggregation)
    tiny.train()
    model = tiny.open()
    own = {each.head for each in model.status().shards if each.shard == OWN}
    group = model.within({OWN}, model.partition)
    with loaded(monkeypatch) as keys, opened_files(model.directory) as opened:
        answers = group.generate_all(PROMPTS, max_new_tokens=2)
    assert set(keys) == own
    assert {shard for each in answers for shard in each.shards} == {OWN}
    named = {path.parent.name for path in opened if path.name.startswith("adapter_model")}
    assert named == own
    with loaded(monkeypatch) as keys:
        assert group.answerer()[0].shards == {OWN}
    assert set(keys) == own


def test_a_groups_answers_depend_on_its_own_shards_alone(tiny: Tiny) -> None:
    """They stay the same, word for word, when all that other shards hold is deleted."""

    def asked(model: sisa.Model) -> list[Answer]:
        return model.within({OWN}, model.partition).generate_all(PROMPTS, max_new_tokens=4)

    change_run(tiny.run_file, sisa__aggregation={"method": "routed", "min_score": 0.99})
    tiny.train()
    model = tiny.open()
    before = asked(model)
    assert {each.shards for each in before} == {(OWN,), ()}  # the base, where no record of OWN is near
    foreign = [each.id for each in model.where(ids_of(PEOPLE)) if each.shard != OWN]
    model.forget(foreign)
    assert asked(model) == before


def test_a_mean_that_contains_others_does_not_answer_for_a_group(tiny: Tiny) -> None:
    """A service has one mean of all shards loaded; a group's route must not reach it."""
    change_run(tiny.run_file, sisa__aggregation="merged")
    tiny.train()
    model = tiny.open()
    answerer, _ = model.answerer()
    group = model.within({OWN}, model.partition)
    with pytest.raises(InvalidInput, match="contains the others"):
        answerer.generate([[1]], group.routes(PROMPTS[:1]), 1)
    assert len(answerer.generate([[1]], model.routes(PROMPTS[:1]), 1)) == 1
