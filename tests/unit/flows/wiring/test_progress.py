"""Progress: shards, slices, tokens and time on standard error; a resumed stage counts as done."""

from __future__ import annotations

import io
import re

import pytest

from sisa.core.domain import SavedCheckpoint, SliceJob
from sisa.core.events import (
    EmbeddingProgress,
    Notice,
    PatchProgress,
    SliceProgress,
    SliceStarted,
    SliceTrained,
    TrainingStarted,
)
from sisa.flows.wiring import progress as progress_module
from sisa.flows.wiring.progress import Meter, progress

STAGES = TrainingStarted(((0, 0, 10), (0, 1, 20), (1, 0, 30)))


def trained(shard: int, slice_: int) -> SliceTrained:
    job = SliceJob(shard, slice_, None, ((slice_, "root"),), 5, (2, 1), {}, "base", "f")
    return SliceTrained(job, SavedCheckpoint(job.key, "m", "a", 1), 1.0, 100)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_line_of_a_training_half_done() -> None:
    meter = Meter()
    meter.take(STAGES, now=100.0)
    meter.take(SliceStarted(0, 0, 200), now=100.0)
    meter.take(SliceProgress(0, 0, 200, 200), now=110.0)
    meter.take(trained(0, 0), now=110.0)
    meter.take(SliceProgress(1, 0, 150, 225), now=110.0)
    assert meter.counts() == pytest.approx((30.0, 60))
    assert meter.line(now=110.0) == ("shards 0/2, slices 1/3, 50% of record-epochs, 35 tok/s, 0:10 left")


def test_a_shard_is_done_with_its_last_slice() -> None:
    meter = Meter()
    meter.take(STAGES, now=0.0)
    for place in ((0, 0), (0, 1), (1, 0)):
        assert not meter.line(now=1.0).startswith("shards 2/2")
        meter.take(trained(*place), now=1.0)
    assert meter.line(now=60.0) == "shards 2/2, slices 3/3, 100% of record-epochs, 0 tok/s, 0:00 left"


def test_nothing_is_divided_by_nothing() -> None:
    assert Meter().line(now=0.0).endswith("100% of record-epochs, 0 tok/s, unknown time left")
    meter = Meter()
    meter.take(STAGES, now=5.0)
    meter.take(SliceProgress(0, 0, 0, 0), now=5.0)
    assert "0% of record-epochs" in meter.line(now=5.0)


def test_a_second_training_starts_from_nothing() -> None:
    meter = Meter()
    meter.take(STAGES, now=0.0)
    meter.take(SliceProgress(0, 0, 200, 200), now=5.0)
    meter.take(TrainingStarted(((3, 0, 10),)), now=50.0)
    assert meter.line(now=51.0) == (
        "shards 0/1, slices 0/1, 0% of record-epochs, 0 tok/s, unknown time left"
    )


def test_plain_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    with progress(stream) as report:
        report(STAGES)
        report(SliceStarted(0, 0, 100))
        for tokens in range(0, 100, 10):
            report(SliceProgress(0, 0, tokens, 100))
        assert stream.getvalue() == ""
        report(trained(0, 0))
        report(Notice("a worker was lost; [bold]its slice[/bold] starts again"))
        monkeypatch.setattr(progress_module, "LINE_EVERY_S", 0.0)
        report(SliceProgress(0, 1, 50, 100))
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("shards 0/2, slices 1/3, 16% of record-epochs")
    assert lines[1] == "a worker was lost; [bold]its slice[/bold] starts again"
    assert lines[2].startswith("shards 0/2, slices 1/3, 33% of record-epochs")
    assert len(lines) == 3


def test_steps_of_a_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = Meter()
    meter.take(STAGES, now=0.0)
    meter.take(PatchProgress(11, 20, 0.5), now=10.0)  # it goes on with a run that was put aside
    assert "step 11/20, loss 0.5000, unknown time left" in meter.line(now=10.0)
    meter.take(PatchProgress(14, 20, 0.25), now=13.0)
    assert meter.line(now=13.0) == "patch (approximate): step 14/20, loss 0.2500, 0:06 left"
    assert meter.counts() == (14, 20)
    meter.take(STAGES, now=20.0)
    assert meter.line(now=20.0).startswith("shards 0/")
    stream = io.StringIO()
    monkeypatch.setattr(progress_module, "LINE_EVERY_S", 0.0)
    with progress(stream) as report:
        report(PatchProgress(1, 2, 0.5))
    assert stream.getvalue().startswith("patch (approximate): step 1/2")


def test_texts_of_an_embedding() -> None:
    meter = Meter()
    meter.take(EmbeddingProgress(1024, 8000), now=1.0)
    assert meter.line(now=2.0) == "embedded 1,024 of 8,000 texts"
    assert meter.numbers(now=2.0) == {"num_done": 1024, "num_texts": 8000}
    assert meter.counts() == (1024, 8000)
    meter.take(STAGES, now=20.0)
    assert meter.line(now=20.0).startswith("shards 0/")


def test_a_bar_on_a_terminal() -> None:
    stream = Terminal()
    with progress(stream) as report:
        report(STAGES)
        report(Notice("[red]as it stands[/red]"))
        report(trained(0, 0))
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "[red]as it stands[/red]" in shown
    assert "slices 1/3, 16% of record-epochs" in shown


def test_standard_output_stays_free(capsys: pytest.CaptureFixture[str]) -> None:
    with progress() as report:
        report(STAGES)
        report(trained(0, 0))
        report(Notice("a line"))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "a line" in captured.err


def test_a_shard_at_work_shows_slice_pass_step_and_time() -> None:
    meter = Meter()
    meter.take(STAGES, now=0.0)
    meter.take(SliceStarted(0, 0, 200), now=10.0)
    meter.take(SliceStarted(1, 0, 300), now=10.0)
    meter.take(SliceProgress(0, 0, 100, 200, 5, 10, 1, 2), now=20.0)
    first, second = meter.at_work()
    assert first.line(20.0) == "shard 0: slice 1/2, epoch 1/2, step 5/10, 10 tok/s, 0:10 left"
    assert second.line(20.0) == "shard 1: slice 1/1, 0 tok/s, unknown time left"
    meter.take(trained(0, 0), now=30.0)
    meter.take(trained(0, 0), now=30.0)
    meter.take(SliceStarted(0, 1, 200), now=30.0)
    assert [each.line(30.0)[:18] for each in meter.at_work()] == [
        "shard 0: slice 2/2",
        "shard 1: slice 1/1",
    ]
    assert meter.numbers(30.0) == {
        "num_slices": 3,
        "slices_done": 1,
        "share": 0.1667,
        "tokens_per_second": 3.3,
        "seconds_left": 150.0,
    }


def test_a_bar_for_each_shard_at_work_and_no_more_than_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "MOST_ROWS", 1)
    stream = Terminal()
    with progress(stream) as report:
        report(STAGES)
        report(SliceStarted(0, 0, 200))
        report(SliceProgress(0, 0, 100, 200, 5, 10, 1, 2))
        report(SliceStarted(1, 0, 300))
        report(Notice("FIRST"))
        report(trained(0, 0))
        report(Notice("SECOND"))
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "shard 0: slice 1/2" in shown
    before, _, after = shown.rpartition("SECOND")
    assert "shard 1" not in before[: before.rindex("FIRST")]
    assert "shard 1: slice 1/1" in after
