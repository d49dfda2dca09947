"""What blocks of the run file are made of: strict numbers, names, paths, keys with the cost of a change.

Rules: numbers are strict (`true` and `'3'` are no integers) and finite; names and paths are printable.

Not covered: the keys themselves (`config.py`, `scratch_config.py`).

>>> class Size(Block):
...     width: Int = key(3, "none", "How wide.", ge=1)
>>> Size().width
3
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    StringConstraints,
    model_validator,
)
from pydantic_core import PydanticCustomError

Effect = Literal["none", "retrain", "reset", "reindex", "reseal"]
Int = Annotated[int, Strict()]
Float = Annotated[float, Strict()]
Bool = Annotated[bool, Strict()]
Name = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x20\x7f][^\x00-\x1f\x7f]*$")]
MAX_GOT_CHARS = 60
NAME_PATTERN = re.compile(r"[^\x00-\x20\x7f\ud800-\udfff][^\x00-\x1f\x7f\ud800-\udfff]*")


def _name(value: Any) -> Any:
    if isinstance(value, Path) or (isinstance(value, str) and NAME_PATTERN.fullmatch(value)):
        return value
    raise ValueError("no path")


def conflict(message: str) -> PydanticCustomError:
    """A value that is well formed and does not go with another."""
    return PydanticCustomError("conflict", "{message}", {"message": message})


LocalPath = Annotated[Path, BeforeValidator(_name)]
_BUCKET = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9][A-Za-z0-9._=-]*)*/?")


def is_uri(value: Any) -> bool:
    """Whether a storage is no path of this machine."""
    return isinstance(value, str) and "://" in value


def _storage(value: Any) -> Any:
    if is_uri(value) and not _BUCKET.fullmatch(value):
        raise conflict(
            "expected a path or s3://BUCKET/PREFIX, without credentials or options: the machine's own "
            "AWS configuration gives those"
        )
    return str(_name(value)).rstrip("/") or "/"


Storage = Annotated[str, BeforeValidator(_storage)]


_LAYERS = re.compile(r"all|top:[1-9][0-9]{0,3}")


def _lora_layers(value: Any) -> Any:
    if not isinstance(value, str) or not _LAYERS.fullmatch(value):
        raise conflict("expected all, or top:N with N from 1 to 9999")
    return value


LoraLayers = Annotated[str, BeforeValidator(_lora_layers)]
_PYPI = re.compile(r"pypi:[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9][A-Za-z0-9.!+_-]*")


def pypi_form(value: str) -> str:
    """A name of a model; one that begins as a package's must be one. Raises a conflict."""
    if value.startswith("pypi:") and not _PYPI.fullmatch(value):
        raise conflict(f"expected pypi:name==version, got {shown(value)}")
    return value


def key(default: Any, effect: Effect, text: str, **bounds: Any) -> Any:
    """A key of the run file with its meaning and what a change of it costs."""
    return Field(default, description=text, json_schema_extra={"effect": effect}, **bounds)


class Block(BaseModel):
    """A block of the run file: no unknown keys, no change, no infinite number."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TurnKeys(Block):
    """What a source calls the keys of a chat's turns."""

    role: Name = "role"
    content: Name = "content"


class DatasetSource(Block):
    """Where records come from, a file, a directory or a hub dataset, and what its columns are called."""

    path: Name = Field(description="JSONL or Parquet file, saved dataset, or hub dataset name.")
    split: Name = Field(default="train", description="Split of a hub or saved dataset; files have none.")
    id_column: Name = Field(default="id", description="Column of the record's id.")
    text_column: Name = Field(default="text", description="Column of a plain text.")
    prompt_column: Name = Field(default="prompt", description="Column of a prompt, not trained on.")
    completion_column: Name = Field(default="completion", description="Column of its completion.")
    messages_column: Name = Field(default="messages", description="Column of a chat's turns.")
    message_property_mappings: TurnKeys = Field(
        default=TurnKeys(), description="Keys of a turn: role and content."
    )

    @model_validator(mode="after")
    def _columns_once(self) -> DatasetSource:
        bodies = [self.text_column, self.prompt_column, self.completion_column, self.messages_column]
        if twice := sorted({each for each in bodies if bodies.count(each) > 1}):
            raise conflict(f"conflict: two columns are called {', '.join(map(shown, twice))}")
        return self


class SourceLimits(Block):
    """What is refused as too much of a source, so that no file takes all memory."""

    max_records: Int = key(2_000_000, "none", "Records of one source.", ge=1)
    max_record_bytes: Int = key(1 << 20, "none", "Bytes of one line, or of one record's text.", ge=1)
    max_bytes: Int = key(1 << 31, "none", "Bytes of all records' text of one source.", ge=1)
    max_problems: Int = key(1_000, "none", "Problems listed of bad input; all are counted.", ge=1)


def shown(value: Any) -> str:
    try:
        return short(repr(value) if isinstance(value, str | int | float | list | dict) else str(value))
    except (ValueError, RecursionError):  # an integer too long to print
        return "a huge value"


def short(text: str) -> str:
    return text if len(text) <= MAX_GOT_CHARS else text[: MAX_GOT_CHARS - 3] + "..."
