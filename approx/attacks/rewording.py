"""Rewording: the same questions in other words. Plain texts have no other wording."""

from __future__ import annotations

from dataclasses import replace

from sisa.core.domain import Part, Record

WORDINGS = ("Please tell me: {}", "I have a question. {}", "{} Answer briefly.")


def in_other_words(record: Record) -> list[Record]:
    """Return the record with its first question in other words."""
    for at, part in enumerate(record.parts):
        if part.role in ("prompt", "user"):
            asked = [Part(part.role, _worded(each, part.text)) for each in WORDINGS]
            before, after = record.parts[:at], record.parts[at + 1 :]
            return [replace(record, parts=(*before, each, *after)) for each in asked]
    return []


def _worded(wording: str, text: str) -> str:
    """Return a wording of a text that keeps the white space at its end.

    >>> _worded("{} Answer briefly.", "Who? ")
    'Who? Answer briefly. '
    """
    stem = text.rstrip()
    return wording.format(stem) + text[len(stem) :]
