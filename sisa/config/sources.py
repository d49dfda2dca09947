"""Sources of records in a run file: where they are, the names of their columns, and their limits.

>>> columns_of(DatasetSource(path="a.jsonl", id_column="nr"), "person").used[:2]
('text', 'prompt')
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import model_validator

from sisa.config.fields import Name, field, key, shown
from sisa.core.block import Block, Int, conflict
from sisa.core.domain import GENERATION_COLUMN, RISK_COLUMN, Kind


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of a source's columns (a subject's may be missing) and of the keys of a chat's turns."""

    id: str = "id"
    subject: str | None = "subject_id"
    text: str = "text"
    prompt: str = "prompt"
    completion: str = "completion"
    messages: str = "messages"
    role: str = "role"
    content: str = "content"
    identifiers: tuple[tuple[str, str], ...] = ()  # (identifier, its column)

    @property
    def bodies(self) -> dict[Kind, tuple[str, ...]]:
        """Return the columns of each kind of body."""
        return {
            "text": (self.text,),
            "completion": (self.prompt, self.completion),
            "chat": (self.messages,),
        }

    @property
    def body(self) -> tuple[str, ...]:
        """Return all columns of bodies."""
        return tuple(column for columns in self.bodies.values() for column in columns)

    @property
    def used(self) -> tuple[str, ...]:
        """Return all columns that make up a record."""
        subject = () if self.subject is None else (self.subject,)
        identifiers = (column for _, column in self.identifiers)
        return (*self.body, self.id, *subject, RISK_COLUMN, GENERATION_COLUMN, *identifiers)


DEFAULT_COLUMNS = Columns()


class TurnKeys(Block):
    """Names of the keys of a chat's turns in a source."""

    role: Name = "role"
    content: Name = "content"


class DatasetSource(Block):
    """Source of records (a file, a directory or a hub dataset) and the names of its columns."""

    path: Name = field(..., "JSONL or Parquet file, saved dataset, or hub dataset name.")
    split: Name = field("train", "Split of a hub or saved dataset; files have none.")
    id_column: Name = field("id", "Column of the record's id.")
    text_column: Name = field("text", "Column of a plain text.")
    prompt_column: Name = field("prompt", "Column of a prompt, not trained on.")
    completion_column: Name = field("completion", "Column of its completion.")
    messages_column: Name = field("messages", "Column of a chat's turns.")
    message_property_mappings: TurnKeys = field(TurnKeys(), "Keys of a turn: role and content.")

    @model_validator(mode="after")
    def _each_column_once(self) -> DatasetSource:
        bodies = [self.text_column, self.prompt_column, self.completion_column, self.messages_column]
        if twice := sorted({each for each in bodies if bodies.count(each) > 1}):
            raise conflict(f"conflict: two columns are called {', '.join(map(shown, twice))}")
        return self


class SourceLimits(Block):
    """Limits on the size of one source, so that no file takes all memory."""

    max_records: Int = key(2_000_000, "none", "Records of one source.", ge=1)
    max_record_bytes: Int = key(1 << 20, "none", "Bytes of one line, or of one record's text.", ge=1)
    max_bytes: Int = key(1 << 31, "none", "Bytes of all records' text of one source.", ge=1)
    max_problems: Int = key(1_000, "none", "Problems listed for bad input; all are counted.", ge=1)


def columns_of(
    source: DatasetSource, group_by: str | None, identifiers: tuple[tuple[str, str], ...] = ()
) -> Columns:
    """Return the names of a source's columns."""
    keys = source.message_property_mappings
    bodies = (source.text_column, source.prompt_column, source.completion_column)
    turns = (source.messages_column, keys.role, keys.content)
    return Columns(source.id_column, group_by, *bodies, *turns, identifiers)
