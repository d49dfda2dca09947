"""Names in texts: the named person distinguishes texts that mean the same."""

from __future__ import annotations

import numpy as np
import pytest

from sisa.lm.routing.embedder import HashingEmbedder
from sisa.lm.routing.names import NameEmbedder, nameless, names_in

EMBEDDER = NameEmbedder(HashingEmbedder())


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("Where was Mara Quill born?", ["mara", "quill"]),
        ("where was mara quill born?", []),
        ("Was it hers? Mara says so: Quill wrote it\nIn Porto.", ["porto"]),
        (
            "it was Mara's, and the Quills\u2019 and Al-Rashid\u2019s, and Mara's again",
            ["mara", "quills", "al-rashid"],
        ),
        ("Who, born in Porto on 05/11/1971, wrote in the 1990s?", ["porto", "1971", "1990"]),
        ("it sold 1,971 copies in Porto, 12345 in all, 19.99 each", ["porto"]),
        ("who was born in 1971?", []),
        ("you know I was there, and I'm here", []),
        ("", []),
    ],
)
def test_a_name_is_a_capitalised_word_within_a_sentence(text: str, names: list[str]) -> None:
    assert names_in(text) == names


def test_who_is_named_decides_between_texts_alike_in_all_else() -> None:
    texts = ["the mother of Mara Quill is a nurse", "the mother of Tomas Brandt is a nurse"]
    records = EMBEDDER.embed(texts)
    plain = HashingEmbedder().embed(texts)
    (query,) = EMBEDDER.embed(["What does the mother of Tomas Brandt do?"])
    (bare,) = HashingEmbedder().embed(["What does the mother of Tomas Brandt do?"])
    ours, others = records @ query, plain @ bare
    assert ours[1] - ours[0] > 0.5 > others[1] - others[0] > 0


def test_a_year_beside_names_distinguishes_two_people_of_one_place() -> None:
    texts = [f"Who is the author born in Porto, Portugal in {year}?" for year in (1955, 1971)]
    asked = EMBEDDER.embed(["Which author was born in Porto, Portugal on 2 May 1971?"])[0]
    bare = HashingEmbedder().embed(["Which author was born in Porto, Portugal on 2 May 1971?"])[0]
    ours, others = EMBEDDER.embed(texts) @ asked, HashingEmbedder().embed(texts) @ bare
    assert ours[1] - ours[0] > (others[1] - others[0]) / 2 + 0.1


def test_a_prompt_that_names_nobody_ranks_as_without_names() -> None:
    texts = [f"the mother of Mara is {what}" for what in ("a nurse", "in Porto", "tall", "a judge")]
    prompt = ["what is the mother of mara? a judge"]
    ours = (EMBEDDER.embed(texts) @ EMBEDDER.embed(prompt)[0]) * 2
    assert np.allclose(
        ours, HashingEmbedder().embed(texts) @ HashingEmbedder().embed(prompt)[0], atol=1e-6
    )
    assert nameless(EMBEDDER.embed([*prompt, texts[0]])).tolist() == [True, False]
