"""Invented names: the same record about somebody else.

Each name of a record gives way to an invented one, and each digit to another, by a number that chooses
among them. Names are recognised by their capitals, so nothing is replaced in scripts without capitals or
in texts without names.

>>> asked = Record("1", None, "text", (Part("text", "Where does Ada Quill live? Does Ada like it?"),))
>>> rename_record(asked, 0).parts[0].text, _names("What is her job?")
('Where does Ysolde Halloran live? Does Ysolde like it?', {})
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from sisa.core.digest import sha256_hex
from sisa.core.domain import Part, Record

FIRST_NAMES = (
    *("Zorah", "Teodric", "Imke", "Bastian", "Ysolde", "Corwin", "Maelis", "Anselm", "Petronel"),
    *("Osric", "Liesel", "Evander", "Odalys", "Ruprecht", "Sunniva", "Tancred", "Wilmet"),
)
LAST_NAMES = (
    *("Fenwick", "Ostrava", "Pellingham", "Vantoor", "Halloran", "Quistgaard", "Merriweather"),
    *("Dunmore", "Aldersgate", "Brixworth", "Castellane", "Thornbury", "Ravensholt", "Kirkwall"),
    *("Langstroth", "Zavorin", "Umbergate", "Yarborough", "Wexcombe"),
)
# Words that begin sentences and are not names.
OPENERS = frozenset(
    """a about according after all also although an and are as at because before both but by can could
    describe did do does during each every explain for from give had has have he her here his how i if in
    is it its list may me my name no not of on one or our please say she should since so some such tell
    that the their then there these they this those though to under until was we were what when where
    which while who whom whose why will with would write yes you your""".split()  # noqa: SIM905
)
_WORD = re.compile(r"[^\W\d_][\w'\u2019-]*")
_SENTENCE_ENDS = (".", "?", "!", ":", ";", "\n")
ASKING = ("prompt", "user", "text")  # the roles of what is not an answer


def rename_record(record: Record, number: int) -> Record | None:
    """Return the record with the invented names of a number, or None when its prompt names nobody."""
    chosen = invented_names(record, number)
    parts = tuple(Part(part.role, _replaced(part.text, chosen, number)) for part in record.parts)
    changed = [one for one, other in zip(parts, record.parts, strict=True) if one != other]
    asked = any(part.role in ASKING for part in changed)
    return replace(record, parts=parts) if asked else None


def invented_names(record: Record, number: int) -> dict[str, str]:
    """Return the names of a record, each with the invented one of a number that takes its place."""
    names = _names(" \n".join(part.text for part in record.parts))
    used = {name.lower() for name in names}
    chosen: dict[str, str] = {}
    for word, place in names.items():
        chosen[word] = _drawn(FIRST_NAMES if place == 0 else LAST_NAMES, f"{number}|{word}", used)
        used.add(chosen[word].lower())
    return chosen


def restore_names(text: str, record: Record, number: int) -> str:
    """Return a text with the names of the record's prompts in place of the invented ones of a number.

    >>> asked = Record("1", None, "text", (Part("text", "Where does Ada Quill live?"),))
    >>> restore_names("Ysolde lives in Rome.", asked, 0)
    'Ada lives in Rome.'
    """
    prompts = " ".join(part.text for part in record.parts if part.role in ASKING)
    names = invented_names(record, number)
    return replace_names(text, {other: name for name, other in names.items() if name in prompts})


def replace_names(text: str, chosen: Mapping[str, str]) -> str:
    """Return a text with each name replaced.

    >>> replace_names("Ada met Adam.", {"Ada": "Imke"})
    'Imke met Adam.'
    """
    return name_pattern(chosen).sub(lambda match: chosen[match.group()], text) if chosen else text


def name_pattern(names: Collection[str]) -> re.Pattern[str]:
    """Return the pattern of any of some names, at least one, as whole words."""
    each = "|".join(re.escape(word) for word in sorted(names, key=len, reverse=True))
    return re.compile(rf"\b(?:{each})\b")


def _names(text: str) -> dict[str, int]:
    """Return the words that are names, each with its position in the name where it first occurs."""
    found: dict[str, int] = {}
    for start, words in _capitalised(text):
        before = text[:start].rstrip(" \"'(")
        opens = not before or before.endswith(_SENTENCE_ENDS)
        while words and words[0].lower() in OPENERS:
            words, opens = words[1:], False
        if opens and len(words) == 1:
            continue  # more likely an ordinary word
        for place, word in enumerate(words):
            found.setdefault(word.removesuffix("'s").removesuffix("\u2019s"), place)
    return found


def _capitalised(text: str) -> list[tuple[int, list[str]]]:
    """Return runs of capitalised words, with their start positions."""
    found: list[tuple[int, list[str]]] = []
    end = -1
    for match in _WORD.finditer(text):
        if match.group()[0].isupper():
            if found and text[end : match.start()] == " ":
                found[-1][1].append(match.group())
            else:
                found.append((match.start(), [match.group()]))
            end = match.end()
    return found


def _replaced(text: str, chosen: Mapping[str, str], number: int) -> str:
    shift = number % 9 + 1
    return re.sub(
        r"\d", lambda match: str((int(match.group()) + shift) % 10), replace_names(text, chosen)
    )


def _drawn(names: Sequence[str], seed: str, used: Collection[str]) -> str:
    """Return an invented name that is not used yet, or any when all are used."""
    left = [each for each in names if each.lower() not in used] or list(names)
    return left[int(sha256_hex(seed.encode())[:8], 16) % len(left)]
