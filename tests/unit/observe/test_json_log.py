"""Structured logs: one JSON object a line, one run throughout, only fixed words and numbers."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import cli
from cluster.observe import json_log
from cluster.observe.json_log import JsonLog, driver_log, worker_log
from cluster.observe.reporting import log_format_of, say
from sisa.core.events import ErasureFailed, Event, Notice, SliceProgress, SliceStarted, TrainingStarted
from sisa.core.run import RunContext, is_run, running
from tests.fakes.metrics import EPOCH, EVENTS, RUN, TRAINED
from tests.models import confessing


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(each) for each in text.splitlines()]


def lines_of(log: Callable[[Event], None], stream: io.StringIO, *events: Event) -> list[dict[str, Any]]:
    for event in events:
        log(event)
    return lines(stream.getvalue())


def test_a_driver_shows_steps_and_sums_up_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    log = driver_log(JsonLog(stream, RUN, "driver"))
    found = lines_of(log, stream, *EVENTS)
    names = [each["event"] for each in found]
    assert names[:3] == ["training_started", "epoch_trained", "slice_trained"]
    assert names[3:] == ["queue_seen", "deletion_completed", "erasure_failed", "notice"]
    assert {each["run"] for each in found} == {RUN}
    assert {each["source"] for each in found} == {"driver"}
    assert not any("loss" in each for each in found)
    assert found[-1]["message"] == "a line"
    assert {each["level"] for each in found if each["event"] == "erasure_failed"} == {"error"}
    monkeypatch.setattr(json_log, "LINE_EVERY_S", 0.0)
    last = lines_of(log, stream, EVENTS[0], SliceProgress(1, 0, 5, 10))[-1]
    assert (last["event"], last["num_slices"]) == ("progress", 3)


def test_a_worker_logs_only_where_a_log_is_wanted() -> None:
    stream = io.StringIO()
    assert worker_log(None, stream, "n1") is None
    assert worker_log(RunContext(RUN, "text"), stream, "n1") is None
    log = worker_log(RunContext(RUN, "json"), stream, "n1")
    assert log is not None
    found = lines_of(log, stream, SliceStarted(0, 0, 9), SliceProgress(0, 0, 1, 9), EPOCH, TRAINED)
    assert [each["event"] for each in found] == ["slice_started", "epoch_trained", "slice_trained"]
    assert {(each["run"], each["source"], each["node"]) for each in found} == {(RUN, "worker", "n1")}


@pytest.mark.parametrize(
    ("arguments", "form"),
    [
        (["train", "run.yaml"], "text"),
        (["train", "--log-format", "json", "run.yaml"], "json"),
        (["train", "--log-format=json"], "json"),
        (["train", "json", "--log-format"], "text"),
    ],
)
def test_the_form_is_read_from_the_command_line(arguments: list[str], form: str) -> None:
    assert log_format_of(arguments) == form


def test_words_from_outside_of_flows(capsys: pytest.CaptureFixture[str]) -> None:
    say("\n== a step")
    assert capsys.readouterr().err == "\n== a step\n"
    with running(RunContext(RUN, "json")):
        say("\n== a step")
    assert lines(capsys.readouterr().err)[0]["message"] == "== a step"


def test_a_command_logs_its_life_under_one_run(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = confessing.record(3).id
    forget = ["forget", "-m", str(model), named, "--log-format", "json", "--json"]
    assert cli.run(forget) == 0
    out, err = capsys.readouterr()
    found = lines(err)
    names = [each["event"] for each in found]
    assert json.loads(out)["records"] == 1
    assert (names[0], names[-1]) == ("run_started", "run_finished")
    assert {"training_started", "epoch_trained", "slice_trained", "deletion_completed"} <= set(names)
    assert found[0]["command"] == "sisa forget"
    (run,) = {each["run"] for each in found}
    assert is_run(run)
    assert [path.name for path in (model / "metrics").iterdir()] == [f"{run}.jsonl"]
    assert named not in err

    assert cli.run([*forget[:-1], "--executor", "none-such"]) == 2
    failed = lines(capsys.readouterr().err)[-1]
    assert (failed["event"], failed["level"], failed["error"]) == ("run_failed", "error", "InvalidInput")
    assert cli.run(["forget", "-m", str(model), named, "--log-format=json", "--subject", "s"]) == 2
    failed = lines(capsys.readouterr().err)[-1]
    assert (failed["error"], failed["message"], failed["exit_code"]) == ("UsageError", "", 2)


def test_a_form_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["verify", "-m", "model", "--log-format", "xml"]) == 2
    assert "is not one of" in capsys.readouterr().err


def test_notices_and_failures_have_their_own_level() -> None:
    stream = io.StringIO()
    log = JsonLog(stream, RUN, "driver")
    for event in (Notice("x"), ErasureFailed(1), TrainingStarted(())):
        log.write_event(event)
    assert [each["level"] for each in lines(stream.getvalue())] == ["info", "error", "info"]
