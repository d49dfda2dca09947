"""Hostile prompts are routed as the model routes them."""

from __future__ import annotations

from sisa.data.samples import make_people
from sisa.lm.routing.embedder import HashingEmbedder
from sisa.lm.routing.names import NameEmbedder
from tests.bench.answering.hostile import Partition, Person
from tests.bench.answering.routing import Asked, Remembering


def test_a_question_reaches_its_own_shard_until_its_person_is_deleted() -> None:
    rows = make_people(8, 4)
    questions = [Asked(row["prompt"], row["completion"], n // 4) for n, row in enumerate(rows)]
    people = [Person(n, "", tuple(questions[4 * n : 4 * n + 4])) for n in range(8)]
    partition = Partition(people, Remembering(NameEmbedder(HashingEmbedder())), seed=0)
    for person in people:
        asked = [each.question for each in person.asked]
        own = partition.shard(person.number)
        assert {route[:1] for route in partition.routes(asked)} == {(own,)}
        assert set(partition.routes(asked, without=person.number)) == {()}
