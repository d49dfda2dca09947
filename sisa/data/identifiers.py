"""Standardise and hash the identifiers of a person, as California's DROP does.

A hash of a standardised identifier is on one of DROP's lists if that person asked for deletion there
(`drop_lists.py`).

>>> standardised("zip", "91790-3771"), standardised("first_name", "Juan Pablo")
('91790', 'juanpablo')
>>> hashes({"email": "Anna.Smith@Domain.com"})
[('Email', 'KA18MT/ph6IHYjzT9zwETySDQyvSh87YuoSBpOQtkhE=')]

Source: privacy.ca.gov, "DROP for data brokers", technical specifications, version 1.2.0 (2 July 2026):
"Working with the data" (lists, standardisation, hashing, examples). What these pages leave open:

- *Dates of birth* are `YYYYMMDD`. The specification does not list the spellings that a broker may hold;
  only those that can be read in one way are accepted here: `1985-07-04`, `19850704`, `July 4, 1985`.
- *Names* transliterate "supported" Greek and Cyrillic letters. The table below is the one on which
  public implementations of version 1.2.0 agree. Letters of other scripts stay as they are, composed
  (NFC); the specification does not state whether DROP composes them.
"""

from __future__ import annotations

import contextlib
import re
import unicodedata
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date, datetime
from hashlib import sha256
from itertools import product
from typing import Any

from sisa.data.record_rules import type_name

# Each list, and the identifiers of which its hashes are made, in their order.
LISTS: dict[str, tuple[str, ...]] = {
    "Email": ("email",),
    "Phone": ("phone",),
    "MAID": ("maid",),
    "CTVID": ("ctv_id",),
    "NDZ": ("first_name", "last_name", "date_of_birth", "zip"),
    "NameVIN": ("first_name", "last_name", "vin"),
}
MAX_VALUES = 10  # of one identifier of a record
_ZIP_PLUS_4 = re.compile(r"([0-9]{5})[\s-]*[0-9]{4}")
_LETTERS = {
    **dict(zip("αβγδεζηικλμνξοπρσςτυφω", "avgdeziiklmnxoprsstyfo", strict=True)),
    **{"θ": "th", "χ": "ch", "ψ": "ps"},
    **dict(zip("абвгдезийклмнопрстуфыэєіїґў", "abvgdeziyklmnoprstufyeeiigu", strict=True)),
    **{"ё": "yo", "ж": "zh", "х": "kh", "ц": "ts", "ч": "ch", "ш": "sh", "щ": "shch", "ъ": "", "ь": ""},  # noqa: RUF001
    **{"ю": "yu", "я": "ya"},
    **dict(zip("øðłđħŋıŀ", "odldhnil", strict=True)),
    **{"ß": "ss", "æ": "ae", "œ": "oe", "þ": "th", "ĳ": "ij"},
}
_FOLDED = ("LATIN ", "GREEK ", "CYRILLIC ")


def _email(text: str) -> str:
    return "".join(text.split()).lower()


def _phone(text: str) -> str:
    return re.sub("[^0-9]", "", text)[-10:]


def _zip(text: str) -> str:
    plus_4 = _ZIP_PLUS_4.fullmatch(text.strip())
    return _alphanumeric(plus_4[1] if plus_4 else text).lstrip("0")[:5]


def _alphanumeric(text: str) -> str:
    return re.sub("[^0-9a-z]", "", text.lower())


def _hexadecimal(text: str) -> str:
    return re.sub("[^0-9a-f]", "", text.lower())


def _day(text: str) -> str:
    text = text.strip()
    forms = ["%Y-%m-%d", "%B %d, %Y", "%b %d, %Y"]
    if len(text) == 8:  # else strptime takes 1985704, too
        forms.append("%Y%m%d")
    for form in forms:
        with contextlib.suppress(ValueError):
            return datetime.strptime(text, form).date().isoformat().replace("-", "")
    return "?" if text else ""  # `standardised` refuses it


def _name(text: str) -> str:
    lowered = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).lower())
    kept = "".join(map(_folded, lowered))
    return unicodedata.normalize("NFC", "".join(each for each in kept if each.isalnum()))


def _folded(letter: str) -> str:
    """Return a Latin, Greek or Cyrillic letter in ASCII where possible; any other as it is."""
    if letter in _LETTERS or letter.isascii():
        return _LETTERS.get(letter, letter)
    if not unicodedata.name(letter, "").startswith(_FOLDED):
        return letter
    base = unicodedata.normalize("NFKD", letter)
    plain = [each for each in base if not unicodedata.combining(each)]
    return letter if plain == [letter] else "".join(map(_folded, plain))


@dataclass(frozen=True)
class _Rule:
    standardise: Callable[[str], str]
    form: str = ""  # that a standardised value must have, as a regular expression
    expected: str = ""


_RULES = {
    "email": _Rule(_email),
    "phone": _Rule(_phone),
    "first_name": _Rule(_name),
    "last_name": _Rule(_name),
    "date_of_birth": _Rule(_day, "[0-9]{8}", "a date, as 1985-07-04"),
    "zip": _Rule(_zip),
    "maid": _Rule(_hexadecimal, ".{32}", "32 hexadecimal digits"),
    "ctv_id": _Rule(_alphanumeric, ".{8,32}", "8 to 32 letters and digits"),
    "vin": _Rule(_alphanumeric, ".{17}", "17 letters and digits"),
}


def standardised(identifier: str, value: str) -> str:
    """Return an identifier as it is hashed; empty if nothing of it is left. Raise ValueError."""
    rule = _RULES[identifier]
    found = rule.standardise(value)
    if found and rule.form and not re.fullmatch(rule.form, found):
        raise ValueError(f"expected {rule.expected}")
    return found


def on_no_list(identifiers: Iterable[str]) -> list[str]:
    """Return identifiers that are on no list without others that are missing.

    >>> on_no_list(["email", "vin", "last_name"])
    ['last_name', 'vin']
    """
    given = set(identifiers)
    whole = [names for names in LISTS.values() if given.issuperset(names)]
    return sorted(given.difference(*whole))


def identifier_problems(identifier: str, column: str, value: Any) -> Iterator[str]:
    """Yield every problem of a column's value, which is an identifier or a list of them."""
    values = value if isinstance(value, list) else [value]
    if len(values) > MAX_VALUES:
        yield f"'{column}': expected at most {MAX_VALUES} values, got {len(values)}"
    for each in values[:MAX_VALUES]:
        text = _text(each)
        if text is None:
            yield f"'{column}': expected a string or a whole number, got {type_name(each)}"
            continue
        try:
            standardised(identifier, text)
        except ValueError as error:
            yield f"'{column}': {error}"


def hashes(identifiers: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return every (list, hash) of a person's identifiers; a list of several needs all of them."""
    texts = {name: _texts(name, value) for name, value in identifiers.items()}
    found = []
    for list_name, names in LISTS.items():
        for values in product(*(texts.get(name, []) for name in names)):
            hashed = [hash_of(value) for value in values]
            found.append((list_name, hashed[0] if len(hashed) == 1 else hash_of("".join(hashed))))
    return found


def hash_of(text: str) -> str:
    """Return the hash of a standardised identifier: SHA-256 in base64."""
    return b64encode(sha256(text.encode()).digest()).decode()


def _texts(name: str, value: Any) -> list[str]:
    given = [_text(each) for each in (value if isinstance(value, list) else [value])]
    found = [standardised(name, each) for each in given if each]
    return [each for each in dict.fromkeys(found) if each]


def _text(value: Any) -> str | None:
    """Return the text of a string, a whole number or a date; None for anything else."""
    if isinstance(value, datetime | date):
        return value.isoformat()[:10]
    if value is None:
        return ""
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else None
