"""What makes a row a record: its columns, their types, and every way to get them wrong.

Rules: pure. A record has an `id` (a string), an optional subject in the column `group_by`, and exactly
one body, found by its columns: `text`, `prompt` with `completion`, or `messages`. It may carry a
`deletion_risk`, a number or the name of a class, and a `generation`, if it was appended. A null counts
as absent; other columns are ignored.
Problems name columns and turns, never a text or an id.

Not covered: uniqueness of ids and where a row stands (`reader.py`); lengths in tokens.

>>> list(record_problems({"id": 7, "text": " "}, "subject_id"))
["'id': expected a string, got a number", "'text' is empty"]

Source: the column names of TRL's dataset formats.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sisa.bands import RISK_COLUMN
from sisa.domain import BODY_COLUMNS, GENERATION_COLUMN, Kind, Part, Record, Risk

MAX_ID_CHARS, MAX_RISK, MAX_GENERATION = 512, 1e300, 9_999
ROLES = ("system", "user", "assistant")
KINDS = {"text": ("text",), "completion": ("prompt", "completion"), "chat": ("messages",)}
UNFIT = {
    "Cc": "a control character",
    "Cs": "a lone surrogate",
    "Zl": "a line break",
    "Zp": "a line break",
}


def record_of(value: Mapping[str, Any], group_by: str) -> Record:
    """The record of a row without problems."""
    risk: Risk = value.get(RISK_COLUMN)
    risk = float(risk) if isinstance(risk, int) else risk  # 1 and 1.0 would be two digests of one value

    generation = value.get(GENERATION_COLUMN) or None  # 0 is what all have that were not appended

    def made(kind: Kind, parts: Iterable[Part]) -> Record:
        return Record(value["id"], value.get(group_by), kind, tuple(parts), risk, generation)

    if value.get("text") is not None:
        return made("text", [Part("text", value["text"])])
    if value.get("messages") is not None:
        return made("chat", [Part(turn["role"], turn["content"]) for turn in value["messages"]])
    return made("completion", [Part(column, value[column]) for column in KINDS["completion"]])


def record_problems(value: Mapping[str, Any], group_by: str) -> Iterator[str]:
    """All that keeps a row from being a record."""
    yield from _risk_problems(value.get(RISK_COLUMN))
    yield from _generation_problems(value.get(GENERATION_COLUMN))
    if value.get("id") is None:
        yield "no 'id'"
    else:
        yield from name_problems("'id'", value["id"])
    if value.get(group_by) is not None:
        yield from name_problems(f"'{group_by}'", value[group_by])
    present = [kind for kind, columns in KINDS.items() if any(value.get(c) is not None for c in columns)]
    if len(present) > 1:
        given = ", ".join(column for column in BODY_COLUMNS if value.get(column) is not None)
        yield f"expected one body, got several: {given}"
    elif not present:
        yield "no body; expected 'text', or 'prompt' and 'completion', or 'messages'"
    elif present == ["chat"]:
        yield from _messages_problems(value["messages"])
    else:
        for column in KINDS[present[0]]:
            if value.get(column) is None:
                yield f"no '{column}'"
            else:
                yield from _text_problems(f"'{column}'", value[column], may_be_blank=column == "prompt")


def _risk_problems(risk: Any) -> Iterator[str]:
    """A class is a name of the run file; what it names is checked with the run file at hand."""
    if isinstance(risk, str):
        yield from name_problems(f"'{RISK_COLUMN}'", risk)
    elif isinstance(risk, bool) or not isinstance(risk, int | float | None):
        yield f"'{RISK_COLUMN}': expected a number or a class, got {kind_of(risk)}"
    elif risk is not None and not 0 <= risk < MAX_RISK:
        yield f"'{RISK_COLUMN}': expected a number from 0 on"


def _generation_problems(generation: Any) -> Iterator[str]:
    if generation is None:
        return
    if isinstance(generation, bool) or not isinstance(generation, int):
        yield f"'{GENERATION_COLUMN}': expected a whole number, got {kind_of(generation)}"
    elif not 0 <= generation <= MAX_GENERATION:
        yield f"'{GENERATION_COLUMN}': expected a number from 0 to {MAX_GENERATION}"


def name_problems(name: str, value: Any) -> Iterator[str]:
    """All that keeps a value from being an id or a subject."""
    if not isinstance(value, str):
        yield f"{name}: expected a string, got {kind_of(value)}"
        return
    if not value.strip():
        yield f"{name} is empty"
    if len(value) > MAX_ID_CHARS:
        yield f"{name} has {len(value)} characters, at most {MAX_ID_CHARS} are allowed"
    for unfit in sorted({UNFIT[each] for each in map(unicodedata.category, value) if each in UNFIT}):
        yield f"{name} holds {unfit}"


def _text_problems(name: str, value: Any, may_be_blank: bool) -> Iterator[str]:
    if not isinstance(value, str):
        yield f"{name}: expected a string, got {kind_of(value)}"
        return
    if not may_be_blank and not value.strip():
        yield f"{name} is empty"
    if "\0" in value:
        yield f"{name} holds a NUL character"
    if any("\ud800" <= each <= "\udfff" for each in value):
        yield f"{name} holds a lone surrogate"


def _messages_problems(value: Any) -> Iterator[str]:
    if not isinstance(value, list):
        yield f"'messages': expected a list, got {kind_of(value)}"
        return
    answered = False
    for number, turn in enumerate(value, start=1):
        name = f"'messages', turn {number}"
        if not isinstance(turn, Mapping):
            yield f"{name}: expected an object, got {kind_of(turn)}"
            continue
        role, content = turn.get("role"), turn.get("content")
        if role not in ROLES:
            yield f"{name}: expected a role of {', '.join(ROLES)}"
        yield from _text_problems(f"{name}, content", content, may_be_blank=True)
        answered = answered or (
            role == "assistant" and isinstance(content, str) and bool(content.strip())
        )
    if not answered:
        yield "'messages' has no assistant turn with content"


def kind_of(value: Any) -> str:
    """A JSON value's type in words; never the value."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", bytes: "bytes"}
    names |= {list: "a list", dict: "an object"}
    return names.get(type(value), "a value of another type")
