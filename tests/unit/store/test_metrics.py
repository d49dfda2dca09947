"""What is kept of events: numbers only, no loss of few records, and nothing from outside."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sisa.core import events
from sisa.core.events import (
    EpochTrained,
    Event,
    Notice,
    PatchProgress,
    QueueSeen,
    SliceTrained,
    TrainingStarted,
)
from sisa.core.run import RUN_VARIABLE, RunContext, current_run, new_run, running
from sisa.store.metrics import (
    EVENT_NAMES,
    KEPT,
    MIN_RECORDS,
    event_numbers,
    is_line,
    loggable_numbers,
    metrics_line,
    recording,
    without_losses,
)
from tests.fakes.metrics import AT, EPOCH, EVENTS, JOB, RUN, TRAINED, FakeMetrics, kept


def test_every_event_has_a_name_and_flat_fields() -> None:
    kinds = [
        kind for kind in vars(events).values() if isinstance(kind, type) and Event in kind.__bases__
    ]
    assert [type(each) for each in EVENTS] == kinds == list(EVENT_NAMES)
    for event in EVENTS:
        for name, value in event_numbers(event).items():
            assert name == "stage" or value is None or type(value) in (int, float)


def test_what_lines_say() -> None:
    assert kept(TRAINED) == {
        "at": AT,
        "run": RUN,
        "event": "slice_trained",
        "shard": 2,
        "slice": 1,
        "stage": JOB.key[:16],
        "num_records": 9,
        "record_epochs": 14,
        "tokens": 900,
        "seconds": 2.5,
    }
    assert kept(EVENTS[0]) | {} == {
        "at": AT,
        "run": RUN,
        "event": "training_started",
        "num_slices": 3,
        "num_shards": 2,
        "record_epochs": 60,
    }
    assert event_numbers(PatchProgress(3, 40, 1.5)) == {"step": 3, "num_steps": 40}
    assert event_numbers(Notice("a line")) == {}


def test_only_some_are_kept() -> None:
    made = [metrics_line(event, AT, RUN) is not None for event in EVENTS]
    assert made == [isinstance(event, KEPT) for event in EVENTS]
    assert metrics_line(SliceTrained(JOB, TRAINED.saved, 0.0, 0), AT, RUN) is None
    assert metrics_line(TrainingStarted(()), AT, RUN) is None


def test_few_records_have_no_loss_and_no_tokens_and_none_is_logged() -> None:
    few = EpochTrained(2, 1, JOB.key, 1, 2, MIN_RECORDS - 1, 600, 1.5, 0.75)
    enough = EpochTrained(2, 1, JOB.key, 1, 2, MIN_RECORDS, 600, 1.5, 0.75)
    short = SliceTrained(replace(JOB, num_records=MIN_RECORDS - 1), TRAINED.saved, 2.5, 900)
    numbers = [(event_numbers(each)["loss"], event_numbers(each)["tokens"]) for each in (few, enough)]
    assert numbers == [(None, None), (0.75, 600)]
    assert (event_numbers(short)["tokens"], event_numbers(TRAINED)["tokens"]) == (None, 900)
    assert not {"loss", "tokens", "total_tokens"} & {
        name for each in EVENTS for name in loggable_numbers(each)
    }


def test_a_loss_and_the_number_of_tokens_go_with_their_stage() -> None:
    """A deletion's new stage has the same records but one: their tokens differ by that one's length."""
    for made, gone in (
        (kept(EPOCH), {"loss": None, "tokens": None}),
        (kept(TRAINED), {"tokens": None}),
    ):
        assert without_losses(made, {JOB.key[:16]}) == made
        assert without_losses(made, {"0" * 16}) == {**made, **gone}
        assert is_line(without_losses(made, set()))


@pytest.mark.parametrize("event", [each for each in EVENTS if isinstance(each, KEPT)])
def test_a_line_is_distinguished_from_anything_else(event: Event) -> None:
    made = kept(event)
    assert is_line(made)
    bad: list[object] = [{**made, "id": "p001"}, [made], None, {}, {**made, "event": "told"}]
    bad += [{**made, "at": "Ada"}, {**made, "run": "Ada"}, {**made, "event": ["x"]}]
    bad += [{k: v for k, v in made.items() if k != name} for name in made]
    numbers = [name for name in event_numbers(event) if name != "stage"]
    bad += [{**made, name: wrong} for name in numbers for wrong in ("Ada", True, float("nan"), [1])]
    if "stage" in made:
        bad += [{**made, "stage": wrong} for wrong in ("Ada", 1, JOB.key)]
    assert [each for each in bad if is_line(each)] == []


def test_a_report_records_under_the_run_that_is_under_way() -> None:
    metrics, seen = FakeMetrics(), list[Event]()
    with running(RunContext(RUN)):
        report = recording(seen.append, metrics, lambda: AT)
    for event in (*EVENTS, EVENTS[6], QueueSeen(0, 0, 0, 0, None)):
        report(event)
    assert seen[: len(EVENTS)] == EVENTS
    assert metrics.runs() == [RUN]
    names = [each["event"] for each in metrics.read(RUN)]
    assert names.count("queue_seen") == 2  # the second time it was the same
    assert all(map(is_line, metrics.lines))
    recording(seen.append, metrics, lambda: AT)(TRAINED)
    assert len(metrics.runs()) == 2


def test_runs_are_nested_and_can_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(RUN_VARIABLE, raising=False)
    assert new_run().run != new_run().run
    monkeypatch.setenv(RUN_VARIABLE, RUN)
    with running() as outer, running() as inner:
        assert outer is inner is current_run()
        assert outer.run == RUN
    assert current_run() is None
    monkeypatch.setenv(RUN_VARIABLE, str(tmp_path))
    assert new_run().run != str(tmp_path)
