"""Validate rows as records: their columns, the types, and everything that can be wrong.

A record has an id (a string or a whole number), optionally a subject, and exactly one body, found by its
columns: `text`, `prompt` with `completion`, or `messages`. It may have a `deletion_risk`, a number or
the name of a class, and a `generation`, if it was appended. `Columns` holds the names of the columns. A
null counts as absent; other columns are ignored. Problems name columns and turns, never a text or an id.

>>> list(record_problems({"id": 7.5, "text": " "}, Columns()))
["'id': expected a string or a whole number, got a number", "'text' is empty"]
>>> record_of({"id": 7, "text": "Ada wrote."}, Columns()).id
'7'

Source: the column names of TRL's dataset formats; other names of roles and turns as in Axolotl.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sisa.config.sources import DEFAULT_COLUMNS, Columns
from sisa.core.domain import GENERATION_COLUMN, RISK_COLUMN, Kind, Part, Record, Risk

MAX_ID_CHARS, MAX_RISK, MAX_GENERATION = 512, 1e300, 9_999
ROLES = ("system", "user", "assistant", "tool")
OTHER_NAMES = {"human": "user", "gpt": "assistant"}  # names of roles in ShareGPT's format
UNFIT = {
    "Cc": "a control character",
    "Cs": "a lone surrogate",
    "Zl": "a line break",
    "Zp": "a line break",
}
_TYPE_NAMES: dict[type[Any], str] = {
    **{type(None): "null", bool: "a boolean", int: "a number", float: "a number"},
    **{str: "a string", bytes: "bytes", list: "a list", dict: "an object"},
}


class Broken(Exception):
    """A row, or a whole source, can't be parsed."""


def record_of(value: Mapping[str, Any], columns: Columns) -> Record:
    """Return the record of a row without problems."""
    risk: Risk = value.get(RISK_COLUMN)
    risk = float(risk) if isinstance(risk, int) else risk  # 1 and 1.0 would have different digests

    generation = value.get(GENERATION_COLUMN) or None  # 0: not appended
    subject = None if columns.subject is None else value.get(columns.subject)
    subject = None if subject is None else normal_subject(str(subject))
    kind: Kind = "completion"
    parts: tuple[Part, ...]
    if value.get(columns.text) is not None:
        kind, parts = "text", (Part("text", value[columns.text]),)
    elif (turns := value.get(columns.messages)) is not None:
        kind, parts = "chat", turns_of(turns, columns)
    else:
        parts = Part("prompt", value[columns.prompt]), Part("completion", value[columns.completion])
    return Record(str(value[columns.id]), subject, kind, parts, risk, generation)


def turns_of(
    messages: Sequence[Mapping[str, Any]], columns: Columns = DEFAULT_COLUMNS
) -> tuple[Part, ...]:
    """Return the turns of a chat without problems."""
    return tuple(Part(_role(each, columns), _content(each, columns)) for each in messages)


def record_problems(value: Mapping[str, Any], columns: Columns) -> Iterator[str]:
    """Yield every problem that prevents a row from being a record."""
    yield from _risk_problems(value.get(RISK_COLUMN))
    yield from _generation_problems(value.get(GENERATION_COLUMN))
    if value.get(columns.id) is None:
        yield f"no '{columns.id}'"
    else:
        yield from name_problems(f"'{columns.id}'", value[columns.id])
    if columns.subject is not None and value.get(columns.subject) is not None:
        yield from name_problems(f"'{columns.subject}'", value[columns.subject])
    bodies = columns.bodies
    present = [kind for kind, names in bodies.items() if any(value.get(c) is not None for c in names)]
    if len(present) > 1:
        given = ", ".join(column for column in columns.body if value.get(column) is not None)
        yield f"expected one body, got several: {given}"
    elif not present:
        yield no_body(columns)
    elif present == ["chat"]:
        yield from _messages_problems(value[columns.messages], columns)
    else:
        for column in bodies[present[0]]:
            if value.get(column) is None:
                yield f"no '{column}'"
            elif isinstance(value[column], list):
                yield f"'{column}': expected a string, got a list; put turns in '{columns.messages}'"
            else:
                may_be_blank = column == columns.prompt
                yield from _text_problems(f"'{column}'", value[column], may_be_blank=may_be_blank)


def no_body(columns: Columns) -> str:
    """Return the problem of a row, or of a table, without a body."""
    text, prompt, completion, messages = columns.body
    return f"no body; expected '{text}', or '{prompt}' and '{completion}', or '{messages}'"


def _risk_problems(risk: Any) -> Iterator[str]:
    """Check type and range; `bands.risk_problems` checks classes against the run file."""
    if isinstance(risk, str):
        yield from name_problems(f"'{RISK_COLUMN}'", risk)
    elif isinstance(risk, bool) or not isinstance(risk, int | float | None):
        yield f"'{RISK_COLUMN}': expected a number or a class, got {type_name(risk)}"
    elif risk is not None and not 0 <= risk < MAX_RISK:
        yield f"'{RISK_COLUMN}': expected a number from 0 on"


def _generation_problems(generation: Any) -> Iterator[str]:
    if isinstance(generation, bool) or not isinstance(generation, int | None):
        yield f"'{GENERATION_COLUMN}': expected a whole number, got {type_name(generation)}"
    elif generation is not None and not 0 <= generation <= MAX_GENERATION:
        yield f"'{GENERATION_COLUMN}': expected a number from 0 to {MAX_GENERATION}"


def normal_subject(subject: str) -> str:
    """Return the one stored spelling of a subject: composed (NFC), without surrounding blanks.

    >>> normal_subject(" Jose\u0301 ") == "Jos\u00e9"
    True
    """
    return unicodedata.normalize("NFC", subject).strip()


def name_problems(name: str, value: Any) -> Iterator[str]:
    """Yield every problem of an id or a subject; a whole number counts as its decimal form."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        yield f"{name}: expected a string or a whole number, got {type_name(value)}"
        return
    if not value.strip():
        yield f"{name} is empty"
    if len(value) > MAX_ID_CHARS:
        yield f"{name} has {len(value)} characters, at most {MAX_ID_CHARS} are allowed"
    for unfit in sorted({UNFIT[each] for each in map(unicodedata.category, value) if each in UNFIT}):
        yield f"{name} holds {unfit}"


def _text_problems(name: str, value: Any, may_be_blank: bool) -> Iterator[str]:
    if not isinstance(value, str):
        yield f"{name}: expected a string, got {type_name(value)}"
        return
    if not may_be_blank and not value.strip():
        yield f"{name} is empty"
    if "\0" in value:
        yield f"{name} holds a NUL character"
    try:
        value.encode()
    except UnicodeEncodeError:
        yield f"{name} holds a lone surrogate"


def _messages_problems(value: Any, columns: Columns) -> Iterator[str]:
    if not isinstance(value, list):
        yield f"'{columns.messages}': expected a list, got {type_name(value)}"
        return
    answered = False
    for number, turn in enumerate(value, start=1):
        problems = list(_turn_problems(f"'{columns.messages}', turn {number}", turn, columns))
        yield from problems
        if isinstance(turn, Mapping) and _role(turn, columns) == "assistant":
            answered = answered or bool(problems) or bool(_content(turn, columns).strip())
    if not answered:
        yield f"'{columns.messages}' has no assistant turn with content"


def conversation_problems(value: Any) -> Iterator[str]:
    """Yield every problem that prevents a value from being a conversation to continue.

    >>> list(conversation_problems([{"role": "assistant", "content": "Ada."}]))
    ["'messages' does not end with a turn of a user or a tool"]
    """
    columns = DEFAULT_COLUMNS
    turns = value if isinstance(value, list | tuple) else []
    problems = [
        problem
        for number, turn in enumerate(turns, start=1)
        for problem in _turn_problems(f"'{columns.messages}', turn {number}", turn, columns)
    ]
    yield from problems
    if not problems and (not turns or _role(turns[-1], columns) not in ("user", "tool")):
        yield f"'{columns.messages}' does not end with a turn of a user or a tool"


def _turn_problems(name: str, turn: Any, columns: Columns) -> Iterator[str]:
    if not isinstance(turn, Mapping):
        yield f"{name}: expected an object, got {type_name(turn)}"
        return
    if _role(turn, columns) not in ROLES:
        yield f"{name}: expected a role of {', '.join(ROLES)} in '{columns.role}'"
    if turn.get("tool_calls"):
        yield f"{name}: tool calls are not trained on; write the call into '{columns.content}'"
    else:
        yield from _content_problems(f"{name}, {columns.content}", turn.get(columns.content))


def _content_problems(name: str, content: Any) -> Iterator[str]:
    if not isinstance(content, list):
        yield from _text_problems(name, content, may_be_blank=True)
        return
    for number, piece in enumerate(content, start=1):
        where = f"{name}, piece {number}"
        if not isinstance(piece, Mapping) or piece.get("type") != "text":
            yield f"{where}: expected an object of type 'text'; images and others are not trained on"
        else:
            yield from _text_problems(where, piece.get("text"), may_be_blank=True)


def _content(turn: Mapping[str, Any], columns: Columns) -> str:
    """Return the text of a turn without problems; pieces are concatenated."""
    content = turn[columns.content]
    return content if isinstance(content, str) else "".join(piece["text"] for piece in content)


def _role(turn: Mapping[str, Any], columns: Columns) -> Any:
    role = turn.get(columns.role)
    return OTHER_NAMES.get(role, role) if isinstance(role, str) else role


def type_name(value: Any) -> str:
    """Return a JSON value's type in words; never the value."""
    return _TYPE_NAMES.get(type(value), "a value of another type")
