"""A `min_score` from public prompts: it separates held from deleted subjects where names do."""

from __future__ import annotations

import pytest

from sisa.config.config import SisaBlock
from sisa.core.domain import Part, Record
from sisa.core.errors import InvalidInput
from sisa.lm.routing import calibration
from sisa.lm.routing.calibration import calibrate
from sisa.lm.routing.embedder import HashingEmbedder
from sisa.lm.routing.names import NameEmbedder

FIRST = ("Mara", "Tomas", "Ada", "Rui", "Ines", "Jo", "Lev", "Noor", "Bo", "Kaya", "Sven", "Uma")
LAST = (
    "Quill",
    "Brandt",
    "Lindqvist",
    "Okafor",
    "Varga",
    "Marchetti",
    "Orlov",
    "Haddad",
    "Lund",
    "Aydin",
)
QUESTIONS = (
    "In which city was the author {} born?",
    "Which awards has the author {} won?",
    "What do the parents of {} do for a living?",
)
BLOCK = SisaBlock(embedder="hashing", shards=4)


def public(num_subjects: int) -> list[Record]:
    names = [f"{FIRST[n % 12]} {LAST[n % 10]}" for n in range(num_subjects)]
    return [
        Record(
            f"{n}-{q}",
            str(n),
            "completion",
            (Part("prompt", text.format(name)), Part("completion", "?")),
        )
        for n, name in enumerate(names)
        for q, text in enumerate(QUESTIONS)
    ]


def test_names_separate_held_from_deleted_subjects() -> None:
    found = calibrate(public(12), NameEmbedder(HashingEmbedder()), BLOCK)
    assert (found.prompts, found.subjects, found.auto) == (36, 12, None)
    assert found.best.refused[0] + found.best.sent[0] < 0.2
    for share, low, high in (found.best.refused, found.best.sent):
        assert 0 <= low <= share <= high < 0.3


def test_it_depends_on_the_prompts_alone_in_any_order() -> None:
    records = public(12)
    embedder = NameEmbedder(HashingEmbedder())
    assert calibrate(records, embedder, BLOCK) == calibrate(records[::-1], embedder, BLOCK)


def test_an_embedder_of_its_own_has_a_value_of_its_own() -> None:
    named = calibrate(public(12), NameEmbedder(HashingEmbedder()), BLOCK)
    plain = calibrate(public(12), HashingEmbedder(), BLOCK.model_copy(update={"names": False}))
    assert plain.best.min_score != named.best.min_score
    assert sum((plain.best.refused[0], plain.best.sent[0])) > sum(
        (named.best.refused[0], named.best.sent[0])
    )


def test_of_many_prompts_some_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "MAX_ASKED", 20)
    assert (
        10
        < calibrate(public(12), NameEmbedder(HashingEmbedder()), BLOCK).prompts
        <= 20
        < len(public(12))
    )


def test_few_subjects_are_refused() -> None:
    with pytest.raises(InvalidInput, match="too few subjects"):
        calibrate(public(9), NameEmbedder(HashingEmbedder()), BLOCK)
