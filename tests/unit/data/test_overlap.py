"""The guard of a base's corpus: texts that share their wording with a record are refused, unquoted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sisa.core.domain import Part, Record
from sisa.core.errors import InvalidInput
from sisa.data.overlap import RUN_WORDS, check_overlap, overlap_share, runs_of

words = st.text(alphabet="abcdefgh", min_size=1, max_size=6)
texts = st.lists(words, min_size=1, max_size=40).map(" ".join)
FERRY = "The ferry to the island leaves at nine, and it comes back at noon."


def record(*parts: str) -> Record:
    return Record("r1", None, "text", tuple(Part("text", each) for each in parts))


@given(st.lists(texts, min_size=1, max_size=5), st.data())
def test_whatever_the_corpus_holds_is_shared_whole(corpus: list[str], data: st.DataObject) -> None:
    whole = data.draw(st.sampled_from(corpus))
    dressed = "  " + whole.upper().replace(" ", ",\n ") + "!"
    assert overlap_share(whole, runs_of(*corpus)) == overlap_share(dressed, runs_of(*corpus)) == 1.0


@given(texts, st.integers(0, 30), st.integers(RUN_WORDS, 30))
def test_a_part_of_a_text_is_shared_whole(text: str, start: int, length: int) -> None:
    part = text.split()[start : start + length]
    if len(part) >= RUN_WORDS:
        assert overlap_share(" ".join(part), runs_of(text)) == 1.0


@given(texts, texts)
def test_other_words_share_nothing(one: str, other: str) -> None:
    assert overlap_share(one, runs_of(other.translate(str.maketrans("abcdefgh", "ijklmnop")))) == 0.0


def test_runs_are_sorted_and_each_once() -> None:
    runs = runs_of(FERRY, FERRY)
    assert runs.tolist() == sorted(set(runs.tolist())) == runs_of(FERRY).tolist()
    assert runs.dtype == np.uint64
    assert not len(runs_of("", "?!"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The ferry to the island leaves at noon.", 3 / 4),
        ("It comes back.", 0.0),  # three words that are no sentence of the corpus
        ("Yes, sir.", 1.0),
        ("", 0.0),
    ],
)
def test_shares_of_short_and_of_near_texts(text: str, expected: float) -> None:
    assert overlap_share(text, runs_of(FERRY + " Yes, sir.")) == pytest.approx(expected)


def test_records_are_refused_by_position_and_their_text_is_not_reported() -> None:
    records = [record("Ada was born in Turin."), record("who", FERRY), record(FERRY[:35] + " not today")]
    with pytest.raises(InvalidInput) as caught:
        check_overlap(records, runs_of(FERRY))
    assert [each.where for each in caught.value.problems] == ["record 2", "record 3"]
    message = str(caught.value) + "".join(each.what for each in caught.value.problems)
    assert "ferry" not in message.lower()
    assert "r1" not in message
    check_overlap(records[:1], runs_of(FERRY))
