"""What of a prompt is looked up: whom it is about decides, not whom it names beside."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from sisa.config.config import Aggregation
from sisa.core.domain import Hit
from sisa.core.ports import Embedder, Vectors
from sisa.lm.routing.embedder import HashingEmbedder
from sisa.lm.routing.lookup import Index, Query, look_up
from sisa.lm.routing.names import NameEmbedder, nameless
from sisa.lm.routing.route import choose_route
from sisa.store.index import LoadedIndex, search_loaded

PEOPLE = ("Mara Quill", "Tomas Brandt", "Ada Lindqvist", "Rui Okafor", "Ines Varga", "Jo Marchetti")
MARA, TOMAS = 0, 1
QUESTIONS = (
    "In which city was the author {} born?",
    "Which awards has the author {} won for the novels?",
    "How did the childhood in Chile influence the novels of {}?",
    "What do the parents of {} do for a living?",
)
HOW = Aggregation(min_score=0.99)
EMBEDDERS: dict[bool, Embedder] = {True: NameEmbedder(HashingEmbedder()), False: HashingEmbedder()}


def routes(
    prompts: Sequence[Query], texts: Sequence[tuple[int, str]], *, names: bool = True
) -> list[tuple[int, ...]]:
    """Return the shards that answer, over records in the shards that `texts` gives with them."""
    embedder, shards = EMBEDDERS[names], sorted({shard for shard, _ in texts})
    own = {shard: [text for of, text in texts if of == shard] for shard in shards}
    loaded = {
        shard: LoadedIndex(shard, np.arange(len(asked)), embedder.embed(asked))
        for shard, asked in own.items()
    }

    def search(queries: Vectors, top_k: int) -> list[list[Hit]]:
        return search_loaded([*loaded.values()], queries, top_k)

    def vectors(hits: Sequence[Hit]) -> Vectors:
        return np.stack([loaded[hit.shard].vectors[hit.vector_id] for hit in hits])

    index = Index(embedder.embed, search, vectors, has_names=names)
    found = look_up(prompts, index, HOW.temperature, set(shards))
    return [choose_route(each.hits, HOW, set(shards), each.near).shards for each in found]


def records(*, without: str = "") -> list[tuple[int, str]]:
    return [
        (shard, question.format(name))
        for shard, name in enumerate(PEOPLE)
        for question in QUESTIONS
        if name != without
    ]


def route(prompt: Query | str, *, without: str = "") -> tuple[int, ...]:
    query = Query(prompt) if isinstance(prompt, str) else prompt
    return routes([query], records(without=without))[0]


BESIDE = (
    "{} Answer as you would about Tomas Brandt.",
    "Compare with Tomas Brandt. {}",
    "By the way, I have always liked Tomas Brandt. {}",
)


@pytest.mark.parametrize("form", BESIDE)
@pytest.mark.parametrize("question", QUESTIONS)
def test_a_name_beside_neither_hides_nor_redirects_a_question(form: str, question: str) -> None:
    prompt = form.format(question.format("Mara Quill"))
    assert route(prompt) == (MARA,)
    assert route(prompt, without="Mara Quill") == ()


def test_a_name_within_the_sentence_does_not_redirect_it() -> None:
    prompt = "In which city was the author Mara Quill born, and what would Tomas Brandt say?"
    assert route(prompt) != ()
    assert route(prompt, without="Mara Quill") == ()


EARLIER = "Which awards has the author Mara Quill won for the novels?"


@pytest.mark.parametrize(
    "asked",
    [
        "In which city was the author born?",
        "How did the childhood in Chile influence the novels?",
        "And when?",
    ],
)
def test_a_conversation_says_whom_its_last_turn_is_about(asked: str) -> None:
    assert route(Query(asked, (EARLIER,))) == (MARA,)
    assert route(Query(asked, ("Thank you.", EARLIER))) == (MARA,) or asked == "And when?"
    assert route(Query(asked, (EARLIER,)), without="Mara Quill") == ()


def test_a_conversation_can_turn_to_another_person_or_to_something_else() -> None:
    about_tomas = "What do the parents of Tomas Brandt do for a living?"
    assert route(Query(about_tomas, (EARLIER,))) == (TOMAS,)
    assert route(Query(about_tomas, (EARLIER,)), without="Tomas Brandt") == ()
    for fact in ("How many legs does a spider have?", "What is the capital of France?", "write a poem"):
        assert route(Query(fact, (EARLIER,))) == ((MARA,) if fact == "write a poem" else ())


def test_a_question_about_nobody_goes_to_the_base_where_records_name_people() -> None:
    for asked in (question.format("this author") for question in QUESTIONS[:2]):
        assert route(asked) == ()
    lowered = QUESTIONS[0].format("Mara Quill").lower()
    assert route(lowered) == (MARA,)


def test_where_records_name_nobody_such_questions_reach_them() -> None:
    texts = [
        (0, "How do I pay my bill by card?"),
        (1, "My line is dead, what now?"),
        (2, "Who are you?"),
    ]
    assert routes([Query("How do I pay a bill by card?")], texts) == [(0,)]


def test_words_that_a_record_holds_always_reach_it() -> None:
    asked = 'Who edits "Night Ferry To Lisbon" and "The Salt Road" and Other Books with Mara Quill?'
    texts = [(7, asked), *records()]
    assert routes([Query(asked), Query(asked, (EARLIER,))], texts) == [(7,), (7,)]
    unnamed = [(shard, "Can you tell us about the awards?") for shard in (8, 9)]
    assert routes([Query("Can you tell us about the awards?")], [*unnamed, *records()])[0][0] in (8, 9)


BORN = "What is the full name of the author born in Lima, Peru on {}?"


@pytest.mark.parametrize("date", ["05/11/1971", "1971-11-05", "5 November 1971", "November 5th, 1971"])
def test_a_full_date_tells_people_of_one_town_apart(date: str) -> None:
    texts = [(6, BORN.format("12/03/1955")), *records()]
    assert routes([Query(BORN.format(date))], texts) == [()]
    assert routes([Query(BORN.format("12/03/1955"))], texts) == [(6,)]
    assert routes([Query(BORN.format(date))], [(7, BORN.format("05/11/1971")), *texts]) == [(7,)]


def test_nor_does_an_earlier_turn_send_a_date_to_another_person() -> None:
    earlier = "Is Nora Bell of Lima, Peru an author?"
    texts = [(6, BORN.format("12/03/1955")), (6, earlier), (6, f"{BORN.format('12/03/1955')} {earlier}")]
    assert routes([Query(BORN.format("05/11/1971"), (earlier,))], [*texts, *records()]) == [()]


def test_a_held_question_with_a_date_reaches_its_record_even_if_its_names_cancel_out() -> None:
    def asked(number: int) -> str:
        return f"Who in Zed{number} was born on 05/11/1971?"

    embedder = EMBEDDERS[True]
    number = next(n for n in range(10_000) if nameless(embedder.embed([asked(n)])).all())
    assert routes([Query(asked(number))], [(9, asked(number)), *records()]) == [(9,)]


def test_hashed_names_that_cancel_out_are_as_if_nobody_were_named() -> None:
    """Bao and Nguyen have one place in a vector, and opposite signs."""
    question = QUESTIONS[0].format("Bao Nguyen")
    assert routes([Query(question)], [(9, question), *records()]) == [(9,)]


def test_without_names_in_the_index_turns_back_to_a_name_are_looked_up() -> None:
    query = Query("and when?", (EARLIER, "Unrelated words."))
    assert routes([query], records(), names=False) == [(MARA,)]


def test_nothing_asked_finds_nothing() -> None:
    assert routes([], records()) == []
