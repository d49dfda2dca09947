"""What every result is made of: shares, and text of records that is safe for a terminal."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.render.result import printable, share


def test_share() -> None:
    assert (share(1, 3), share(0, 5), share(0, 0)) == ("33.3%", "0.0%", "0%")


@given(st.text())
def test_printable_text_moves_no_cursor(text: str) -> None:
    shown = printable(text)
    assert all(ord(c) >= 0x20 and not 0x7F <= ord(c) < 0xA0 for c in shown if c not in "\n\t")
    assert not set(shown) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200b")
    assert printable(shown) == shown


def test_printable_text_is_still_text() -> None:
    assert printable("Zoë\tsaid:\n“¿Qué?” 日本 🙂") == "Zoë\tsaid:\n“¿Qué?” 日本 🙂"
