"""`sisa request ...`, `sisa run` and `sisa forget` at the command line, over a model of a fake trainer.

Base and trainer are replaced where a command would resolve them, so that neither torch nor Ray is
needed and everything else (ledger, files, index, lock) is real.
"""

from __future__ import annotations

import json
import re
import shutil
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.cli import requests
from sisa.config.runfile import parse_run_file
from sisa.core.domain import Part, Record
from sisa.flows.wiring import executors
from sisa.flows.wiring.ledger_place import LOCK
from sisa.store.blobs.files import writer_lock
from tests.fakes.ports import fake_record
from tests.models import confessing
from tests.unit.commands import Ask, Sisa

RUN_FILE = """
datasets: [{path: owner/people}]
output_dir: model
sisa: {shards: 3, slices: 2, embedder: hashing}
"""
NUM_RECORDS = 20
WHOLE_LIFE = ["received", "approved", "committed", "rolled_back", "erased", "retrained", "completed"]
REQUEST_KEYS = {"request_id", "external_id", "state", "regime", "due", "days_left", "held_by"}
REQUEST_KEYS |= {"created_at", "reason", "approver", "extension", "num_copies", "copies_included"}
REQUEST_KEYS |= {
    "num_records",
    "committed_at",
    "shards",
    "record_epochs_retrained",
    "record_epochs_full",
    "record_epochs_others",
    "served",
    "serving_depth",
    "cause",
    "exports_erased",
}
REQUEST_KEYS |= {"probed", "seconds", "model_digest_before", "model_digest_after"}
REQUEST_KEYS |= {"consent", "vaulted", "submitter", "received_on"}


def record(number: int) -> Record:
    """Record 10 is an exact copy of record 0, record 12 a near one of record 11."""
    name, subject = f"id-{number:04d}", f"subject-{number % 6}"
    if number in (11, 12):
        words = " ".join(f"word{each}" for each in range(60))
        return Record(name, subject, "text", (Part("text", f"{words} {number}"),))
    found = fake_record(0 if number == 10 else number, subject)
    return Record(name, subject, found.kind, found.parts)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model of 20 records."""
    directory = tmp_path_factory.mktemp("pristine")
    config = parse_run_file(RUN_FILE, "run.yaml")
    records = [record(number) for number in range(NUM_RECORDS)]
    then = {"numerics": "f", "now": "2026-01-01T00:00:00+00:00"}
    confessing.train_in(directory, config, records, **then)
    return directory


@pytest.fixture
def model(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the model for one test to change; `--executor serial` trains with the fake trainer."""
    confessing.use_fake_base(monkeypatch)
    monkeypatch.setattr(executors, "open_serial", confessing.open_fake)
    return Path(shutil.copytree(pristine, tmp_path / "model"))


@pytest.fixture
def ask(ask: Ask, model: Path) -> Ask:
    """Run a command on the model; return its JSON."""
    return lambda *arguments, **code: ask(*arguments, "-m", model, **code)


def tomorrow() -> str:
    """Return a due date that no plan waits for."""
    return (datetime.now(UTC) + timedelta(days=1)).date().isoformat()


def run_once(ask: Ask) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = ask("run", "--executor", "serial")["requests"]
    return found


# --- submit, list, show


def test_submit_shows_the_request(ask: Ask) -> None:
    found = ask("request", "submit", "id-0003", "id-0004", "--external-id", "T-1", "--reason", "letter")
    assert set(found) == REQUEST_KEYS | {"copies", "near", "already_deleted"}
    assert found["request_id"].startswith("req-")
    assert (found["external_id"], found["state"], found["num_records"]) == ("T-1", "received", 2)
    assert (found["regime"], found["reason"], found["approver"]) == ("gdpr", "letter", None)
    assert 28 <= found["days_left"] <= 31
    assert found["copies"] == []


def test_list_and_show_know_a_request_by_either_name(ask: Ask) -> None:
    assert ask("request", "list") == {"requests": [], "drop": None}
    first = ask("request", "submit", "id-0003", "--external-id", "T-1")
    ask("request", "submit", "--subject", "subject-1", "--approver", "dpo")
    listed = ask("request", "list")["requests"]
    assert [(each["state"], each["num_records"]) for each in listed] == [
        ("received", 1),
        ("approved", 4),
    ]
    assert all(set(each) == REQUEST_KEYS for each in listed)
    shown = ask("request", "show", "T-1")
    assert shown == ask("request", "show", first["request_id"])
    assert set(shown) == REQUEST_KEYS | {"events", "certificate"}
    assert [set(each) for each in shown["events"]] == [{"request_id", "state", "at", "note", "link"}]
    assert {name: shown[name] for name in listed[0]} == listed[0]


def test_ids_come_from_a_file_too(ask: Ask, tmp_path: Path) -> None:
    ids = tmp_path / "ids.txt"
    ids.write_text("id-0003\nid-0004\n")
    assert ask("request", "submit", "id-0005", "--ids-file", ids)["num_records"] == 3


def test_a_regime_or_a_day_sets_the_due_date(ask: Ask) -> None:
    assert ask("request", "submit", "id-0003", "--regime", "delete-act")["days_left"] == 45
    assert ask("request", "submit", "id-0003", "--due", "2090-12-31")["due"] == "2090-12-31"
    for due in ("soon", "2001-01-01"):
        error = ask("request", "submit", "id-0003", "--due", due, code=2)["error"]
        assert error["type"] == "InvalidInput"
        assert error["next_step"]


def test_a_letter_whose_term_is_over_is_overdue_everywhere(ask: Ask, sisa: Sisa, model: Path) -> None:
    day = (datetime.now(UTC) - timedelta(weeks=5)).date().isoformat()
    late = ("--received-on", day, "--external-id", "T-1", "--approver", "dpo")
    ask("request", "submit", "id-0004")  # in time
    found = ask("request", "submit", "id-0003", *late)
    assert (found["received_on"], found["days_left"] < 0) == (day, True)
    words = f"(T-1): approved, 1 record, received on {day}, due {found['due']}, overdue by "
    for command in (("request", "list"), ("request", "show", "T-1"), ("status",)):
        assert words in sisa(*command, "-m", model)[1]
    (listed,) = ask("request", "list", "--overdue", code=7)["requests"]
    assert listed["request_id"] == found["request_id"]
    assert ask("status")["requests"][1]["days_left"] == found["days_left"]
    attention = ask("report")["attention"]
    assert ("Open requests past their due date", 1) in [(p["what"], p["count"]) for p in attention]
    assert ask("run", "--plan")["why"] == "a request is overdue"
    run_once(ask)
    assert ask("request", "list", "--overdue")["requests"] == []
    assert [each["on_time"] for each in ask("report")["requests"]] == [None, False]


def test_a_letter_of_tomorrow_is_refused(ask: Ask) -> None:
    error = ask("request", "submit", "id-0003", "--received-on", tomorrow(), code=2)["error"]
    assert (error["type"], error["got"]) == ("InvalidInput", tomorrow())
    assert ask("request", "list")["requests"] == []


def test_copies_are_listed_and_included_only_if_asked(ask: Ask) -> None:
    found = ask("request", "submit", "id-0000")
    assert (found["copies"], found["num_copies"], found["copies_included"]) == (["id-0010"], 1, False)
    assert found["num_records"] == 1
    found = ask("request", "submit", "id-0000", "--include-copies", "--approver", "dpo")
    assert (found["num_records"], found["copies_included"]) == (2, True)


def test_find_like_names_the_record_and_proposes_others(ask: Ask) -> None:
    found = ask("request", "submit", "--find-like", "id-0011", "--approver", "dpo")
    assert (found["num_records"], found["copies"]) == (1, [])
    assert [each["id"] for each in found["near"]] == ["id-0012"]
    run_once(ask)
    assert [each["state"] for each in ask("where", "id-0011", "id-0012")["records"]] == [
        *("deleted", "trained")
    ]


def test_an_exact_copy_is_no_near_duplicate(ask: Ask) -> None:
    """Else one answer says of the same id that it is included and that it is not."""
    found = ask("request", "submit", "id-0000", "--include-duplicates")
    assert (found["copies"], found["copies_included"], found["near"]) == (["id-0010"], True, [])


def test_the_words_of_submit_show_and_list(sisa: Sisa, model: Path) -> None:
    given = ("id-0000", "--external-id", "T-1", "--reason", "a letter of May")
    code, out, _ = sisa("request", "submit", "-m", model, *given)
    assert code == 0
    assert "(T-1): received, 1 record, due " in out
    assert "exact copies under other ids, NOT included (--include-copies): 1" in out
    assert out.endswith(f"next: sisa request approve -m {model} T-1 --approver WHO\n")
    code, out, _ = sisa("request", "hold", "T-1", "-m", model, "--reason", "court \x1b[2J order")
    assert code == 0
    assert re.search(r"held  court .*order", out)
    assert "reason: a letter of May" in out
    assert "\x1b" not in out
    sisa("request", "cancel", "T-1", "-m", model)
    code, out, _ = sisa("request", "list", "-m", model)
    assert "cancelled, 1 record" in out
    assert "days left" not in out  # of what is closed


# --- decisions


def test_decisions_one_after_another(ask: Ask) -> None:
    ask("request", "submit", "id-0003", "--external-id", "T-1")
    assert ask("request", "approve", "T-1", "--approver", "dpo")["state"] == "approved"
    assert ask("request", "hold", "T-1", "--reason", "court order")["state"] == "held"
    found = ask("request", "approve", "T-1", "--approver", "judge")
    assert (found["state"], found["approver"]) == ("approved", "judge")
    extended = ask("request", "extend", "T-1", "--reason", "complex")
    assert extended["days_left"] - found["days_left"] in range(59, 63)
    assert extended["extension"] == "complex"
    cancelled = ask("request", "cancel", "T-1")
    assert [each["state"] for each in cancelled["events"]] == [
        *("received", "approved", "held", "approved", "approved", "cancelled")
    ]
    assert [each["note"] for each in cancelled["events"]][1:4] == ["dpo", "court order", "judge"]
    assert len({each["link"] for each in cancelled["events"]}) == 6
    assert run_once(ask) == []


NAMING_A_REQUEST = [
    ("show",),
    ("approve", "--approver", "dpo"),
    ("hold", "--reason", "late"),
    ("deny", "--reason", "late"),
    ("cancel",),
    ("extend", "--reason", "late"),
]


def test_the_log_says_who_decided(ask: Ask) -> None:
    ask("request", "submit", "id-0003", "--external-id", "T-1")
    for decision in ("extend", "hold", "deny"):
        ask("request", decision, "T-1", "--by", "dpo", "--reason", "complex")
    notes = [each["note"] for each in ask("request", "show", "T-1")["events"]]
    assert notes[0] == ""
    assert re.fullmatch(r"dpo: extended to \d{4}-\d\d-\d\d: complex", notes[1])
    assert notes[2:] == ["dpo: complex", "dpo: complex"]


def test_reasons_and_subjects_come_from_files(ask: Ask, tmp_path: Path) -> None:
    reason, subject = tmp_path / "reason.txt", tmp_path / "subject.txt"
    reason.write_text("as Ada asked by letter\n")
    subject.write_text("subject-1\n")
    ask("request", "submit", "--subject-file", subject, "--external-id", "T-1", "--reason-file", reason)
    found = ask("request", "show", "T-1")
    assert found["reason"] == "as Ada asked by letter"
    plain = ask("request", "submit", "--subject", "subject-1", "--external-id", "T-2")
    assert found["num_records"] == plain["num_records"] > 0
    assert ask("request", "hold", "T-1", "--reason-file", reason)["state"] == "held"
    both = ("--reason-file", reason, "--reason", "x")
    for options in ((), both):
        assert ask("request", "deny", "T-1", *options, code=2)["error"]["type"] == "UsageError"


@pytest.mark.parametrize("command", NAMING_A_REQUEST, ids=lambda each: each[0])
def test_an_unknown_request_is_3(ask: Ask, command: tuple[str, ...]) -> None:
    name, *options = command
    error = ask("request", name, "sam@example.org", *options, code=3)["error"]
    assert error["type"] == "UnknownRecord"
    assert "sam@" not in json.dumps(error)


@pytest.mark.parametrize("named", [["id-9999"], ["--subject", "nobody"], ["--find-like", "id-9999"]])
def test_an_unknown_record_is_3_and_no_request(ask: Ask, named: list[str]) -> None:
    assert ask("request", "submit", *named, code=3)["error"]["type"] == "UnknownRecord"
    assert ask("request", "list") == {"requests": [], "drop": None}


# --- run


PLAN_KEYS = {"requests", "choice", "why", "run_by", "expected_arrivals", "cost_now", "cost_waiting"}


def files(model: Path) -> dict[str, bytes]:
    found = (path for path in model.rglob("*") if path.is_file() and "ledger" not in path.name)
    return {str(path): path.read_bytes() for path in found}


def test_a_plan_prices_and_changes_nothing(ask: Ask, sisa: Sisa, model: Path) -> None:
    found = ask("run", "--plan")
    assert set(found) == PLAN_KEYS
    assert (found["choice"], found["requests"], found["run_by"]) == ("nothing to do", [], None)
    request = ask("request", "submit", "id-0003", "--approver", "dpo", "--due", tomorrow())
    before, listed = files(model), ask("request", "list")
    found = ask("run", "--plan")
    assert set(found) == PLAN_KEYS
    assert (found["requests"], found["choice"]) == ([request["request_id"]], "run now")
    assert found["cost_now"] >= found["cost_waiting"] > 0
    assert (files(model), ask("request", "list")) == (before, listed)
    code, out, _ = sisa("run", "--plan", "-m", model)
    assert (code, out.startswith("run now: ")) == (0, True)
    assert "record-epochs" in out


def test_run_carries_out_what_is_approved_and_nothing_else(ask: Ask) -> None:
    one = ask("request", "submit", "id-0003", "--external-id", "T-1")
    two = ask("request", "submit", "id-0004", "id-0003", "--approver", "dpo")
    ask("request", "submit", "id-0005")
    ask("request", "submit", "id-0006", "--external-id", "T-4", "--approver", "dpo")
    ask("request", "hold", "T-4", "--reason", "court order")
    ask("request", "approve", "T-1", "--approver", "dpo")
    done = run_once(ask)
    assert {each["request_id"] for each in done} == {one["request_id"], two["request_id"]}
    assert all(each["state"] == "completed" for each in done)
    assert all(each["record_epochs_retrained"] > 0 for each in done)
    wanted = [f"id-{number:04d}" for number in (3, 4, 5, 6)]
    states = [each["state"] for each in ask("where", *wanted)["records"]]
    assert states == ["deleted", "deleted", "trained", "trained"]
    assert [each["state"] for each in ask("request", "show", "T-1")["events"]] == WHOLE_LIFE
    status = ask("status")
    assert (status["records"], status["deleted_records"]) == (18, 2)
    assert [each["state"] for each in ask("request", "list")["requests"]] == [
        *("completed", "completed", "received", "held")
    ]
    assert ask("verify")["ok"]
    assert run_once(ask) == []


def test_run_names_what_waits_for_a_legal_hold(ask: Ask, sisa: Sisa, model: Path) -> None:
    held = ask("request", "submit", "id-0006", "--external-id", "T-1")["request_id"]
    ask("request", "hold", "T-1", "--reason", "court order")
    one = ask("request", "submit", "id-0006", "--external-id", "T-2", "--approver", "dpo")
    assert one["held_by"] == [held]
    assert ask("run", "--executor", "serial")["on_hold"] == [one["request_id"]]
    _, out, _ = sisa("run", "-m", model, "--executor", "serial")
    first, second = out.splitlines()
    assert first == "no request can be run"
    assert second.endswith(f"waits for the legal hold of {held}")


def test_approval_names_the_command_that_runs_the_request(sisa: Sisa, model: Path) -> None:
    sisa("request", "submit", "id-0000", "-m", model, "--external-id", "T-1")
    code, out, _ = sisa("request", "approve", "T-1", "-m", model, "--approver", "dpo")
    assert (code, out.splitlines()[-1]) == (0, f"next: sisa run -m {model}")
    again = sisa("request", "submit", "id-0003", "-m", model, "--approver", "dpo")
    assert again[1].splitlines()[-1] == f"next: sisa run -m {model}"


def test_run_without_anything_to_do_says_so(sisa: Sisa, model: Path) -> None:
    assert sisa("run", "-m", model, "--executor", "serial")[:2] == (0, "no request waits to be run\n")


def test_show_shows_what_was_served_and_what_it_cost(ask: Ask, sisa: Sisa, model: Path) -> None:
    ask("request", "submit", "id-0003", "--external-id", "T-1", "--approver", "dpo")
    assert "record-epochs" not in sisa("request", "show", "-m", model, "T-1")[1]
    out = sisa("run", "-m", model, "--executor", "serial")[1]
    assert " (T-1): completed, 1 record, batch of " in out
    done = ask("request", "show", "T-1")
    text = sisa("request", "show", "-m", model, "T-1")[1]
    assert f"of its batch: {done['record_epochs_retrained']} of {done['record_epochs_full']} (" in text
    ((shard, served, whole),) = done["served"]
    assert f"meanwhile served: shard {shard}: {served} of {whole} slices;" in text


def test_run_prices_finishes_and_reports_what_was_put_off(ask: Ask, sisa: Sisa, model: Path) -> None:
    put_off = ask("forget", "id-0003", "--defer", "--executor", "serial")
    asked = ask("request", "submit", "id-0004", "--approver", "dpo")
    plan = ask("run", "--plan")
    assert plan["choice"] == "run now"
    assert plan["requests"] == [put_off["request_id"], asked["request_id"]]
    assert plan["cost_now"] == plan["cost_waiting"] > 0
    done = run_once(ask)
    assert [each["request_id"] for each in done] == plan["requests"]
    assert [each["state"] for each in done] == ["completed", "completed"]
    put_off = ask("forget", "id-0005", "--defer", "--executor", "serial")
    assert ask("run", "--plan")["cost_now"] == put_off["record_epochs_retrained"]
    code, out, _ = sisa("run", "-m", model, "--executor", "serial")
    assert code == 0
    assert out.startswith(f"{put_off['request_id']}: completed, 1 record")
    assert run_once(ask) == []


def test_an_unknown_executor_is_2_and_nothing_ran(ask: Ask, model: Path, tmp_path: Path) -> None:
    ask("request", "submit", "id-0003", "--external-id", "T-1", "--approver", "dpo")
    (tmp_path / "new.jsonl").write_text('{"id": "new-1", "text": "something else"}\n')
    before = files(model)
    for command in (["run"], ["forget", "id-0004"], ["add", tmp_path / "new.jsonl"]):
        assert ask(*command, "--executor", "none", code=2)["error"]["type"] == "InvalidInput"
    assert files(model) == before
    assert ask("request", "show", "T-1")["state"] == "approved"
    assert ask("status")["records"] == NUM_RECORDS


def test_watching_runs_what_is_due_and_ends_with_an_interrupt(
    ask: Ask, sisa: Sisa, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 1:
            ask("request", "submit", "id-0004", "--due", tomorrow(), "--approver", "dpo")
        if len(slept) == 2:
            raise KeyboardInterrupt

    ask("request", "submit", "id-0003", "--due", tomorrow(), "--approver", "dpo")
    ask("request", "submit", "id-0005", "--due", tomorrow())
    monkeypatch.setattr(requests, "time", SimpleNamespace(sleep=sleep))
    code, _, _ = sisa("run", "--watch", "--every", "7", "-m", model, "--executor", "serial")
    assert (code, slept) == (130, [7.0, 7.0])
    assert [each["state"] for each in ask("request", "list")["requests"]] == [
        *("completed", "received", "completed")
    ]


def test_a_watcher_waits_for_another_writer(
    ask: Ask, sisa: Sisa, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    writer = ExitStack()

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            writer.close()
        if len(slept) == 3:
            raise KeyboardInterrupt

    ask("request", "submit", "id-0003", "--due", tomorrow(), "--approver", "dpo")
    monkeypatch.setattr("sisa.store.blobs.files.LOCK_PATIENCE_S", 0.05)
    monkeypatch.setattr(requests, "time", SimpleNamespace(sleep=sleep))
    with writer:
        writer.enter_context(writer_lock(model / LOCK))
        code, _, err = sisa("run", "--watch", "--every", "7", "-m", model, "--executor", "serial")
    assert (code, len(slept), err.count("trying again every 7 s")) == (130, 3, 1)
    assert [each["state"] for each in ask("request", "list")["requests"]] == ["completed"]


@pytest.mark.parametrize("every", ["-1", "nan", "inf"])
def test_no_one_sleeps_a_negative_time(sisa: Sisa, model: Path, every: str) -> None:
    code, _, err = sisa("run", "--watch", f"--every={every}", "-m", model, "--executor", "serial")
    assert (code, "internal fault" in err) == (2, False)


def test_an_already_deleted_id_does_not_keep_a_live_one(ask: Ask) -> None:
    first = ask("forget", "id-0003", "--executor", "serial")
    found = ask("forget", "id-0003", "id-0004", "id-0004", "--executor", "serial")
    assert (found["records"], found["already_deleted"]) == (1, 1)
    states = [each["state"] for each in ask("where", "id-0003", "id-0004")["records"]]
    assert states == ["deleted"] * 2
    assert ask("request", "show", first["request_id"])["approver"] == "sisa forget"


def test_a_request_names_the_one_that_deleted_its_records_before(
    ask: Ask, sisa: Sisa, model: Path
) -> None:
    first = ask("forget", "id-0003", "--executor", "serial")
    out = sisa("request", "submit", "-m", model, "id-0003", "id-0004")[1]
    assert f"already deleted before: 1 record, by {first['request_id']}\n" in out
    assert ask("request", "submit", "id-0003", "id-0005")["already_deleted"] == 1
