"""Test the contract of stores of metrics over the fake and files, and the behaviour of files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sisa.core.errors import IntegrityError
from sisa.core.events import EpochTrained, QueueSeen
from sisa.core.ports import Metrics
from sisa.store.metrics import FileMetrics, metrics_line
from tests.fakes.metrics import FakeMetrics

FIRST, SECOND = "20261125T213749Z-0000000a", "20261126T000000Z-0000000b"
AT = "2026-11-25T21:37:49.123+00:00"


@pytest.fixture(params=["fake", "files"])
def metrics(request: pytest.FixtureRequest, tmp_path: Path) -> Metrics:
    return FakeMetrics() if request.param == "fake" else FileMetrics(tmp_path / "metrics")


def epoch(stage: str, run: str = FIRST) -> dict[str, Any]:
    found = metrics_line(EpochTrained(0, 1, stage * 64, 1, 2, 9, 100, 0.5, 1.25), AT, run)
    assert found is not None
    return found


def queue(depth: int, run: str = FIRST) -> dict[str, Any]:
    found = metrics_line(QueueSeen(depth, 0, 0, 0, None), AT, run)
    assert found is not None
    return found


def test_lines_come_back_by_run_in_order(metrics: Metrics) -> None:
    assert metrics.runs() == []
    for made in (queue(1, SECOND), epoch("a"), queue(2, SECOND), epoch("b")):
        metrics.append(made)
    assert metrics.runs() == [FIRST, SECOND]
    assert metrics.read(FIRST) == [epoch("a"), epoch("b")]
    assert [each["depth"] for each in metrics.read(SECOND)] == [1, 2]


def test_a_run_without_lines_is_no_run(metrics: Metrics) -> None:
    metrics.append(queue(1))
    with pytest.raises(IntegrityError):
        metrics.read(SECOND)
    with pytest.raises(IntegrityError):
        metrics.append({**queue(1), "run": "../elsewhere"})


def test_losses_of_other_stages_are_erased(metrics: Metrics) -> None:
    metrics.keep_losses({"a" * 16})
    for made in (epoch("a"), epoch("b"), queue(3), epoch("b", SECOND)):
        metrics.append(made)
    for _ in range(2):
        metrics.keep_losses({"a" * 16})
        assert metrics.read(FIRST) == [
            epoch("a"),
            {**epoch("b"), "loss": None, "tokens": None},
            queue(3),
        ]
        assert metrics.read(SECOND)[0]["loss"] is None
    metrics.append(epoch("c"))
    assert metrics.read(FIRST)[-1]["loss"] == 1.25


# --- files ---------------------------------------------------------------------------------------


def file_of(tmp_path: Path) -> Path:
    return tmp_path / "metrics" / f"{FIRST}.jsonl"


def test_a_line_without_its_end_is_not_read_and_goes(tmp_path: Path) -> None:
    metrics = FileMetrics(tmp_path / "metrics")
    metrics.append(epoch("a"))
    whole = file_of(tmp_path).read_bytes()
    file_of(tmp_path).write_bytes(whole + b'{"event":"epo')
    assert metrics.read(FIRST) == [epoch("a")]
    metrics.keep_losses({"a" * 16})
    assert file_of(tmp_path).read_bytes() == whole


def test_what_is_not_written_here_is_refused(tmp_path: Path) -> None:
    metrics = FileMetrics(tmp_path / "metrics")
    metrics.append(queue(1))
    file_of(tmp_path).write_text('{"id": "p001"}\n')
    with pytest.raises(IntegrityError, match="not in the form that is written") as caught:
        metrics.read(FIRST)
    assert caught.value.where.endswith("line 1")
    assert "p001" not in str(caught.value)


def test_a_file_is_for_its_owner_and_changed_only_by_need(tmp_path: Path) -> None:
    metrics = FileMetrics(tmp_path / "metrics")
    metrics.append(epoch("a"))
    before = file_of(tmp_path).stat()
    assert before.st_mode & 0o777 == 0o600
    metrics.keep_losses({"a" * 16})
    assert file_of(tmp_path).stat().st_ino == before.st_ino
    metrics.keep_losses(set())
    after = file_of(tmp_path).stat()
    assert (after.st_ino != before.st_ino, after.st_mode & 0o777) == (True, 0o600)
    (tmp_path / "metrics" / "mine.txt").write_text("not a run")
    assert metrics.runs() == [FIRST]
