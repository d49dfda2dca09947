"""What a model is asked often reads as many rows of its ledger where it holds more records."""

from __future__ import annotations

import contextlib
from pathlib import Path
from unittest.mock import Mock

import pytest

from sisa.store.ledger import rows
from sisa.store.ledger.ledger import SqlLedger
from tests.bench.scale.questions import filled, small_questions

NUM_REQUESTS, BUCKET = 5, 4  # rows of a bucket of 4,000 records, at most


def rows_read(num_records: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Return how many rows each question reads."""
    found = {}
    folder.mkdir()
    with contextlib.closing(SqlLedger(folder / "ledger.db", create=True)) as ledger:
        filled(ledger, num_records, NUM_REQUESTS)
        for asked, question in small_questions(ledger, folder).items():
            with monkeypatch.context() as patched:
                watched = Mock(wraps=rows.checked_rows)
                patched.setattr(rows, "checked_rows", watched)
                question()
            found[asked] = sum(len(call.args[1]) for call in watched.call_args_list)
    return found


def test_small_questions_read_no_more_rows_where_more_records_are_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, many = (rows_read(size, tmp_path / str(size), monkeypatch) for size in (400, 4_000))
    assert few.keys() == many.keys()
    assert min(few.values()) > 0
    assert all(many[asked] <= few[asked] + 2 * BUCKET for asked in few)
